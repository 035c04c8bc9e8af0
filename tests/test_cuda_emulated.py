"""The CUDA kernels of bn_relu_dropout, compiled as host C++ and run thread by thread on a CPU.

Some tests are imported from test_bn_relu_dropout.py, where they run on the other faces.
"""

import ctypes
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cuda_host
import pytest
import torch
from close import assert_close
from test_bn_relu_dropout import (  # noqa: F401 (pytest collects the imported tests here and runs them on the emulated face)
    DTYPES,
    check,
    dtypes,
    make,
    run,
    test_dropped_nan_is_zero,
    test_garbage_in_padding_changes_nothing,
    test_nan_in_a_valid_frame_reaches_outputs_and_gradients,
)
from torch import Tensor

from jasper_fast.kernels import philox
from jasper_fast.kernels.bn_relu_dropout import reference
from jasper_fast.kernels.bn_relu_dropout.native_face import NativeFace
from jasper_fast.kernels.layout import padding

POINTERS = (
    "y",
    "residual",
    "z",
    "dz",
    "out",
    "dres",
    "mean",
    "rstd",
    "gamma",
    "beta",
    "mean_g",
    "mean_gy",
    "lengths",
    "seed",
)
STATS, FORWARD, REDUCE, APPLY = range(4)


class Raw(ctypes.Structure):
    """The struct Raw of csrc/cuda/emulate/bn_relu_dropout.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("threshold", "n", "c", "t")),
        ("scale", ctypes.c_double),
    ]


class Emulated(NativeFace):
    """The CUDA face, with its kernels emulated as on a GPU with `sms` multiprocessors."""

    def __init__(self, library: Path) -> None:
        super().__init__(lambda: self)
        self.call = ctypes.CDLL(str(library)).jf_emulate
        self.sms = 2

    def run(self, op: int, y: Tensor, p: float, first: Tensor | None = None, second: Tensor | None = None, **tensors):
        n, c, t = y.shape
        raw = Raw(threshold=philox.threshold(p), n=n, c=c, t=t, scale=1 / (1 - p))
        for name, tensor in {"y": y, **tensors}.items():
            setattr(raw, name, None if tensor is None else tensor.data_ptr())
        results = [ctypes.c_void_p(None if r is None else r.data_ptr()) for r in (first, second)]
        self.call(op, DTYPES.index(y.dtype), ctypes.byref(raw), *results, self.sms)

    def bn_stats(self, y, mean, m2):
        self.run(STATS, y, 0.0, mean, m2)

    def bn_forward(self, y, mean, rstd, gamma, beta, residual, lengths, seed, p, z):
        self.run(
            FORWARD, y, p, mean=mean, rstd=rstd, gamma=gamma, beta=beta, residual=residual, lengths=lengths, seed=seed,
            out=z,
        )  # fmt: skip

    def bn_backward_reduce(self, dz, y, z, mean, rstd, gamma, beta, lengths, seed, p, dbeta, dgamma):
        self.run(
            REDUCE, y, p, dbeta, dgamma, mean=mean, rstd=rstd, gamma=gamma, beta=beta, dz=dz, z=z, lengths=lengths,
            seed=seed if z is None else None,  # as in bn_relu_dropout.cu
        )  # fmt: skip

    def bn_backward_apply(self, dz, y, z, mean, rstd, gamma, beta, mean_g, mean_gy, lengths, seed, p, dy, dres):
        self.run(
            APPLY, y, p, mean=mean, rstd=rstd, gamma=gamma, beta=beta, mean_g=mean_g, mean_gy=mean_gy, dz=dz, z=z,
            lengths=lengths, seed=seed if z is None else None, out=dy, dres=dres,
        )  # fmt: skip


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    return Emulated(cuda_host.build([cuda_host.CSRC / "cuda/emulate/bn_relu_dropout.cpp"]))


@pytest.fixture
def face(emulated: Emulated) -> SimpleNamespace:
    """The face that the imported tests run on."""
    return SimpleNamespace(device=torch.device("cpu"), load=lambda op: emulated)


# (N, C, T). The cases cover wide CTAs, a C that CTAs do not divide evenly, one column, the scalar path, loops of
# several turns, and T = 1.
SHAPES = [(2, 64, 37), (3, 200, 21), (2, 8, 300), (2, 29, 19), (1, 16, 700), (5, 24, 1), (2, 3, 70)]


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats(emulated: Emulated, shape, dtype) -> None:
    y = make(*shape, dtype=dtype, device="cpu", offset=30.0).y
    got, low, ref = emulated.stats(y), reference.stats(y), reference.stats(y.double())
    for name, *three in zip(("mean", "m2"), got, low, ref, strict=True):
        assert_close(name, *three)
    assert all(torch.equal(a, b) for a, b in zip(got, emulated.stats(y), strict=True))


FLAGS = list(itertools.product((False, True), (0.0, 0.3), (False, True)))  # residual, p, padded
CASES = [(shape, dtype, *FLAGS[k]) for i, shape in enumerate(SHAPES) for dtype in DTYPES for k in (i, 7 - i)]
CASES += [((2, 64, 37), torch.float16, *flags) for flags in FLAGS]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype", "residual", "p", "padded"), dict.fromkeys(CASES), ids=str)
def test_both_ways(face, shape, dtype, residual, p, padded) -> None:
    n, _, t = shape
    lengths = torch.randint(0, t + 1, (n,)).tolist() if padded else None
    case = make(*shape, dtype=dtype, device="cpu", residual=residual, lengths=lengths, p=p)
    for x in (case.dz, case.residual):  # the padding of dz and of the residual must not be read
        if padded and x is not None:
            x[padding(case.lengths, t).expand_as(x)] = math.nan
    for training in (True, False):
        check(face, case, training)


@pytest.mark.slow
def test_results_do_not_depend_on_the_cut(emulated: Emulated) -> None:
    """The number of multiprocessors changes no bit of elementwise results. It changes reductions only by rounding."""
    case = make(2, 40, 500, dtype=torch.float16, device="cpu", lengths=[500, 123], p=0.5)
    results = []
    for emulated.sms in (1, 3, 132):
        results.append(run(emulated, case, training=False) | dict(zip("ms", emulated.stats(case.y), strict=True)))
    for other in results[1:]:
        for name, value in results[0].items():
            if value.dim() == 3:
                assert torch.equal(other[name], value), name
            else:
                torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-4)


def test_misaligned_pointers_take_the_scalar_path(emulated: Emulated) -> None:
    case = make(2, 32, 9, dtype=torch.float32, device="cpu", p=0.5)
    shifted = torch.empty(case.y.numel() + 1)[1:].reshape(2, 9, 32).transpose(1, 2).copy_(case.y)
    assert shifted.data_ptr() % 16 != 0
    want, got = (run(emulated, replace(case, y=y), training=False) for y in (case.y, shifted))
    assert torch.equal(got["z"], want["z"])
