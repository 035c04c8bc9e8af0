"""The rule by which the answer of a contender is compared with the fp64 answer. A wrong contender gets no time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jasper_fast.selfcheck import tolerance


@dataclass(frozen=True)
class Tolerance(tolerance.Tolerance):
    """The project's tolerance, with other values for some tensors.

    `gradients` applies to the tensors named "grad ...". In every implementation, rounding moves some of the millions of
    ReLU inputs of a network across zero, and each of these changes a few gradients noticeably. `clear` applies to the
    tensors named "clear grad ...", from a network whose ReLUs have no input near zero (`models.clear`).
    """

    floor: float = 2.0
    gradients: "Tolerance | None" = None
    clear: "Tolerance | None" = None

    def of(self, name: str) -> "Tolerance":
        """Returns the tolerance for the tensor `name`."""
        if name.startswith("clear grad "):
            return self.clear or self
        return self.gradients if self.gradients and name.startswith("grad ") else self


def complaints(
    got: Mapping[str, Tensor], low: Mapping[str, Tensor] | None, ref: Mapping[str, Tensor], tol: Tolerance
) -> list[str]:
    """Returns what is wrong with `got`, one line per tensor. The list is empty if all is right."""
    wrong = [f"{name}: missing" for name in ref if name not in got]
    found = (
        (name, tolerance.compare(got[name], None if low is None else low[name], ref[name], tol.of(name)))
        for name in ref
        if name in got
    )
    return wrong + [f"{name}: {compared.detail}" for name, compared in found if not compared.right]


def keep_rate_complaints(kept: int, of: int, p: float) -> list[str]:
    """Returns a complaint if the share of kept elements, `kept` / `of`, differs from 1-p by more than five standard
    deviations."""
    rate = kept / of
    if abs(rate - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / of):
        return []
    return [f"dropout keeps {rate:.4f} of {of} elements, expected {1 - p:.4f}"]


def poison(like: Mapping[str, Tensor]) -> None:
    """Fills the memory that the allocator returns next with NaN, so that an element that is never written is
    noticed."""
    filled = [torch.full_like(t, math.nan) for t in like.values() if t.is_floating_point()]
    del filled
