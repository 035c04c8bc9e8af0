"""How far a result may be from the fp64 result: one rule for the tests, the self-check and the benchmarks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMAS = 5.0  # standard deviations allowed for a sum of independent roundings


@dataclass(frozen=True)
class Tolerance:
    """The limit: `factor` times the error of plain PyTorch at the same precision, plus `floor` roundings in fp32 or one
    rounding in other dtypes. Without a result of plain PyTorch the limit is `relative`.

    fp32 has its own floor because sums in two orders can differ by more roundings than plain PyTorch's error shows.
    The RMS norm of the error must be within the limit, which catches an error that is small but in every element. The
    max norm must be within `peak` times the limit, which catches a single wrong element.

    `along` limits the component of the error along the fp64 result, `|<got - ref, ref>| / <ref, ref>`. Roundings
    cancel in it. A wrong scale, a lost term or a skipped utterance do not cancel. For the remaining roundings
    SIGMAS * e / sqrt(n) is added to that limit, where e is plain PyTorch's error (or `relative`) and n the number of
    elements.
    """

    factor: float = 2.0
    floor: float = 1.0
    relative: float = 1e-3
    peak: float = 1.0
    along: float = math.inf


@dataclass(frozen=True)
class Compared:
    """How one tensor compares with the fp64 result in one norm.

    The norm is the first in which the error exceeds its limit. If it exceeds none, the norm is the one in which the
    error is nearest to its limit. `ours` and `theirs` are the relative errors of our result and of plain PyTorch's.
    `share` is our error divided by the limit: above 1 the result is wrong. `detail` describes the comparison in words.
    """

    share: float
    ours: float | None = None
    theirs: float | None = None
    detail: str = ""

    @property
    def right(self) -> bool:
        return self.share <= 1.0  # a NaN compares as False, so it is wrong


def compare(got: Tensor, low: Tensor | None, ref: Tensor, tolerance: Tolerance) -> Compared:
    """Compares the error of `got` against the fp64 result `ref` with the error of `low`, plain PyTorch's result.

    If `got` has another shape than `ref`, its share is infinite. Integers must be equal. The norms are compared in the
    order max, RMS, along.
    """
    if got.shape != ref.shape:
        return Compared(math.inf, detail=f"shape {tuple(got.shape)}, expected {tuple(ref.shape)}")
    if not got.is_floating_point():
        same = torch.equal(got.to(ref.device, ref.dtype), ref)
        return Compared(0.0 if same else math.inf, 0.0, 0.0, "" if same else "integers differ from the expected ones")
    eps = None if low is None else torch.finfo(low.dtype).eps * (tolerance.floor if low.dtype == torch.float32 else 1.0)
    got, low, ref = (t if t is None else t.detach().to(ref.device).double() for t in (got, low, ref))
    found = []
    for name, norm, peak in (("max", _max, tolerance.peak), ("rms", _rms, 1.0)):
        size, ours, theirs = norm(ref), norm(got - ref), None if low is None else norm(low - ref)
        allowed = tolerance.relative * size if low is None else tolerance.factor * theirs + eps * size
        found.append(_compared(name, ours, theirs, peak * allowed, size))
    if math.isfinite(tolerance.along) and (size := ref.square().sum().item()):
        plain = tolerance.relative if low is None else _rms(low - ref) / _rms(ref)
        allowed = tolerance.along + SIGMAS * plain / math.sqrt(ref.numel())
        found.append(_compared("along-the-result", abs(((got - ref) * ref).sum().item()) / size, None, allowed, 1.0))
    return next((c for c in found if not c.right), max(found, key=lambda c: c.share))


def _compared(name: str, ours: float, theirs: float | None, allowed: float, size: float) -> Compared:
    share, scale = 0.0 if ours == 0 else ours / allowed if allowed > 0 else math.inf, size or 1.0
    plain = "" if theirs is None else f", PyTorch's {theirs:.2e}"
    detail = f"{name} error {ours:.2e} ({ours / scale:.1e} of its size){plain}, allowed {allowed:.2e}"
    return Compared(share, ours / scale, None if theirs is None else theirs / scale, detail)


def _max(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
