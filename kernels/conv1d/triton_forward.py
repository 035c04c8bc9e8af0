"""conv1d forward in training, if needed with the statistics of its output.

    y[n, t, :] = sum_k x[n, t*stride + k*dilation - padding, :] @ w[k]

A program owns BLOCK_T frames of one utterance by BLOCK_N output channels. It reads its frames of x taps/stride times
(only the first time from memory) and its channels of w once, and writes y once. With HAS_STATS it also writes the mean
and M2 of its fp32 accumulators to (tiles, C_out) partial results. A second kernel merges them in a fixed order (Chan's
formula), so the statistics need no pass over y. A tile whose inputs all lie beyond the length of its utterance is not
computed: its y, mean and M2 are zero.
"""

import triton
import triton.language as tl

from jasper_fast.kernels.conv1d.triton_loop import add_taps, halves


@triton.jit
def _store_y(
    acc, o0, n, t0, tile, y_ptr, part_mean_ptr, part_m2_ptr, frames_out, c_out, y_row, y_item,
    HAS_STATS: tl.constexpr, VEC_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the tile of y at row t0 and channel o0 of utterance n, and its mean and M2."""
    offs_t = t0 + tl.arange(0, BLOCK_T)
    offs_o = o0 + tl.arange(0, BLOCK_N)
    rows = offs_t < frames_out
    if HAS_STATS:
        mask_o = offs_o < c_out
        count = tl.minimum(frames_out - t0, BLOCK_T).to(tl.float32)
        mean = tl.sum(tl.where(rows[:, None], acc, 0.0), 0) / count
        spread = tl.where(rows[:, None], acc - mean[None, :], 0.0)
        tl.store(part_mean_ptr + tile * c_out + offs_o, mean, mask=mask_o)
        tl.store(part_m2_ptr + tile * c_out + offs_o, tl.sum(spread * spread, 0), mask=mask_o)
    mask_o = offs_o < (c_out // VEC_OUT) * VEC_OUT  # offs_o < c_out, written so that the compiler sees the alignment
    offs = offs_t[:, None] * (y_row * VEC_OUT) + offs_o[None, :]
    tl.store(y_ptr + n * y_item * VEC_OUT + offs, acc.to(y_ptr.dtype.element_ty), mask=rows[:, None] & mask_o[None, :])


@triton.jit(
    do_not_specialize=[
        "frames", "frames_out", "groups_in", "x_row", "x_item", "c_out", "y_row", "y_item", "taps", "padding",
        "dilation", "t_blocks", "lengths_ptr",
    ]
)  # fmt: skip
def conv1d_forward_kernel(
    x_ptr, x_desc, w_ptr, w_desc, y_ptr, part_mean_ptr, part_m2_ptr, lengths_ptr,
    frames, frames_out, groups_in, x_row, x_item, c_out, y_row, y_item, taps, padding, dilation, t_blocks,
    STRIDE: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STATS: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
    IS_CLEAN: tl.constexpr,
    VEC_IN: tl.constexpr, VEC_OUT: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # sizes and strides of activations are in units of VEC elements, which tells the compiler their alignment
    C = groups_in * VEC_IN
    n_blocks = tl.cdiv(c_out, BLOCK_N)
    tile = (tl.program_id(0) // n_blocks).to(tl.int64)  # neighbouring programs share frames of x in L2
    o0 = (tl.program_id(0) % n_blocks) * BLOCK_N
    n = tile // t_blocks
    t0 = (tile % t_blocks).to(tl.int32) * BLOCK_T
    limit = frames
    if HAS_LENGTHS:
        limit = tl.minimum(tl.load(lengths_ptr + n).to(tl.int32), limit)
    steps = taps * tl.cdiv(C, BLOCK_K)
    if (t0 * STRIDE - padding >= limit) | (limit <= 0):
        steps = 0
    acc = add_taps(
        tl.zeros([BLOCK_T, BLOCK_N], tl.float32), x_ptr + n * x_item * VEC_IN, x_desc, w_ptr, w_desc, n, t0, limit, o0,
        0, steps, frames, C, C, tl.cdiv(c_out, PAD) * PAD, x_row * VEC_IN, 1, taps, padding, dilation, STRIDE,
        HAS_DESCRIPTORS, IS_CLEAN, False, False, UPCAST, PRECISION, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BLOCK_T * BLOCK_N > 128 * 128 and HAS_STATS:  # by halves: the statistics of the whole tile would spill registers
        left, right = halves(acc, BLOCK_T, BLOCK_N)
        for half in tl.static_range(2):
            _store_y(
                left if half == 0 else right, o0 + half * (BLOCK_N // 2), n, t0, tile, y_ptr, part_mean_ptr,
                part_m2_ptr, frames_out, c_out, y_row, y_item, HAS_STATS, VEC_OUT, BLOCK_T, BLOCK_N // 2,
            )  # fmt: skip
    else:
        _store_y(
            acc, o0, n, t0, tile, y_ptr, part_mean_ptr, part_m2_ptr, frames_out, c_out, y_row, y_item,
            HAS_STATS, VEC_OUT, BLOCK_T, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["frames_out", "t_blocks", "tiles", "c_out"])
def conv1d_stats_merge_kernel(
    part_mean_ptr, part_m2_ptr, mean_ptr, m2_ptr, frames_out, t_blocks, tiles, c_out,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merges the mean and M2 of all tiles (Chan's formula), BLOCK_G tiles at a time in a fixed order."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < c_out
    seen = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for g0 in range(0, tiles, BLOCK_G):
        offs_g = g0 + tl.arange(0, BLOCK_G)
        mask = (offs_g < tiles)[:, None] & mask_c[None, :]
        offs = offs_g.to(tl.int64)[:, None] * c_out + offs_c[None, :]
        part_mean = tl.load(part_mean_ptr + offs, mask=mask, other=0.0)
        part_m2 = tl.load(part_m2_ptr + offs, mask=mask, other=0.0)
        weight = tl.minimum(frames_out - (offs_g % t_blocks) * BLOCK_T, BLOCK_T)
        weight = tl.where(offs_g < tiles, weight, 0).to(tl.float32)
        count = tl.sum(weight, 0)
        group_mean = tl.sum(weight[:, None] * part_mean, 0) / count
        spread = part_mean - group_mean[None, :]
        group_m2 = tl.sum(part_m2 + weight[:, None] * spread * spread, 0)
        delta = group_mean - mean
        share = count / (seen + count)
        mean += delta * share
        m2 += group_m2 + delta * delta * (seen * share)
        seen += count
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(m2_ptr + offs_c, m2, mask=mask_c)
