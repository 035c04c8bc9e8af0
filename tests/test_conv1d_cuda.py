"""The CUDA C++ face of conv1d, run on the CPU through the host twins of its PTX instructions (tests/cuda_host.py)."""

from __future__ import annotations

import ctypes

import conv_cases
import cuda_host
import pytest
import torch
from close import assert_close
from torch import Tensor

from jasper_fast.kernels.conv1d import aten_impl, cuda_impl, cuda_launch, cuda_tiles, reference
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.kernels.operands import Geometry, Lengths, Mask, Norm

CPU = torch.device("cpu")
SHARED = {75: 65536, 80: 166912, 90: 232448}
LOOPS = [(75, torch.float16), (80, torch.float16), (80, torch.bfloat16), (90, torch.float16), (90, torch.bfloat16)]


@pytest.fixture(scope="module")
def functions() -> cuda_launch.Functions:
    return cuda_launch.Functions(ctypes.CDLL(str(cuda_host.build([cuda_host.CSRC / "cuda/emulate/conv1d.cpp"]))))


class Face:
    """The face on a pretended GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, functions: cuda_launch.Functions) -> None:
        self._patch = monkeypatch
        monkeypatch.setattr(cuda_launch, "functions", lambda: functions)

    def on(self, loop: int, sms: int = 3) -> None:
        gpu = cuda_tiles.Gpu(loop, sms, SHARED[loop])
        self._patch.setattr(cuda_launch, "gpu", lambda device: gpu)


@pytest.fixture
def face(monkeypatch: pytest.MonkeyPatch, functions: cuda_launch.Functions) -> Face:
    return Face(monkeypatch, functions)


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def poisoned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`x` (N, C, T) in NTC memory with NaN in its padding, which must not be seen."""
    return ntc(mask(x, lengths, float("nan"))) if lengths is not None else x


@pytest.mark.parametrize(("loop", "dtype"), LOOPS, ids=str)
@pytest.mark.parametrize("name", conv_cases.LAYERS)
def test_forward(face: Face, name: str, loop: int, dtype: torch.dtype) -> None:
    face.on(loop)
    x, weight, geometry, lengths = conv_cases.make(conv_cases.LAYERS[name], dtype, CPU)
    y, mean, m2 = cuda_impl.forward_stats(poisoned(x, lengths), weight, geometry, lengths)
    ref = reference.forward_stats(x.double(), weight.double(), geometry, lengths)
    low = aten_impl.forward(x, weight, geometry)
    assert_close("y", y, low, ref[0])
    for kind, got, of in zip(("mean", "m2"), (mean, m2), ref[1:], strict=True):
        assert_close(kind, got, reference.bn.stats(low.float())[kind == "m2"], of)
    assert torch.equal(y, cuda_impl.forward(poisoned(x, lengths), weight, geometry, lengths))
