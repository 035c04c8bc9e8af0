"""The gradient of a depthwise conv's weight.

    dw[k, c] = sum_(n,t) x[n, t*stride + k*dilation - padding, c] * dy[n, t, c]

A program owns four taps of BLOCK_C channels over a share of the utterances, so that each load of dy serves four
products. The fp32 partial results (shares, K, C) are added in a fixed order by conv1d's merge kernel.
"""

import triton
import triton.language as tl

TAPS = 4  # taps of a program


@triton.jit
def _add_tap(acc, dy, x_n, row, limit, offs_c, mask_c, x_row):
    inside = (row >= 0) & (row < limit)
    x = tl.load(x_n + row[:, None] * x_row + offs_c[None, :], mask=inside[:, None] & mask_c[None, :], other=0.0)
    return acc + dy * x.to(tl.float32)


@triton.jit
def _store_tap(acc, part_ptr, k, taps, C, offs_c, mask_c):
    # The interpreter of Triton 3.9 takes no mask that combines a block with a scalar condition, hence tl.full.
    tl.store(part_ptr + k * C + offs_c, tl.sum(acc, 0), mask=mask_c & (tl.full(offs_c.shape, k, tl.int32) < taps))


@triton.jit(
    do_not_specialize=[
        "batch", "frames", "frames_out", "groups", "x_row", "x_item", "dy_row", "dy_item", "taps", "padding",
        "dilation", "share", "in_lengths_ptr", "out_lengths_ptr",
    ]
)  # fmt: skip
def depthwise_wgrad_kernel(
    x_ptr, dy_ptr, part_ptr, in_lengths_ptr, out_lengths_ptr,
    batch, frames, frames_out, groups, x_row, x_item, dy_row, dy_item, taps, padding, dilation, share,
    STRIDE: tl.constexpr, HAS_IN_LENGTHS: tl.constexpr, HAS_OUT_LENGTHS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = groups * VEC
    c_blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = (pid % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    pid = pid // c_blocks
    tap_blocks = tl.cdiv(taps, 4)
    k = (pid % tap_blocks) * 4
    part = pid // tap_blocks
    shift = k * dilation - padding
    acc0 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    acc1 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    acc2 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    acc3 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    first = part * share
    for n in range(first, tl.minimum(first + share, batch)):
        limit, end = frames, frames_out
        if HAS_IN_LENGTHS:
            limit = tl.minimum(tl.load(in_lengths_ptr + n).to(tl.int32), limit)
        if HAS_OUT_LENGTHS:
            end = tl.minimum(tl.load(out_lengths_ptr + n).to(tl.int32), end)
        # outputs at which at least one of the four taps has an input
        begin = tl.cdiv(tl.maximum(-(shift + 3 * dilation), 0), STRIDE)
        end = tl.minimum(end, tl.cdiv(tl.maximum(limit - shift, 0), STRIDE))
        x_n = x_ptr + tl.cast(n, tl.int64) * x_item * VEC
        dy_n = dy_ptr + tl.cast(n, tl.int64) * dy_item * VEC
        for t0 in range(begin, end, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            mask = (t < end)[:, None] & mask_c[None, :]
            dy = tl.load(dy_n + t[:, None] * (dy_row * VEC) + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            row = t * STRIDE + shift
            acc0 = _add_tap(acc0, dy, x_n, row, limit, offs_c, mask_c, x_row * VEC)
            acc1 = _add_tap(acc1, dy, x_n, row + dilation, limit, offs_c, mask_c, x_row * VEC)
            acc2 = _add_tap(acc2, dy, x_n, row + 2 * dilation, limit, offs_c, mask_c, x_row * VEC)
            acc3 = _add_tap(acc3, dy, x_n, row + 3 * dilation, limit, offs_c, mask_c, x_row * VEC)
    base = part_ptr + part.to(tl.int64) * taps * C
    _store_tap(acc0, base, k, taps, C, offs_c, mask_c)
    _store_tap(acc1, base, k + 1, taps, C, offs_c, mask_c)
    _store_tap(acc2, base, k + 2, taps, C, offs_c, mask_c)
    _store_tap(acc3, base, k + 3, taps, C, offs_c, mask_c)
