"""NTC memory: a logical (N, C, T) tensor whose strides are (T*C, 1, C), the 1D counterpart of channels_last."""

from __future__ import annotations

import torch
from torch import Tensor


def ntc(x: Tensor) -> Tensor:
    """`x` (N, C, T) with NTC memory; copies only if its memory is in another order.

    Equivalent to `x.transpose(1, 2).contiguous().transpose(1, 2)`.
    """
    if x.numel() == 0:  # PyTorch calls it contiguous, whatever its strides are
        return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_ntc(n: int, c: int, t: int, *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (N, C, T) tensor with NTC memory, on the device and by default in the dtype of `like`."""
    return torch.empty((n, t, c), dtype=dtype or like.dtype, device=like.device).transpose(1, 2)


def padding(lengths: Tensor, t: int) -> Tensor:
    """Which of `t` frames lie at t >= `lengths` (N,): bool (N, 1, T), to be broadcast over channels."""
    return (torch.arange(t, device=lengths.device) >= lengths[:, None])[:, None]


def mask(x: Tensor, lengths: Tensor | None, value: float = 0.0) -> Tensor:
    """`x` (N, C, T) with `value` at all t >= `lengths` (N,); `x` itself if `lengths` is None."""
    return x if lengths is None else x.masked_fill(padding(lengths, x.shape[2]), value)


def rows(x: Tensor) -> Tensor:
    """The (N*T, C) matrix view of an NTC tensor (N, C, T): one row a frame."""
    n, c, t = x.shape
    return x.transpose(1, 2).reshape(n * t, c)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums over the rows of `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b of two matrices in their dtype. fp16 on a CPU goes through fp32, in which ATen is 5 to 30 times faster."""
    if a.dtype != torch.float16 or a.device.type != "cpu":
        return torch.mm(a, b, out=out)
    wide = product(a, b)
    return wide.to(a.dtype) if out is None else out.copy_(wide)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices of one dtype, summed and returned in `wide_dtype`."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = wide_dtype(a)
    return a.to(wide) @ b.to(wide)
