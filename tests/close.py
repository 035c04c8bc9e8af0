"""The tolerance rule of every numeric test."""

from __future__ import annotations

from torch import Tensor

from jasper_fast.selfcheck.tolerance import Tolerance, compare


def assert_close(name: str, got: Tensor, low: Tensor, ref: Tensor, factor: float = 2.0) -> None:
    """The error of `got` against the fp64 `ref` may be `factor` times that of PyTorch's own low-precision `low`, plus
    one eps of low's dtype.

    In fp32 on a GPU it is plus 16 eps: a sequential sum of a thousand terms, or a truncated one as in tensor cores, is
    off by ten eps, and PyTorch may happen to sum in a better order.
    """
    assert got.dtype == low.dtype, f"{name}: {got.dtype}, PyTorch gives {low.dtype}"
    assert got.numel() > 0, f"{name}: nothing to compare"
    found = compare(got, low, ref, Tolerance(factor, floor=16.0 if got.is_cuda else 1.0))
    assert found.right, f"{name}: {found.detail}"
