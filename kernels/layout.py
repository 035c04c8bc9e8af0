"""NTC memory order: a tensor of shape (N, C, T) with strides (T*C, 1, C), the 1D counterpart of channels_last.

This module also has the matrix products that several ops share.
"""

import torch
from torch import Tensor


def ntc(x: Tensor) -> Tensor:
    """Returns `x` (N, C, T) in NTC memory order. It is copied only if its memory is in another order.

    Equivalent to `x.transpose(1, 2).contiguous().transpose(1, 2)`.
    """
    if x.numel() == 0:  # for PyTorch an empty tensor is contiguous whatever its strides are
        return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_ntc(n: int, c: int, t: int, *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an uninitialised NTC tensor (N, C, T) on the device of `like`, by default in its dtype."""
    return torch.empty((n, t, c), dtype=dtype or like.dtype, device=like.device).transpose(1, 2)


def empty_fp32(count: int, *shape: int, like: Tensor) -> list[Tensor]:
    """Returns `count` uninitialised fp32 tensors of this shape on the device of `like`.

    Each has its own memory, because outputs of a registered op must not share any.
    """
    return [torch.empty(shape, dtype=torch.float32, device=like.device) for _ in range(count)]


def padding(lengths: Tensor, t: int) -> Tensor:
    """Returns which of `t` frames are padding, at or after `lengths` (N,): bool (N, 1, T), for all channels."""
    return (torch.arange(t, device=lengths.device) >= lengths[:, None])[:, None]


def mask(x: Tensor, lengths: Tensor | None, value: float = 0.0) -> Tensor:
    """Returns `x` (N, C, T) with `value` at all frames t >= `lengths` (N,), or `x` itself if `lengths` is None."""
    return x if lengths is None else x.masked_fill(padding(lengths, x.shape[2]), value)


def rows(x: Tensor) -> Tensor:
    """Returns the matrix view (N*T, C) of an NTC tensor (N, C, T): one row per frame."""
    return x.transpose(1, 2).flatten(0, 1)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of statistics and sums over the rows of `x`: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Returns a @ b in the matrices' dtype. On a CPU fp16 is computed in fp32, where ATen is 5 to 30 times faster."""
    if a.dtype != torch.float16 or a.device.type != "cpu":
        return torch.mm(a, b, out=out)
    wide = product(a, b)
    return wide.to(a.dtype) if out is None else out.copy_(wide)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b of two matrices of one dtype, summed and returned in `wide_dtype(a)`."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = wide_dtype(a)
    return a.to(wide) @ b.to(wide)
