"""fp32 convs that PyTorch may round to TF32 are compared at the precision of TF32, no more loosely."""

from __future__ import annotations

import pytest
import torch

from jasper_fast.bench.cases import common
from jasper_fast.bench.harness import correct, limits
from jasper_fast.bench.harness.run import Run


def run_in(dtype: torch.dtype) -> Run:
    return Run(torch.device("cpu"), dtype, "auto", quick=True, results=None)


def cut_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounds fp32 as tensor cores do: the last 13 bits of the mantissa become zero."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def conv(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv1d(x, w, padding=w.shape[2] // 2)


@pytest.fixture
def answers() -> dict[str, dict[str, torch.Tensor]]:
    x, w = torch.randn(2, 256, 100), torch.randn(64, 256, 11) / 53
    return {
        "ref": {"y": conv(x.double(), w.double())},
        "low": {"y": conv(x, w)},  # not rounded: cuDNN may choose a kernel that does not round
        "cut": {"y": conv(cut_to_tf32(x), cut_to_tf32(w))},
    }


@pytest.mark.parametrize("mode", ["TF32", "IEEE"])
def test_cut_operands_pass_where_tf32_is_allowed_only(mode, answers, monkeypatch) -> None:
    monkeypatch.setattr(limits, "float32_mode", lambda device: mode)
    tolerance = common.tolerance(run_in(torch.float32))
    said = correct.complaints(answers["cut"], answers["low"], answers["ref"], tolerance)
    assert bool(said) == (mode == "IEEE")
    assert not correct.complaints(answers["low"], answers["low"], answers["ref"], tolerance)
    scaled = {"y": 1.005 * answers["cut"]["y"]}
    assert correct.complaints(scaled, answers["low"], answers["ref"], tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_have_their_own_rounding(dtype, monkeypatch) -> None:
    monkeypatch.setattr(limits, "float32_mode", lambda device: "TF32")
    assert common.tolerance(run_in(dtype)) is common.CONV_TOLERANCE
