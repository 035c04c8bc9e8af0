"""The depthwise conv, and the gradient of its input, which is a depthwise conv too.

    y[n, t, c] = sum_k w[k, c] * x[n, (t*STRIDE + k*dilation - padding) / UP, c]

The sum is over those k for which the row of x is a whole number. FLIPPED reverses the taps. In forward UP is 1.
In the gradient UP is the stride of the conv, and STRIDE is 1. A program owns BLOCK_T frames of one utterance by BLOCK_C
channels. It reads x once for each tap, only the first time from memory, and sums in fp32. It leaves out taps at which
all its inputs lie outside of x.
"""

import triton
import triton.language as tl

from jasper_fast.kernels.conv1d.triton_loop import out_frames


@triton.jit(
    do_not_specialize=[
        "frames", "frames_out", "groups", "x_row", "x_item", "y_row", "y_item", "taps", "padding", "dilation",
        "t_blocks", "in_lengths_ptr", "out_lengths_ptr", "lengths_out_ptr",
    ]
)  # fmt: skip
def depthwise_sum_kernel(
    x_ptr, w_ptr, y_ptr, in_lengths_ptr, out_lengths_ptr, lengths_out_ptr,
    frames, frames_out, groups, x_row, x_item, y_row, y_item, taps, padding, dilation, t_blocks,
    STRIDE: tl.constexpr, UP: tl.constexpr, FLIPPED: tl.constexpr, HAS_IN_LENGTHS: tl.constexpr,
    HAS_OUT_LENGTHS: tl.constexpr, HAS_LENGTHS_OUT: tl.constexpr, HAS_MASK: tl.constexpr, VEC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """HAS_MASK: the lengths mask x and y. Without HAS_MASK they only serve to compute lengths_out."""
    # sizes and strides of activations are in units of VEC elements, which tells the compiler their alignment
    C = groups * VEC
    c_blocks = tl.cdiv(C, BLOCK_C)
    tile = (tl.program_id(0) // c_blocks).to(tl.int64)
    c0 = (tl.program_id(0) % c_blocks) * BLOCK_C
    n = tile // t_blocks
    t0 = (tile % t_blocks).to(tl.int32) * BLOCK_T
    limit, end = frames, frames_out
    if HAS_IN_LENGTHS:
        length = tl.load(in_lengths_ptr + n)
        if HAS_LENGTHS_OUT:
            length = tl.minimum(tl.maximum(length, 0), frames)
            new_length = out_frames(length, taps, STRIDE, padding, dilation)
            tl.store(lengths_out_ptr + n, new_length, mask=(t0 == 0) & (c0 == 0))
            if HAS_MASK:
                end = tl.minimum(new_length.to(tl.int32), end)
        if HAS_MASK:
            limit = tl.minimum(length.to(tl.int32), limit)
    if HAS_OUT_LENGTHS:
        end = tl.minimum(tl.load(out_lengths_ptr + n).to(tl.int32), end)

    rows = (limit - 1) * UP + 1  # rows of x, with UP - 1 zeros between any two
    origin = t0 * STRIDE - padding
    first = tl.maximum(-(origin + (BLOCK_T - 1) * STRIDE), 0)
    k_begin = (first + dilation - 1) // dilation
    k_end = tl.minimum(taps, tl.maximum(rows - 1 - origin + dilation, 0) // dilation)
    if (limit <= 0) | (t0 >= end):
        k_end = 0
    offs_t, offs_c = tl.arange(0, BLOCK_T), c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    x_n = x_ptr + n * x_item * VEC
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in range(k_begin, k_end):
        row = origin + offs_t * STRIDE + k * dilation
        inside = (row >= 0) & (row < rows)
        if UP > 1:
            inside = inside & (row % UP == 0)
            row = row // UP
        tap = taps - 1 - k if FLIPPED else k
        w = tl.load(w_ptr + tap * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        offs = row[:, None] * (x_row * VEC) + offs_c[None, :]
        x = tl.load(x_n + offs, mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        acc += x * w[None, :]
    offs_t = t0 + offs_t
    acc = tl.where((offs_t < end)[:, None], acc, 0.0)
    offs = offs_t[:, None] * (y_row * VEC) + offs_c[None, :]
    mask = (offs_t < frames_out)[:, None] & mask_c[None, :]
    tl.store(y_ptr + n * y_item * VEC + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)
