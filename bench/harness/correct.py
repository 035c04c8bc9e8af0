"""No number for a wrong result: every contender is compared with fp64 before, and again after, it is timed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMAS = 5.0  # of a sum of independent roundings


@dataclass(frozen=True)
class Tolerance:
    """How far from the fp64 result a contender may be: `factor` times as far as plain PyTorch at the same precision,
    plus `floor` roundings in fp32 and one in lower precisions; with no plain PyTorch beside it, `relative`.

    fp32 has a floor of its own because sums in another order differ by more roundings than plain PyTorch happens to.
    The RMS norm is held to that and the max norm to `peak` times it. `along` bounds the error's share along the fp64
    result, `|<got - ref, ref>| / <ref, ref>`, where roundings cancel and a scale, a lost term or a skipped utterance do
    not; what is left of plain PyTorch's own error e (or of `relative`) over n elements, SIGMAS * e / sqrt(n), is added.

    `gradients` is the tolerance of the tensors named "grad ..." where it must differ: among a network's millions of
    ReLUs some inputs lie within a rounding of zero and fall to the other side, in every implementation, and each moves
    a few gradients by what its frame weighs. `clear` is that of the tensors named "clear grad ...", of a network with
    no such input (`models.clear`).
    """

    factor: float = 2.0
    floor: float = 2.0
    relative: float = 1e-3
    peak: float = 1.0
    gradients: "Tolerance | None" = None
    along: float = math.inf
    clear: "Tolerance | None" = None

    def of(self, name: str) -> "Tolerance":
        """The tolerance for one tensor."""
        if name.startswith("clear grad "):
            return self.clear or self
        return self.gradients if self.gradients and name.startswith("grad ") else self


def complaints(
    got: Mapping[str, Tensor], low: Mapping[str, Tensor] | None, ref: Mapping[str, Tensor], tol: Tolerance
) -> list[str]:
    """What is wrong with `got`, one line a tensor; empty when all is well.

    Max norm and RMS norm are both held: the first sees one wrong element, the second a small error everywhere.
    """
    wrong = [f"{name}: missing" for name in ref if name not in got]
    for name in (n for n in ref if n in got):
        line = _compare(name, got[name], None if low is None else low[name], ref[name], tol.of(name))
        wrong += [line] if line else []
    return wrong


def _compare(name: str, got: Tensor, low: Tensor | None, ref: Tensor, tol: Tolerance) -> str | None:
    if got.shape != ref.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    if not got.is_floating_point():
        return (
            None if torch.equal(got.to(ref.device, ref.dtype), ref) else f"{name}: differs from the expected integers"
        )
    got, ref = got.detach().to(ref.device).double(), ref.detach().double()
    for norm, measure in (("max", _max), ("rms", _rms)):
        scale, error = measure(ref), measure(got - ref)
        if low is None:
            allowed = tol.relative * scale
        else:
            plain = low.detach().to(ref.device)
            floor = (tol.floor if plain.dtype is torch.float32 else 1.0) * torch.finfo(plain.dtype).eps
            allowed = tol.factor * measure(plain.double() - ref) + floor * scale
        allowed *= tol.peak if norm == "max" else 1.0
        if not error <= allowed:  # written so that a NaN is a complaint
            share = error / scale if scale else math.inf
            return f"{name}: {norm} error {error:.2e} ({share:.1e} of its size), allowed {allowed:.2e}"
    return _compare_along(name, got, low, ref, tol) if math.isfinite(tol.along) else None


def _compare_along(name: str, got: Tensor, low: Tensor | None, ref: Tensor, tol: Tolerance) -> str | None:
    size = ref.square().sum().item()
    if not size:
        return None  # the norms have seen that `got` is zero too
    error = abs(((got - ref) * ref).sum().item()) / size
    plain = tol.relative if low is None else _rms(low.detach().to(ref.device).double() - ref) / _rms(ref)
    allowed = tol.along + SIGMAS * plain / math.sqrt(ref.numel())
    if not error <= allowed:
        return f"{name}: error along it {error:.1e} of its size, allowed {allowed:.1e}"
    return None


def _max(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def keep_rate_complaint(kept: int, of: int, p: float) -> str | None:
    """Dropout must keep 1-p of `of` elements, within five standard deviations."""
    sigma = math.sqrt(p * (1 - p) / of)
    rate = kept / of
    return (
        None if abs(rate - (1 - p)) <= 5 * sigma else f"dropout keeps {rate:.4f} of {of} elements, expected {1 - p:.4f}"
    )


def poison(like: Mapping[str, Tensor]) -> None:
    """Leave NaN in the memory that the allocator will hand out next, so that an element nobody writes shows."""
    filled = [torch.full_like(t, math.nan) for t in like.values() if t.is_floating_point()]
    del filled
