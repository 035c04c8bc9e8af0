"""If PyTorch may use TF32, answers of fp32 convs may have the errors of TF32, but no larger ones."""

import pytest
import torch
from bench_runs import make_run

from jasper_fast.bench.cases import common
from jasper_fast.bench.harness import correct, limits


def cut_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Truncates fp32 to TF32 as tensor cores do: the last 13 bits of the mantissa become zero."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def conv(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv1d(x, w, padding=w.shape[2] // 2)


@pytest.fixture
def answers() -> dict[str, dict[str, torch.Tensor]]:
    x, w = torch.randn(2, 256, 100), torch.randn(64, 256, 11) / 53
    return {
        "ref": {"y": conv(x.double(), w.double())},
        "low": {"y": conv(x, w)},  # not rounded, because cuDNN may choose a kernel without TF32
        "cut": {"y": conv(cut_to_tf32(x), cut_to_tf32(w))},
    }


@pytest.mark.parametrize("mode", ["TF32", "IEEE"])
def test_cut_operands_pass_where_tf32_is_allowed_only(mode, answers, run, monkeypatch) -> None:
    monkeypatch.setattr(limits, "float32_mode", lambda device: mode)
    tolerance = common.tolerance(run)
    answers["scaled"] = {"y": 1.005 * answers["cut"]["y"]}
    for name, wrong in (("cut", mode == "IEEE"), ("low", False), ("scaled", True)):
        assert bool(correct.complaints(answers[name], answers["low"], answers["ref"], tolerance)) == wrong, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_have_their_own_rounding(dtype, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(limits, "float32_mode", lambda device: "TF32")
    assert common.tolerance(make_run(tmp_path, dtype=dtype)) is common.CONV_TOLERANCE
