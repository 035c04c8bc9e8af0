"""The gradient of a conv's weight.

    dw[k] = sum_(n,t) x[n, t*stride + k*dilation - padding, :]^T dy[n, t, :]

A program owns BLOCK_I input by BLOCK_O output channels of TAPS taps, one or two, over a share of the utterances, and
takes BLOCK_T frames in each step. x is read once for each tap and each block of output channels, and dy once for each
group of TAPS taps and each block of input channels; only the first read comes from memory, the others from cache. Rows
whose shifted x does not exist or is padding are not read, with two exceptions: of two taps one may need a row that the
other does not, and with IS_CLEAN the last step of an utterance may reach too far. x is zero in these rows. With
IS_DIRECT there is one share, and the kernel writes dw (C_out, C_in, K) itself, in the order of PyTorch. Otherwise a
second kernel adds the fp32 partial results (shares, K, C_in, C_out) in a fixed order.
"""

import triton
import triton.language as tl

from jasper_fast.kernels.conv1d.triton_loop import dot, strided_row


@triton.jit
def limit_of(n, frames, lengths_ptr, HAS_LENGTHS: tl.constexpr):
    """Returns the row of utterance n from which on x is zero, or counts as zero."""
    limit = frames
    if HAS_LENGTHS:
        limit = tl.minimum(tl.load(lengths_ptr + n).to(tl.int32), limit)
    return limit


@triton.jit
def one_tap(
    x_ptr, x_desc, dy_ptr, dy_desc, lengths_ptr, first, last, i0, o0, shift, frames, frames_out, C_in, C_out, padding,
    STRIDE: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr, IS_CLEAN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Returns the sums [BLOCK_I, BLOCK_O] of the tap at `shift` over utterances `first` .. `last` - 1."""
    offs_i, offs_o = i0 + tl.arange(0, BLOCK_I), o0 + tl.arange(0, BLOCK_O)
    acc = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    for n in range(first, last):
        limit = limit_of(n, frames, lengths_ptr, HAS_LENGTHS)
        # outputs whose shifted input exists and is not padding: the products of all others would be zero
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
                # x is loaded transposed, because on sm_80 a tl.trans after the load would prevent loading ahead
                offs_x = (t * STRIDE + shift)[None, :] * C_in + offs_i[:, None]
                offs_dy = t[:, None] * C_out + offs_o[None, :]
                x = tl.load(x_n + offs_x, mask=(offs_i < C_in)[:, None] & mask_t[None, :], other=0.0)
                dy = tl.load(dy_n + offs_dy, mask=mask_t[:, None] & (offs_o < C_out)[None, :], other=0.0)
                acc = dot(x, dy, acc, UPCAST, PRECISION)
    return acc


@triton.jit
def two_taps(
    x_desc, dy_desc, lengths_ptr, first, last, i0, o0, shift, frames, frames_out, dilation,
    HAS_LENGTHS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Returns the sums of `one_tap` for the tap at `shift` and for the next one; each load of dy serves both.

    Requires stride 1, descriptors, and zeros in the padding of x.
    """
    acc = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    next_acc = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    for n in range(first, last):
        # from the first output for which the next tap has an input to the last one for which this tap has an input
        begin = tl.maximum(0, -shift - dilation)
        end = tl.minimum(frames_out, limit_of(n, frames, lengths_ptr, HAS_LENGTHS) - shift)
        for i in range(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_T)):
            t = begin + i * BLOCK_T
            dy = dy_desc.load([n, t, o0]).reshape([BLOCK_T, BLOCK_O])
            x = x_desc.load([n, t + shift, i0]).reshape([BLOCK_T, BLOCK_I])
            next_x = x_desc.load([n, t + shift + dilation, i0]).reshape([BLOCK_T, BLOCK_I])
            acc = dot(tl.trans(x), dy, acc, UPCAST, PRECISION)
            next_acc = dot(tl.trans(next_x), dy, next_acc, UPCAST, PRECISION)
    return acc, next_acc


@triton.jit
def put(to_ptr, acc, i0, o0, tap, part, taps, C_in, C_out, IS_DIRECT: tl.constexpr):
    """Stores a tap's sums [BLOCK_I, BLOCK_O] in dw, or in the partial results of a share."""
    rows, columns = tl.arange(0, acc.shape[0])[:, None], tl.arange(0, acc.shape[1])[None, :]
    mask = (i0 + rows < C_in) & (o0 + columns < C_out)
    if IS_DIRECT:  # the offset of the tile needs 64 bits, offsets inside it need 32
        at = to_ptr + (o0.to(tl.int64) * C_in + i0) * taps + tap
        offs = (columns * C_in + rows) * taps
    else:
        at = to_ptr + ((part * taps + tap) * C_in + i0) * C_out + o0
        offs = rows * C_out + columns
    tl.store(at + offs, acc.to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "batch", "frames", "frames_out", "groups_in", "groups_out", "taps", "padding", "dilation", "share",
        "lengths_ptr",
    ]
)  # fmt: skip
def conv1d_wgrad_kernel(
    x_ptr, x_desc, dy_ptr, dy_desc, to_ptr, lengths_ptr,
    batch, frames, frames_out, groups_in, groups_out, taps, padding, dilation, share,
    STRIDE: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr, IS_CLEAN: tl.constexpr,
    IS_DIRECT: tl.constexpr, VEC_IN: tl.constexpr, VEC_OUT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    C_in = groups_in * VEC_IN
    C_out = groups_out * VEC_OUT
    o_blocks, i_blocks, groups = tl.cdiv(C_out, BLOCK_O), tl.cdiv(C_in, BLOCK_I), tl.cdiv(taps, TAPS)
    pid = tl.program_id(0)
    if IS_DIRECT:  # neighbouring programs own taps of one 32-byte sector of dw, so their stores meet in L2
        tap = pid % groups * TAPS
        pid = pid // groups
    o0 = (pid % o_blocks) * BLOCK_O
    pid = pid // o_blocks
    i0 = (pid % i_blocks) * BLOCK_I
    pid = pid // i_blocks
    if not IS_DIRECT:
        tap = pid % groups * TAPS
        pid = pid // groups
    part = pid.to(tl.int64)
    shift = tap * dilation - padding
    first = pid * share
    last = tl.minimum(first + share, batch)
    if TAPS == 2:
        if tap + 1 < taps:
            acc, next_acc = two_taps(
                x_desc, dy_desc, lengths_ptr, first, last, i0, o0, shift, frames, frames_out, dilation,
                HAS_LENGTHS, UPCAST, PRECISION, BLOCK_T, BLOCK_I, BLOCK_O,
            )  # fmt: skip
            put(to_ptr, next_acc, i0, o0, tap + 1, part, taps, C_in, C_out, IS_DIRECT)
        else:
            acc = one_tap(
                x_ptr, x_desc, dy_ptr, dy_desc, lengths_ptr, first, last, i0, o0, shift, frames, frames_out, C_in,
                C_out, padding, STRIDE, HAS_LENGTHS, HAS_DESCRIPTORS, IS_CLEAN, UPCAST, PRECISION, BLOCK_T, BLOCK_I,
                BLOCK_O,
            )  # fmt: skip
    else:
        acc = one_tap(
            x_ptr, x_desc, dy_ptr, dy_desc, lengths_ptr, first, last, i0, o0, shift, frames, frames_out, C_in, C_out,
            padding, STRIDE, HAS_LENGTHS, HAS_DESCRIPTORS, IS_CLEAN, UPCAST, PRECISION, BLOCK_T, BLOCK_I, BLOCK_O,
        )  # fmt: skip
    put(to_ptr, acc, i0, o0, tap, part, taps, C_in, C_out, IS_DIRECT)


@triton.jit(do_not_specialize=["shares", "taps", "c_in", "c_out"])
def conv1d_wgrad_merge_kernel(
    part_ptr, dw_ptr, shares, taps, c_in, c_out,
    BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Writes dw [BLOCK_O, BLOCK_I, all K taps]: adds the partial results of all shares and transposes the sum."""
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
