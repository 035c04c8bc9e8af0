"""The CUDA kernels of bn_relu_dropout, compiled as host C++ and run thread by thread, so that their indexing is tested
without a GPU."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import cuda_host
import pytest
import torch
from close import assert_close
from torch import Tensor

from jasper_fast.kernels import philox
from jasper_fast.kernels.bn_relu_dropout import reference
from jasper_fast.kernels.layout import empty_ntc, ntc
from jasper_fast.kernels.operands import Mask, Norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
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


class Emulated:
    """The four functions of the face, emulated on a GPU with `sms` multiprocessors."""

    def __init__(self, library: Path) -> None:
        self.call = ctypes.CDLL(str(library)).jf_emulate
        self.sms = 2

    def run(self, op: int, y: Tensor, p: float, first: Tensor | None = None, second: Tensor | None = None, **tensors):
        n, c, t = y.shape
        raw = Raw(threshold=philox.threshold(p), n=n, c=c, t=t, scale=1 / (1 - p))
        for name, tensor in {"y": y, **tensors}.items():
            setattr(raw, name, None if tensor is None else tensor.data_ptr())
        results = [ctypes.c_void_p(None if r is None else r.data_ptr()) for r in (first, second)]
        self.call(op, DTYPES.index(y.dtype), ctypes.byref(raw), *results, self.sms)

    def stats(self, y):
        mean, m2 = torch.empty(y.shape[1]), torch.empty(y.shape[1])
        self.run(STATS, y, 0.0, mean, m2)
        return mean, m2

    def forward(self, y, norm, residual, mask):
        z, (lengths, seed, p) = empty_ntc(*y.shape, like=y), mask
        self.run(FORWARD, y, p, residual=residual, lengths=lengths, seed=seed, out=z, **norm._asdict())
        return z

    def backward_reduce(self, dz, y, z, norm, mask):
        dbeta, dgamma = torch.empty(y.shape[1]), torch.empty(y.shape[1])
        lengths, seed, p = mask
        seed = seed if z is None else None  # as in bn_relu_dropout.cu
        self.run(REDUCE, y, p, dbeta, dgamma, dz=dz, z=z, lengths=lengths, seed=seed, **norm._asdict())
        return dbeta, dgamma

    def backward_apply(self, dz, y, z, norm, means, mask, has_residual):
        dy, dres = empty_ntc(*y.shape, like=y), empty_ntc(*y.shape, like=y) if has_residual else None
        channels = norm._asdict() | dict(zip(("mean_g", "mean_gy"), means or (None, None), strict=True))
        lengths, seed, p = mask
        seed = seed if z is None else None
        self.run(APPLY, y, p, dz=dz, z=z, lengths=lengths, seed=seed, out=dy, dres=dres, **channels)
        return dy, dres


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    return Emulated(cuda_host.build([cuda_host.CSRC / "cuda/emulate/bn_relu_dropout.cpp"]))


def tensors(n: int, c: int, t: int, dtype: torch.dtype, shift: float = 0.0) -> dict[str, Tensor]:
    """Returns random inputs, exact in `dtype`, with activations in NTC memory."""

    def activation(offset: float = 0.0) -> Tensor:
        return ntc((torch.randn(n, c, t) + offset).to(dtype))

    y = activation(shift)
    mean, m2 = reference.stats(y.double())
    return {
        "y": y,
        "dz": activation(),
        "residual": activation(),
        "mean": mean.float(),
        "rstd": (m2 / (n * t) + 1e-3).rsqrt().float(),
        "gamma": torch.rand(c) + 0.5,
        "beta": torch.randn(c) * 0.5,
    }


def norm_of(x: dict[str, Tensor]) -> Norm:
    return Norm(*(x[name] for name in Norm._fields))


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None or not x.is_floating_point() else x.double() for x in tensors]


# wide CTAs, uneven columns, one column, the scalar path, several turns of the loops, T = 1
SHAPES = [(2, 64, 37), (3, 200, 21), (2, 8, 300), (2, 29, 19), (1, 16, 700), (5, 24, 1), (2, 1, 70)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats(emulated: Emulated, shape, dtype) -> None:
    y = tensors(*shape, dtype, shift=30.0)["y"]
    got, low, ref = emulated.stats(y), reference.stats(y), reference.stats(y.double())
    for name, *three in zip(("mean", "m2"), got, low, ref, strict=True):
        assert_close(name, *three)
    assert all(torch.equal(a, b) for a, b in zip(got, emulated.stats(y), strict=True))


FLAGS = list(itertools.product((False, True), (0.0, 0.3), (False, True)))  # residual, p, padded
CASES = [(shape, dtype, *FLAGS[i]) for i, shape in enumerate(SHAPES) for dtype in DTYPES]
CASES += [(shape, dtype, *FLAGS[7 - i]) for i, shape in enumerate(SHAPES) for dtype in DTYPES]
CASES += [((2, 64, 37), torch.float16, *flags) for flags in FLAGS]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype", "residual", "p", "padded"), dict.fromkeys(CASES), ids=str)
def test_both_ways(emulated: Emulated, shape, dtype, residual, p, padded) -> None:
    n, c, t = shape
    x = tensors(n, c, t, dtype)
    lengths = torch.randint(0, t + 1, (n,)) if padded else None
    seed = torch.tensor([-(2**61) + 12345]) if p else None
    norm = norm_of(x)
    if padded:  # NaN, because the padding of dz and of the residual must not be read
        for i, length in enumerate(lengths):
            x["dz"][i, :, length:] = x["residual"][i, :, length:] = float("nan")

    added, mask = x["residual"] if residual else None, Mask(lengths, seed, p)
    wide_y, wide_added, *wide = double(x["y"], added, *norm)
    z, low, ref = (
        emulated.forward(x["y"], norm, added, mask),
        reference.forward(x["y"], norm, added, mask),
        reference.forward(wide_y, Norm(*wide), wide_added, mask),
    )
    assert_close("z", z, low, ref)
    assert torch.equal(z == 0, low == 0), "other elements were dropped, masked or clipped"

    saved = [x["dz"], x["y"], z if residual else None]
    args, wide_args = (*saved, norm), (*double(*saved), Norm(*wide))
    sums = emulated.backward_reduce(*args, mask)
    wide_sums = reference.backward_reduce(*wide_args, mask)
    for name, *three in zip(("dbeta", "dgamma"), sums, reference.backward_reduce(*args, mask), wide_sums):
        assert_close(name, *three)
    for means in (None, [(s / (n * t)).float() for s in wide_sums]):
        grads = emulated.backward_apply(*args, means, mask, residual)
        low = reference.backward_apply(*args, means, mask, residual)
        ref = reference.backward_apply(*wide_args, means and double(*means), mask, residual)
        for name, *three in zip(("dy", "dres"), grads, low, ref, strict=True):
            if three[0] is not None:
                assert_close(name, *three)


@pytest.mark.slow
def test_results_do_not_depend_on_the_cut(emulated: Emulated) -> None:
    """Shows that the number of multiprocessors changes no bit of elementwise results, and reductions only by
    rounding."""
    x = tensors(2, 40, 500, torch.float16)
    lengths, seed = torch.tensor([500, 123]), torch.tensor([7])
    norm = norm_of(x)
    results = []
    for emulated.sms in (1, 3, 132):
        results.append(
            [
                emulated.forward(x["y"], norm, None, Mask(lengths, seed, 0.5)),
                *emulated.stats(x["y"]),
                *emulated.backward_reduce(x["dz"], x["y"], None, norm, Mask(lengths, seed, 0.5)),
            ]
        )
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        for a, b in zip(other[1:], results[0][1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_misaligned_pointers_take_the_scalar_path(emulated: Emulated) -> None:
    x = tensors(2, 32, 9, torch.float32)
    norm = norm_of(x)
    flat = torch.empty(x["y"].numel() + 1)
    shifted = flat[1:].reshape(2, 9, 32).transpose(1, 2).copy_(x["y"])
    assert shifted.data_ptr() % 16 != 0
    seed = torch.tensor([3])
    assert torch.equal(
        emulated.forward(shifted, norm, None, Mask(None, seed, 0.5)),
        emulated.forward(x["y"], norm, None, Mask(None, seed, 0.5)),
    )


def test_nan_passes_relu_and_its_gradient_but_not_the_mask(emulated: Emulated) -> None:
    x = tensors(1, 16, 10, torch.float32)
    norm = norm_of(x)
    lengths, seed = torch.tensor([6]), torch.tensor([11])
    x["y"][0, :, 3] = x["y"][0, :, 8] = float("nan")
    z = emulated.forward(x["y"], norm, None, Mask(lengths, seed, 0.5))
    keep = philox.keep_mask(1, 16, 10, 0.5, seed)
    assert torch.equal(z[0, :, 3].isnan(), keep[0, :, 3])
    assert (z[0, :, 6:] == 0).all()
    dbeta, dgamma = emulated.backward_reduce(x["dz"], x["y"], None, norm, Mask(lengths, seed, 0.5))
    assert torch.equal(dgamma.isnan(), keep[0, :, 3])
    assert not dbeta.isnan().any()
