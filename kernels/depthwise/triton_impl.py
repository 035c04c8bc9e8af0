"""The Triton face of the depthwise conv (NVIDIA sm_80 and later; on a CPU through Triton's interpreter).

This file has the launches and checks; the kernels are in triton_sum.py and triton_wgrad.py. Activations are fp16, bf16
or fp32 and sums are fp32. No tensor core is used, so fp32 is never rounded to TF32.
"""

import torch
import triton
from torch import Tensor

from jasper_fast.kernels import launch, tables
from jasper_fast.kernels.conv1d.gpu_shared import check_made, check_offsets, sizes
from jasper_fast.kernels.conv1d.triton_tiles import transpose_meta
from jasper_fast.kernels.conv1d.triton_wgrad import conv1d_wgrad_merge_kernel
from jasper_fast.kernels.depthwise.triton_sum import depthwise_sum_kernel
from jasper_fast.kernels.depthwise.triton_wgrad import TAPS, depthwise_wgrad_kernel
from jasper_fast.kernels.layout import empty_ntc
from jasper_fast.kernels.operands import FULL, Geometry, Lengths

FEW_ROWS = 4096  # with fewer rows N*T', tiles are smaller, so that there are enough programs to fill a GPU
SHARES = 8  # maximum number of shares into which the weight gradient divides the utterances of a batch


def pack_once(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `weight` (C, 1, K) as the kernel reads it: (K, C), and fp32 whatever the network's `dtype` is."""
    c, _, k = weight.shape
    return torch.empty((k, c), dtype=torch.float32, device=weight.device).copy_(weight.detach()[:, 0].t())


def forward(x: Tensor, weight: Tensor, geometry: Geometry, lengths: Lengths = FULL) -> Tensor:
    """Returns y (N, C, T'), the conv of `x` (N, C, T) in NTC memory with `weight` (C, 1, K), masked by `lengths`.

    Equivalent to `F.conv1d(x.masked_fill(t >= lengths.before, 0), weight, None, *geometry, groups=C)`, with zeros at
    t >= lengths.after.
    """
    n, c, t = x.shape
    y = empty_ntc(n, c, max(geometry.frames(t, weight.shape[2]), 0), like=x)
    into(y.transpose(1, 2), x.transpose(1, 2), pack_once(weight, x.dtype), geometry, lengths)
    return y


def into(out: Tensor, x: Tensor, packed: Tensor, geometry: Geometry, lengths: Lengths = FULL) -> None:
    """Writes `forward` of `x` (N, T, C) and a pack into `out` (N, T', C).

    Both need unit channel stride; their other strides are free. `lengths.made` receives the output lengths and takes
    the place of `lengths.after`. Raises ValueError for `made` without `before` or with `after`.
    """
    check_made(lengths)
    _sum(out, x, packed, geometry, lengths, up=1, flipped=False)


def dgrad(dy: Tensor, weight: Tensor, t: int, geometry: Geometry, lengths: Lengths = FULL) -> Tensor:
    """Returns the gradient of x, (N, C, T = `t`), from `dy` (N, C, T') in NTC memory: a conv with the taps reversed."""
    (stride, padding, dilation), k = geometry, weight.shape[2]
    dx = empty_ntc(dy.shape[0], dy.shape[1], t, like=dy)
    _sum(
        dx.transpose(1, 2), dy.transpose(1, 2), pack_once(weight, dy.dtype),
        Geometry(1, dilation * (k - 1) - padding, dilation), Lengths(lengths.after, lengths.before),
        up=stride, flipped=True,
    )  # fmt: skip
    return dx


def _sum(y: Tensor, x: Tensor, w: Tensor, geometry: Geometry, lengths: Lengths, *, up: int, flipped: bool) -> None:
    _check(x, y)
    (n, t, c), t_out = x.shape, y.shape[1]
    if w.shape[1] != c or w.dtype != torch.float32 or not w.is_contiguous():
        raise ValueError(f"the pack of a depthwise weight must be (K, {c}) fp32, got {tuple(w.shape)} {w.dtype}")
    if x.numel() == 0 or y.numel() == 0:
        y.zero_()
        return
    few = n * t_out < FEW_ROWS
    block_t, block_c = 16 if few else 64, min(128 // x.element_size(), max(16, triton.next_power_of_2(c)))
    t_blocks, masked = triton.cdiv(t_out, block_t), lengths.masked and lengths[:2] != (None, None)
    vec, (groups, x_row, x_item), (_, y_row, y_item) = sizes(x, y)
    launch.run(
        depthwise_sum_kernel, (n * t_blocks * triton.cdiv(c, block_c),), x,
        x, w, y, *lengths[:3], t, t_out, groups, x_row, x_item, y_row, y_item, w.shape[0], geometry.padding,
        geometry.dilation, t_blocks,
        STRIDE=geometry.stride, UP=up, FLIPPED=flipped, HAS_IN_LENGTHS=lengths.before is not None,
        HAS_OUT_LENGTHS=masked and lengths.after is not None, HAS_LENGTHS_OUT=lengths.made is not None,
        HAS_MASK=masked, VEC=vec,
        BLOCK_T=block_t, BLOCK_C=block_c, num_warps=2 if few else 4,
    )  # fmt: skip


def wgrad(
    x: Tensor, dy: Tensor, k: int, geometry: Geometry, lengths: Lengths = FULL, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns the gradient of the weight, (C, 1, K = `k`), from `x` (N, C, T) and `dy` (N, C, T').

    x counts as zero at t >= `lengths.before`, and dy at t >= `lengths.after`. Sums are fp32; the result is in `dtype`
    (default: that of `x`).
    """
    rows, dy_rows, (stride, padding, dilation) = x.transpose(1, 2), dy.transpose(1, 2), geometry
    _check(rows, dy_rows)
    n, t, c = rows.shape
    dw = torch.empty((c, 1, k), dtype=dtype or x.dtype, device=x.device)
    if x.numel() == 0 or dy.numel() == 0:
        return dw.zero_()
    block_c = min(128 // x.element_size(), max(16, triton.next_power_of_2(c)))
    share = triton.cdiv(n, min(n, SHARES))
    shares = triton.cdiv(n, share)
    parts = torch.empty((shares, k, c), dtype=torch.float32, device=x.device)
    vec, (groups, x_row, x_item), (_, dy_row, dy_item) = sizes(rows, dy_rows)
    launch.run(
        depthwise_wgrad_kernel, (shares * triton.cdiv(k, TAPS) * triton.cdiv(c, block_c),), x,
        x, dy, parts, *lengths[:2], n, t, dy.shape[2], groups, x_row, x_item, dy_row, dy_item, k, padding, dilation,
        share, STRIDE=stride, HAS_IN_LENGTHS=lengths.before is not None, HAS_OUT_LENGTHS=lengths.after is not None,
        VEC=vec, BLOCK_T=min(64, 2048 // block_c), BLOCK_C=block_c, num_warps=4, num_stages=2,
    )  # fmt: skip
    meta = transpose_meta(k) | {"BLOCK_I": 1}
    launch.run(
        conv1d_wgrad_merge_kernel, (triton.cdiv(c, meta["BLOCK_O"]),), x, parts, dw, shares, k, 1, c,
        num_warps=4, **meta,
    )  # fmt: skip
    return dw


def _check(x: Tensor, y: Tensor) -> None:
    """Raises TypeError or ValueError for operands (N, T, C) that the kernels do not take."""
    if x.dtype not in tables.DTYPES or x.dtype != y.dtype:
        raise TypeError(f"the triton face takes one of fp32, fp16, bf16 for all, got {x.dtype} and {y.dtype}")
    if (x.shape[0], x.shape[2]) != (y.shape[0], y.shape[2]):
        raise ValueError(f"x and y need equal N and C, got (N, T, C) = {tuple(x.shape)} and {tuple(y.shape)}")
    check_offsets(x, y)
