"""One sub-block at inference in one kernel: a conv with batch norm folded in, panes (1x1 convs), bias, ReLU and mask.

    z = mask(relu(sum_k x[n, t*stride + k*dilation - padding, :] @ w[k]  +  x2[n, t, :] @ w2  +  bias))

A program owns BLOCK_T frames of one utterance by BLOCK_N output channels. The reduction of that tile runs over the
K*C_in products of the conv and then the C2 products of the panes. With splits, `splits` programs share it: each writes
partial sums to fp32 scratch. The last program to finish adds them in a fixed order, so runs are bit-identical, and
sets the tile's counter back to 0 for the next launch. A program reads its frames of x taps/stride times (only the
first time from memory) and its channels of w and w2 once, and writes z once. Splits add 8*splits bytes per element of
z, in L2.

The network's first kernel reads (N, C, T) fp32 features directly (IS_NCT). A kernel may also compute the lengths of its
output from those of its input, and write them to lengths_out. If C_out <= BLOCK_N, the last kernel can end with a
log-softmax (HAS_LOG_SOFTMAX).
"""

import triton
import triton.language as tl

from jasper_fast.kernels.conv1d.triton_loop import add_taps, dot, out_frames


@triton.jit
def _add_panes(
    acc, x2_tile, x2_desc, w2_ptr, w2_desc, n, t0, limit, o0, i_begin, i_end, frames, C, C_pad, x2_row,
    HAS_DESCRIPTORS: tl.constexpr, IS_CLEAN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns acc plus the products of steps [i_begin, i_end) over the channels of the panes."""
    if HAS_DESCRIPTORS:
        whole = IS_CLEAN | (limit == frames) | (t0 + BLOCK_T <= limit)
        for i in range(i_begin, tl.where(whole, i_end, i_begin)):
            x = x2_desc.load([n.to(tl.int32), t0, i * BLOCK_K]).reshape([BLOCK_T, BLOCK_K])
            acc = dot(x, w2_desc.load([i * BLOCK_K, o0]), acc, UPCAST, PRECISION)
        i_begin = tl.where(whole, i_end, i_begin)
    if not (HAS_DESCRIPTORS and IS_CLEAN):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        offs_o = o0 + tl.arange(0, BLOCK_N)
        for i in range(i_begin, i_end):
            c = i * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = (offs_t < limit)[:, None] & (c < C)[None, :]
            x = tl.load(x2_tile + (offs_t[:, None] * x2_row + c[None, :]), mask=mask, other=0.0)
            mask = (c < C)[:, None] & (offs_o < C_pad)[None, :]
            w = tl.load(w2_ptr + (c[:, None] * C_pad + offs_o[None, :]), mask=mask, other=0.0)
            acc = dot(x, w, acc, UPCAST, PRECISION)
    return acc


@triton.jit(
    do_not_specialize=[
        "frames", "frames_out", "groups_in", "x_row", "x_item", "x_chan", "groups_2", "x2_row", "x2_item", "c_out",
        "z_row", "z_item", "taps", "padding", "dilation", "t_blocks", "splits",
        "in_lengths_ptr", "out_lengths_ptr", "lengths_out_ptr",
    ]
)  # fmt: skip
def conv1d_fused_kernel(
    x_ptr, x_desc, w_ptr, w_desc, x2_ptr, x2_desc, w2_ptr, w2_desc, z_ptr, bias_ptr,
    in_lengths_ptr, out_lengths_ptr, lengths_out_ptr, part_ptr, arrived_ptr,
    frames, frames_out, groups_in, x_row, x_item, x_chan, groups_2, x2_row, x2_item, c_out, z_row, z_item,
    taps, padding, dilation, t_blocks, splits, STRIDE: tl.constexpr,
    HAS_IN_LENGTHS: tl.constexpr, HAS_OUT_LENGTHS: tl.constexpr, HAS_LENGTHS_OUT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_PANES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RELU: tl.constexpr, HAS_LOG_SOFTMAX: tl.constexpr,
    HAS_SPLITS: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr, IS_CLEAN: tl.constexpr, IS_NCT: tl.constexpr,
    VEC_IN: tl.constexpr, VEC_2: tl.constexpr, VEC_OUT: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """HAS_MASK: the lengths mask x, x2 and z. Without HAS_MASK they only serve to compute lengths_out.

    IS_CLEAN: the padding of x and x2 is zero in memory.
    """
    C = groups_in * VEC_IN
    C_pad = tl.cdiv(c_out, PAD) * PAD
    n_blocks = tl.cdiv(c_out, BLOCK_N)
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    o0 = (pid % n_blocks) * BLOCK_N
    tile = (pid // n_blocks).to(tl.int64)
    n = tile // t_blocks
    t0 = (tile % t_blocks).to(tl.int32) * BLOCK_T

    limit, limit_2 = frames, frames_out  # inputs from these frames on count as zero
    end = frames_out  # outputs from this frame on are zero
    if HAS_IN_LENGTHS:
        length = tl.load(in_lengths_ptr + n)
        if HAS_LENGTHS_OUT:
            # clamped, because a length may exceed x if z has more rows than the conv produces
            length = tl.minimum(tl.maximum(length, 0), frames)
            new_length = out_frames(length, taps, STRIDE, padding, dilation)
            tl.store(lengths_out_ptr + n, new_length, mask=(t0 == 0) & (o0 == 0) & (split == 0))
            if HAS_MASK:
                end = tl.minimum(new_length.to(tl.int32), end)
        if HAS_MASK:
            limit = tl.minimum(length.to(tl.int32), limit)
            limit_2 = tl.minimum(length.to(tl.int32), limit_2)
    if HAS_OUT_LENGTHS:
        end = tl.minimum(tl.load(out_lengths_ptr + n).to(tl.int32), end)

    taps_steps = taps * tl.cdiv(C, BLOCK_K)
    if (t0 * STRIDE - padding >= limit) | (limit <= 0):
        taps_steps = 0
    steps = taps_steps
    if HAS_PANES:
        pane_steps = tl.cdiv(groups_2 * VEC_2, BLOCK_K)
        if t0 >= limit_2:
            pane_steps = 0
        steps += pane_steps
    if t0 >= end:
        steps = 0
    share = tl.cdiv(steps, splits)
    i_begin = tl.minimum(split * share, steps)
    i_end = tl.minimum(i_begin + share, steps)
    acc = add_taps(
        tl.zeros([BLOCK_T, BLOCK_N], tl.float32), x_ptr + n * x_item * VEC_IN, x_desc, w_ptr, w_desc, n, t0, limit, o0,
        tl.minimum(i_begin, taps_steps), tl.minimum(i_end, taps_steps), frames, C, C, C_pad, x_row * VEC_IN, x_chan,
        taps, padding, dilation, STRIDE,
        HAS_DESCRIPTORS, IS_CLEAN, IS_NCT, False, UPCAST, PRECISION, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_PANES:
        acc = _add_panes(
            acc, x2_ptr + n * x2_item * VEC_2, x2_desc, w2_ptr, w2_desc, n, t0, limit_2, o0,
            tl.maximum(i_begin - taps_steps, 0), tl.maximum(i_end - taps_steps, 0), frames_out, groups_2 * VEC_2, C_pad,
            x2_row * VEC_2, HAS_DESCRIPTORS, IS_CLEAN, UPCAST, PRECISION, BLOCK_T, BLOCK_N, BLOCK_K,
        )  # fmt: skip

    offs_t = t0 + tl.arange(0, BLOCK_T)
    offs_o = o0 + tl.arange(0, BLOCK_N)
    mine = split == 0
    if HAS_SPLITS:  # noqa: SIM102 (the outer condition is resolved at compile time)
        if steps > 0:
            scratch = tl.arange(0, BLOCK_T)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            slot = part_ptr + pid.to(tl.int64) * splits * (BLOCK_T * BLOCK_N)
            tl.store(slot + split * (BLOCK_T * BLOCK_N) + scratch, acc)
            tl.debug_barrier()  # all threads must have stored before one of them counts the arrival
            mine = tl.atomic_add(arrived_ptr + pid, 1, sem="acq_rel") == splits - 1
            if mine:
                tl.store(arrived_ptr + pid, 0)
                acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
                for s in range(splits):
                    acc += tl.load(slot + s * (BLOCK_T * BLOCK_N) + scratch, cache_modifier=".cg")
    if mine:
        mask_o = offs_o < c_out
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
        if HAS_RELU:
            acc = tl.where(acc <= 0, 0.0, acc)  # a NaN passes
        if HAS_LOG_SOFTMAX:
            logits = tl.where(mask_o[None, :], acc, float("-inf"))
            top = tl.max(logits, 1)
            acc = (acc - top[:, None]) - tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))[:, None]
        if HAS_MASK:
            acc = tl.where((offs_t < end)[:, None], acc, 0.0)
        offs = offs_t[:, None] * (z_row * VEC_OUT) + offs_o[None, :]
        mask_o = offs_o < (c_out // VEC_OUT) * VEC_OUT  # offs_o < c_out, written to show the compiler the alignment
        mask = (offs_t < frames_out)[:, None] & mask_o[None, :]
        tl.store(z_ptr + n * z_item * VEC_OUT + offs, acc.to(z_ptr.dtype.element_ty), mask=mask)
