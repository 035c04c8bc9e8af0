"""The tolerance rule of every numeric test."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(name: str, got: Tensor, low: Tensor, ref: Tensor, factor: float = 2.0) -> None:
    """`got` may be at most `factor` times as far from the fp64 `ref` as PyTorch's own low-precision `low` is.

    In the max and in the RMS norm, plus a floor of one eps of low's dtype times the norm of `ref`. The max sees one
    wrong element, the RMS a small error everywhere, and a NaN fails because every comparison with it is false. In fp32
    on a GPU the floor is 16 eps: sums of a thousand terms one after another, or cut off as tensor cores cut them, are
    off by ten, and PyTorch's own may happen to be in a better order.
    """
    assert got.shape == ref.shape == low.shape, f"{name}: shapes {got.shape}, {low.shape}, {ref.shape}"
    assert got.dtype == low.dtype, f"{name}: {got.dtype}, PyTorch gives {low.dtype}"
    assert got.numel() > 0, f"{name}: nothing to compare"
    got, low, ref = got.detach(), low.detach(), ref.detach().double()
    eps = torch.finfo(low.dtype).eps * (16 if got.is_cuda and low.dtype == torch.float32 else 1)
    got, low = got.double(), low.double()
    for norm in (_max, _rms):
        ours, theirs, floor = norm(got - ref), norm(low - ref), eps * norm(ref)
        assert ours <= factor * theirs + floor, (
            f"{name}: {norm.__name__[1:]} error {ours:.3e}, PyTorch {theirs:.3e}, floor {floor:.3e}"
        )


def _max(e: Tensor) -> Tensor:
    return e.abs().max()


def _rms(e: Tensor) -> Tensor:
    return e.square().mean().sqrt()
