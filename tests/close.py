"""The tolerance rule of every numeric test."""

from __future__ import annotations

from torch import Tensor

from jasper_fast.selfcheck.tolerance import Tolerance, compare


def assert_close(name: str, got: Tensor, low: Tensor, ref: Tensor, factor: float = 2.0) -> None:
    """`got` may be at most `factor` times as far from the fp64 `ref` as PyTorch's own low-precision `low` is, plus one
    eps of low's dtype.

    In fp32 on a GPU it is 16 eps: sums of a thousand terms one after another, or cut off as tensor cores cut them, are
    off by ten, and PyTorch's own may happen to be in a better order.
    """
    assert got.dtype == low.dtype, f"{name}: {got.dtype}, PyTorch gives {low.dtype}"
    assert got.numel() > 0, f"{name}: nothing to compare"
    found = compare(got, low, ref, Tolerance(factor, floor=16.0 if got.is_cuda else 1.0))
    assert found.right, f"{name}: {found.detail}"
