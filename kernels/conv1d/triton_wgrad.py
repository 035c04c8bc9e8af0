"""The gradient of a conv's weight.

    dw[k] = sum_(n,t) x[n, t*stride + k*dilation - padding, :]^T dy[n, t, :]

A program owns BLOCK_I input by BLOCK_O output channels of one tap over a share of the utterances, and takes BLOCK_T
frames in each step. x is read once for each tap and each block of output channels, dy once for each tap and each block
of input channels (from cache except once). Rows whose shifted x does not exist or is padding are not read. With
IS_CLEAN the last step of an utterance may read some of that padding, which is zero. A second kernel adds the fp32
partial results (shares, K, C_in, C_out) in a fixed order and writes dw (C_out, C_in, K), the order of PyTorch.
"""

import triton
import triton.language as tl

from jasper_fast.kernels.conv1d.triton_loop import dot, strided_row


@triton.jit(
    do_not_specialize=[
        "batch", "frames", "frames_out", "groups_in", "groups_out", "taps", "padding", "dilation", "share",
        "lengths_ptr",
    ]
)  # fmt: skip
def conv1d_wgrad_kernel(
    x_ptr, x_desc, dy_ptr, dy_desc, part_ptr, lengths_ptr,
    batch, frames, frames_out, groups_in, groups_out, taps, padding, dilation, share,
    STRIDE: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr, IS_CLEAN: tl.constexpr,
    VEC_IN: tl.constexpr, VEC_OUT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    C_in = groups_in * VEC_IN
    C_out = groups_out * VEC_OUT
    o_blocks, i_blocks = tl.cdiv(C_out, BLOCK_O), tl.cdiv(C_in, BLOCK_I)
    pid = tl.program_id(0)
    o0 = (pid % o_blocks) * BLOCK_O
    pid = pid // o_blocks
    i0 = (pid % i_blocks) * BLOCK_I
    pid = pid // i_blocks
    tap = pid % taps
    part = (pid // taps).to(tl.int64)
    offs_i, offs_o = i0 + tl.arange(0, BLOCK_I), o0 + tl.arange(0, BLOCK_O)
    mask_i, mask_o = offs_i < C_in, offs_o < C_out
    shift = tap * dilation - padding
    acc = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    first = part.to(tl.int32) * share
    for n in range(first, tl.minimum(first + share, batch)):
        limit = frames
        if HAS_LENGTHS:
            limit = tl.minimum(tl.load(lengths_ptr + n).to(tl.int32), limit)
        # outputs whose shifted input exists and is not padding: all others would multiply zeros
        begin = tl.maximum(0, tl.cdiv(-shift, STRIDE))
        end = tl.minimum(frames_out, tl.cdiv(limit - shift, STRIDE))
        if HAS_DESCRIPTORS:
            row, place = strided_row(shift, padding, STRIDE)
            if IS_CLEAN and STRIDE == 1:
                steps = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_T)
            else:  # whole steps; the other loop takes the rest of the utterance
                steps = tl.maximum(tl.minimum(end, frames // STRIDE - row) - begin, 0) // BLOCK_T
            for i in range(steps):
                t = begin + i * BLOCK_T
                x = x_desc.load([n, t + row, place * C_in + i0]).reshape([BLOCK_T, BLOCK_I])
                dy = dy_desc.load([n, t, o0]).reshape([BLOCK_T, BLOCK_O])
                acc = dot(tl.trans(x), dy, acc, UPCAST, PRECISION)
            begin += steps * BLOCK_T
        if not (HAS_DESCRIPTORS and IS_CLEAN and STRIDE == 1):
            x_n = x_ptr + tl.cast(n, tl.int64) * frames * C_in
            dy_n = dy_ptr + tl.cast(n, tl.int64) * frames_out * C_out
            for t0 in range(begin, end, BLOCK_T):
                t = t0 + tl.arange(0, BLOCK_T)
                mask_t = t < end
                # x is loaded transposed: on sm_80 a tl.trans after the load would prevent copying ahead
                offs_x = (t * STRIDE + shift)[None, :] * C_in + offs_i[:, None]
                offs_dy = t[:, None] * C_out + offs_o[None, :]
                x = tl.load(x_n + offs_x, mask=mask_i[:, None] & mask_t[None, :], other=0.0)
                dy = tl.load(dy_n + offs_dy, mask=mask_t[:, None] & mask_o[None, :], other=0.0)
                acc = dot(x, dy, acc, UPCAST, PRECISION)
    base = part_ptr + (part * taps + tap) * C_in * C_out
    tl.store(base + offs_i[:, None] * C_out + offs_o[None, :], acc, mask=mask_i[:, None] & mask_o[None, :])


@triton.jit(do_not_specialize=["shares", "taps", "c_in", "c_out"])
def conv1d_wgrad_merge_kernel(
    part_ptr, dw_ptr, shares, taps, c_in, c_out,
    BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dw [BLOCK_O, BLOCK_I, all K taps]: the sum of the partial results of all shares, transposed on the chip."""
    i_blocks = tl.cdiv(c_in, BLOCK_I)
    offs_i = (tl.program_id(0) % i_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = (tl.program_id(0) // i_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_k < taps)[:, None, None] & (offs_i < c_in)[None, :, None] & (offs_o < c_out)[None, None, :]
    offs = (offs_k[:, None, None] * c_in + offs_i[None, :, None]) * c_out + offs_o[None, None, :]
    total = tl.zeros([BLOCK_K, BLOCK_I, BLOCK_O], tl.float32)
    part = part_ptr
    for _ in range(shares):
        total += tl.load(part + offs, mask=mask, other=0.0)
        part += taps * c_in * c_out
    offs = (offs_o[:, None, None] * c_in + offs_i[None, :, None]) * taps + offs_k[None, None, :]
    mask = (offs_o < c_out)[:, None, None] & (offs_i < c_in)[None, :, None] & (offs_k < taps)[None, None, :]
    tl.store(dw_ptr + offs, tl.permute(total, (2, 1, 0)).to(dw_ptr.dtype.element_ty), mask=mask)
