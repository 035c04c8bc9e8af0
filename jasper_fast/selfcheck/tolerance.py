"""How far from an fp64 result another one may be: the one rule of the tests, the self-check and the benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMAS = 5.0  # of a sum of independent roundings


@dataclass(frozen=True)
class Tolerance:
    """`factor` times as far as plain PyTorch at the same precision, plus `floor` roundings in fp32 and one in other
    dtypes; with no plain PyTorch beside it, `relative`.

    fp32 has a floor of its own because sums in another order differ by more roundings than plain PyTorch happens to.
    The RMS norm is held to that and the max norm to `peak` times it: the first sees a small error everywhere, the
    second one wrong element. `along` bounds the error's share along the fp64 result, `|<got - ref, ref>| / <ref, ref>`,
    where roundings cancel and a scale, a lost term or a skipped utterance do not; what is left of plain PyTorch's own
    error e (or of `relative`) over n elements, SIGMAS * e / sqrt(n), is added.
    """

    factor: float = 2.0
    floor: float = 1.0
    relative: float = 1e-3
    peak: float = 1.0
    along: float = math.inf


@dataclass(frozen=True)
class Compared:
    """The measure in which a tensor came nearest to its limit: errors of ours and of plain PyTorch as shares of its
    size, the share of the limit that ours took (at most 1, else it is wrong), and all that in words."""

    share: float
    ours: float | None = None
    theirs: float | None = None
    detail: str = ""

    @property
    def right(self) -> bool:
        return self.share <= 1.0  # written so that a NaN is wrong


def compare(got: Tensor, low: Tensor | None, ref: Tensor, tolerance: Tolerance) -> Compared:
    """How `got` lies beside `low`, plain PyTorch's at its precision, about the fp64 `ref`, all of one shape.

    Integers must be equal. What is wrong comes first, in the order max, RMS, along.
    """
    if got.shape != ref.shape:
        return Compared(math.inf, detail=f"shape {tuple(got.shape)}, expected {tuple(ref.shape)}")
    if not got.is_floating_point():
        same = torch.equal(got.to(ref.device, ref.dtype), ref)
        return Compared(0.0 if same else math.inf, 0.0, 0.0, "" if same else "other integers than expected")
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
        found.append(_compared("along it", abs(((got - ref) * ref).sum().item()) / size, None, allowed, 1.0))
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
