"""The depthwise conv through ATen: conv2d with groups over a channels-last view of the same memory.

This face serves every device and dtype for which we have no faster kernel.
"""

import torch
from torch import Tensor

from jasper_fast.kernels.conv1d.aten_impl import conv2d, conv2d_backward
from jasper_fast.kernels.conv1d.gpu_shared import check_made
from jasper_fast.kernels.layout import empty_ntc, mask, ntc
from jasper_fast.kernels.operands import FULL, Geometry, Lengths


def forward(x: Tensor, weight: Tensor, geometry: Geometry, lengths: Lengths = FULL) -> Tensor:
    """Returns y (N, C, T'), the conv of `x` (N, C, T) with `weight` (C, 1, K).

    x counts as zero at t >= `lengths.before`, and y is zero at t >= `lengths.after`.
    """
    y = conv2d(ntc(mask(x, lengths.before)), weight.to(x.dtype), geometry, weight.shape[0])
    return ntc(mask(y, lengths.after))


def pack_once(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a copy of `weight` (C, 1, K) in the dtype of the activations, for many calls of `into`."""
    return weight.to(dtype, copy=True)


def into(out: Tensor, x: Tensor, packed: Tensor, geometry: Geometry, lengths: Lengths = FULL) -> None:
    """Writes `forward` of `x` (N, T, C) and a weight from `pack_once` into `out` (N, T', C).

    `lengths.made` receives the output lengths and takes the place of `lengths.after`. Raises ValueError for `made`
    without `before` or with `after`.
    """
    check_made(lengths)
    if lengths.made is not None:
        lengths.made.copy_(geometry.frames(lengths.before.clamp(0, x.shape[1]), packed.shape[2])).clamp_(min=0)
        lengths = lengths._replace(after=lengths.made)
    out.copy_(forward(x.transpose(1, 2), packed, geometry, lengths if lengths.masked else FULL).transpose(1, 2))


def dgrad(dy: Tensor, weight: Tensor, t: int, geometry: Geometry, lengths: Lengths = FULL) -> Tensor:
    """Returns the gradient of x, (N, C, T = `t`), from `dy` (N, C, T').

    dy counts as zero at t >= `lengths.after`; the result is zero at t >= `lengths.before`.
    """
    x = empty_ntc(dy.shape[0], dy.shape[1], t, like=dy)  # only its shape and memory format are used
    grads = conv2d_backward(
        ntc(mask(dy, lengths.after)), x, weight.to(dy.dtype), geometry, (True, False), weight.shape[0]
    )
    return ntc(mask(grads[0].squeeze(2), lengths.before))


def wgrad(
    x: Tensor, dy: Tensor, k: int, geometry: Geometry, lengths: Lengths = FULL, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns the gradient of the weight, (C, 1, K = `k`), in `dtype` (default: that of `x`)."""
    dy, x = ntc(mask(dy, lengths.after)), ntc(mask(x, lengths.before))
    dw = conv2d_backward(dy, x, dy.new_empty((x.shape[1], 1, k)), geometry, (False, True), x.shape[1])[1]
    return dw.squeeze(2).to(dtype or x.dtype)
