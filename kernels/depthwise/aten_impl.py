"""The depthwise conv through ATen: conv2d with groups over a channels-last view of the same memory.

This face serves every device and dtype for which we have no faster kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.kernels.layout import empty_ntc, mask, ntc
from jasper_fast.kernels.operands import FULL, Geometry, Lengths


def forward(
    x: Tensor, weight: Tensor, geometry: Geometry, lengths: Lengths = FULL, packed: Tensor | None = None
) -> Tensor:
    """Returns y (N, C, T'), the conv of `x` (N, C, T) with `weight` (C, 1, K), masked by `lengths`."""
    x = ntc(mask(x, lengths.before)).unsqueeze(2)
    y = F.conv2d(x, weight.to(x.dtype).unsqueeze(2), None, *_in_2d(geometry), weight.shape[0]).squeeze(2)
    return ntc(mask(y, lengths.after))


def pack_once(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a copy of `weight` (C, 1, K) in the dtype of the activations, for many calls of `into`."""
    return weight.to(dtype, copy=True)


def into(out: Tensor, x: Tensor, packed: Tensor, geometry: Geometry, lengths: Lengths = FULL) -> None:
    """Writes `forward` of `x` (N, T, C) and a weight from `pack_once` into `out` (N, T', C).

    `lengths.made` receives the output lengths and is then used instead of `lengths.after`.
    """
    if lengths.made is not None:
        frames = geometry.frames(lengths.before.clamp(0, x.shape[1]), packed.shape[2])
        lengths.made.copy_(frames.clamp_(min=0))
        lengths = Lengths(lengths.before, lengths.made) if lengths.masked else FULL
    out.copy_(forward(x.transpose(1, 2), packed, geometry, lengths).transpose(1, 2))


def dgrad(
    dy: Tensor, weight: Tensor, t: int, geometry: Geometry, lengths: Lengths = FULL, packed: Tensor | None = None
) -> Tensor:
    """Returns the gradient of x, (N, C, T = `t`), from `dy` (N, C, T'), masked by `lengths`."""
    x = empty_ntc(dy.shape[0], dy.shape[1], t, like=dy)  # only its shape and memory format are used
    dx = _backward(ntc(mask(dy, lengths.after)), x, weight.to(dy.dtype), geometry, (True, False))[0]
    return ntc(mask(dx.squeeze(2), lengths.before))


def wgrad(
    x: Tensor, dy: Tensor, k: int, geometry: Geometry, lengths: Lengths = FULL, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns the gradient of the weight, (C, 1, K = `k`), in `dtype` (default: that of `x`)."""
    weight = dy.new_empty((x.shape[1], 1, k))
    masked = ntc(mask(dy, lengths.after)), ntc(mask(x, lengths.before))
    return _backward(*masked, weight, geometry, (False, True))[1].squeeze(2).to(dtype or x.dtype)


def _in_2d(geometry: Geometry) -> list[tuple[int, int]]:
    return [(1, geometry.stride), (0, geometry.padding), (1, geometry.dilation)]


def _backward(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: tuple[bool, bool]):
    return torch.ops.aten.convolution_backward(
        dy.unsqueeze(2), x.unsqueeze(2), weight.unsqueeze(2), None,
        *_in_2d(geometry), False, (0, 0), weight.shape[0], (*which, False),
    )  # fmt: skip
