"""The reduction that all Triton convs except wgrad share: K shifted matrix products, accumulated in fp32.

    acc[t, o] += sum_k sum_c x[n, t*stride + k*dilation - padding, c] * w[k, c, o]

The outer loop runs over chunks of BLOCK_K channels and the inner one over the taps, so K - 1 of K reads of a chunk come
from cache. On sm_90 and later, 16-bit tiles without rows to mask are loaded through tensor descriptors (TMA), which
fill rows outside of x with zeros, as the conv needs. Other tiles are loaded through masked pointers, which become
cp.async. At stride S the descriptor sees x as (N, T // S, S*C): frame p is the C channels of row p // S that start at
channel p % S * C.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:  # the interpreter multiplies bf16 wrongly; fp32 holds bf16 exactly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def out_frames(frames, taps, stride, padding, dilation):
    """Frames of a conv's output for `frames` frames of input."""
    return tl.maximum((frames + 2 * padding - dilation * (taps - 1) - 1 + stride) // stride, 0)


@triton.jit
def strided_row(shift, padding, STRIDE: tl.constexpr):
    """Returns where the descriptor has frame t*STRIDE + shift: the number of its row minus t, and its place in the row.

    A row of the descriptor holds STRIDE frames. shift is at least -padding.
    """
    above = shift + padding * STRIDE  # made non-negative, because // truncates here
    return above // STRIDE - padding, above % STRIDE


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the left and the right half of a tile's columns, for epilogues that would spill on the whole tile."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def add_taps(
    acc, x_tile, x_desc, w_ptr, w_desc, n, t0, limit, o0, i_begin, i_end,
    frames, C, C_w, C_pad, x_row, x_chan, taps, padding, dilation, STRIDE: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr, IS_CLEAN: tl.constexpr, IS_NCT: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns acc [BLOCK_T, BLOCK_N] plus steps [i_begin, i_end) of the reduction.

    x_tile: utterance n of x, of which C channels are reduced. Rows at t >= limit count as zero; with IS_CLEAN they are
    zero in memory. Packed weights are (K, C_w, C_pad). IS_TRANSPOSED computes the gradient of x: it reduces over the
    last dimension of the weights and takes the taps in reverse.
    """
    if HAS_DESCRIPTORS and not IS_NCT:
        seen = frames // STRIDE * STRIDE
        if IS_CLEAN:
            limit = frames
        reach = (t0 + BLOCK_T - 1) * STRIDE + (taps - 1) * dilation - padding
        whole = ((limit == frames) & (seen == frames)) | (reach < tl.minimum(limit, seen))
        for i in range(i_begin, tl.where(whole, i_end, i_begin)):
            tap = i % taps
            c0 = (i // taps) * BLOCK_K
            row, place = strided_row(tap * dilation - padding, padding, STRIDE)
            x = x_desc.load([n.to(tl.int32), t0 + row, place * C + c0]).reshape([BLOCK_T, BLOCK_K])
            if IS_TRANSPOSED:
                w = tl.trans(w_desc.load([(taps - 1 - tap) * C_w + o0, c0]))
            else:
                w = w_desc.load([tap * C_w + c0, o0])
            acc = dot(x, w, acc, UPCAST, PRECISION)
        i_begin = tl.where(whole, i_end, i_begin)
    if not (HAS_DESCRIPTORS and IS_CLEAN and STRIDE == 1):  # a tile may have rows to mask; descriptors cannot mask
        offs_c = tl.arange(0, BLOCK_K)
        offs_o = o0 + tl.arange(0, BLOCK_N)
        first = (t0 + tl.arange(0, BLOCK_T)) * STRIDE - padding
        # fp32 features are cast here. As the right operand (SWAPPED) they pass through shared memory. As the left
        # operand on sm_90 they would stay in registers, which the next step may overwrite while products still read
        # them.
        SWAPPED: tl.constexpr = HAS_DESCRIPTORS and IS_NCT
        if SWAPPED:
            acc = tl.trans(acc)
        for i in range(i_begin, i_end):
            tap = i % taps
            c = (i // taps) * BLOCK_K + offs_c
            t = first + tap * dilation
            if SWAPPED:
                mask = (c < C)[:, None] & ((t >= 0) & (t < limit))[None, :]
                x = tl.load(x_tile + (c[:, None] * x_chan + t[None, :]), mask=mask, other=0.0)
                w = w_desc.load([tap * C_w + (i // taps) * BLOCK_K, o0])
                acc = dot(tl.trans(w), x.to(w_ptr.dtype.element_ty), acc, UPCAST, PRECISION)
            else:
                mask = ((t >= 0) & (t < limit))[:, None] & (c < C)[None, :]
                if IS_NCT:
                    offs_x = c[None, :] * x_chan + t[:, None]
                else:
                    offs_x = t[:, None] * x_row + c[None, :]
                x = tl.load(x_tile + offs_x, mask=mask, other=0.0).to(w_ptr.dtype.element_ty)
                if IS_TRANSPOSED:
                    offs_w = ((taps - 1 - tap) * C_w + offs_o)[:, None] * C_pad + c[None, :]
                    mask = (offs_o < C_w)[:, None] & (c < C_pad)[None, :]
                    w = tl.trans(tl.load(w_ptr + offs_w, mask=mask, other=0.0))
                else:
                    offs_w = (tap * C_w + c)[:, None] * C_pad + offs_o[None, :]
                    w = tl.load(w_ptr + offs_w, mask=(c < C)[:, None] & (offs_o < C_pad)[None, :], other=0.0)
                acc = dot(x, w, acc, UPCAST, PRECISION)
        if SWAPPED:
            acc = tl.trans(acc)
    return acc
