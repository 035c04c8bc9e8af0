"""The CPU face of the depthwise conv: threaded C++ kernels (csrc/cpu/isa/depthwise.cpp), one set per instruction set.

Activations are fp32, fp16 or bf16; sums and weights are fp32. Results are bit-identical for any number of threads. The
output of an utterance does not depend on its batch or its padding.
"""

import torch
from torch import Tensor

from jasper_fast.kernels import native
from jasper_fast.kernels.operands import FULL, Geometry, Lengths

COLUMNS = 32  # channels per block of the pack


def pack(weight: Tensor, *, flipped: bool = False) -> Tensor:
    """Packs `weight` (C, 1, K) as the kernel reads it: (ceil(C / 32), K, 32) fp32. flipped: the taps are reversed."""
    c, _, k = weight.shape
    packed = torch.empty((-(-c // COLUMNS), k, COLUMNS), dtype=torch.float32)
    native.cpu().depthwise_pack(weight.detach().float().contiguous(), flipped, packed)
    return packed


def pack_once(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Packs `weight` (C, 1, K) for many calls of `into`. The pack is fp32, whatever the network's `dtype` is."""
    return pack(weight)


def forward(x: Tensor, weight: Tensor, geometry: Geometry, lengths: Lengths = FULL) -> Tensor:
    """Returns y (N, C, T'), the conv of `x` (N, C, T) in NTC memory with `weight` (C, 1, K), masked by `lengths`.

    Equivalent to `F.conv1d(x.masked_fill(t >= lengths.before, 0), weight, None, *geometry, groups=C)`, with zeros at
    t >= lengths.after.
    """
    n, c, t = x.shape
    out = torch.empty((n, max(geometry.frames(t, weight.shape[2]), 0), c), dtype=x.dtype)
    into(out, x.transpose(1, 2), pack(weight), geometry, lengths)
    return out.transpose(1, 2)


def into(out: Tensor, x: Tensor, packed: Tensor, geometry: Geometry, lengths: Lengths = FULL) -> None:
    """Writes `forward` of `x` (N, T, C) and a pack into `out` (N, T', C).

    Both need unit channel stride; their other strides are free. Raises ValueError for `lengths.made` and for
    `masked=False`, which this face does not support.
    """
    if lengths.made is not None or not lengths.masked:
        raise ValueError("the cpu face always masks and does not compute output lengths: give it lengths.after")
    native.cpu().depthwise_sum(
        x, packed, packed.shape[1], geometry.stride, geometry.dilation, geometry.padding, 1,
        lengths.before, lengths.after, out,
    )  # fmt: skip


def dgrad(dy: Tensor, weight: Tensor, t: int, geometry: Geometry, lengths: Lengths = FULL) -> Tensor:
    """Returns the gradient of x, (N, C, T = `t`), from `dy` (N, C, T') in NTC memory.

    The gradient is a conv of dy with the taps reversed, with `stride - 1` rows of zeros between the rows of dy.
    """
    (stride, padding, dilation), k = geometry, weight.shape[2]
    dx = torch.empty((dy.shape[0], t, dy.shape[1]), dtype=dy.dtype)
    native.cpu().depthwise_sum(
        dy.transpose(1, 2), pack(weight, flipped=True), k, 1, dilation, dilation * (k - 1) - padding, stride,
        lengths.after, lengths.before, dx,
    )  # fmt: skip
    return dx.transpose(1, 2)


def wgrad(
    x: Tensor, dy: Tensor, k: int, geometry: Geometry, lengths: Lengths = FULL, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns the gradient of the weight, (C, 1, K = `k`), from `x` (N, C, T) and `dy` (N, C, T').

    x counts as zero at t >= `lengths.before`, and dy at t >= `lengths.after`. Sums are fp32; the result is in `dtype`
    (default: that of `x`).
    """
    dw = torch.empty((x.shape[1], 1, k), dtype=torch.float32)
    native.cpu().depthwise_wgrad(
        x.transpose(1, 2), dy.transpose(1, 2), geometry.stride, geometry.dilation, geometry.padding,
        lengths.before, lengths.after, dw,
    )  # fmt: skip
    return dw.to(dtype or x.dtype)
