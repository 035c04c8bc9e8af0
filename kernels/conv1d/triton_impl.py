"""conv1d in Triton as K shifted GEMMs over NTC memory (NVIDIA sm_80 and later; numpy through Triton's interpreter).

    forward  y[n, t, :]  = sum_k x[n, t*stride + k*dilation - padding, :] @ w[k]
    dgrad    the same kernel over dy with the taps reversed and each transposed (stride 1)
    wgrad    dw[k] = sum_(n,t) x[n, t*stride + k*dilation - padding, :]^T dy[n, t, :]
    fused    mask(relu(forward(x) + x2 @ w2 + bias)), the panes x2 as a further stretch of the reduction

N batch, T frames, C channels, K taps. A forward program owns BLOCK_T frames of one utterance by BLOCK_N output
channels; its loop runs over chunks of BLOCK_K input channels and, innermost, over the taps, so that a chunk's frames
are read from cache K - 1 times of K. A wgrad program owns BLOCK_I by BLOCK_O of one tap, over a share of the
utterances; shares are added in a fixed order. No im2col and no transpose of an activation. Accumulators are fp32. A
tile whose inputs all lie beyond the utterance's length is not computed: it is zero. Loads are masked pointers, which
become cp.async; on sm_90 and later 16-bit tiles that touch no padding come through tensor descriptors (TMA), whose zero
fill is the conv's. Weights are packed to (K, C_in, C_out) with C_out rounded up to 16, so that each of their rows
starts on 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from jasper_fast.kernels import aot

PAD_OUT = 16  # packed weights' rows are a multiple of this many channels
SHARES = 264  # wgrad programs wanted: two for each SM of a large GPU, and not the device's own count, so runs repeat
INTERPRET_DESCRIPTORS = False  # the descriptor loop in the interpreter, for tests
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """BLOCK_T frames by BLOCK_N output channels, BLOCK_K input channels a step."""

    t: int
    n: int
    k: int
    num_warps: int
    num_stages: int


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:  # the interpreter's bf16 product is garbage; fp32 holds bf16 exactly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _weights(w_ptr, row0, offs_c, mask_c, offs_o, C_pad):
    """Rows row0 + offs_c of packed weights: [BLOCK_K, BLOCK_N]."""
    mask = mask_c[:, None] & (offs_o < C_pad)[None, :]
    return tl.load(w_ptr + ((row0 + offs_c)[:, None] * C_pad + offs_o[None, :]), mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "frames", "frames_out", "groups_in", "x_row", "x_item", "groups_2", "x2_row", "x2_item", "c_out", "y_row",
        "y_item", "taps", "stride", "padding", "dilation", "t_blocks",
    ]
)  # fmt: skip
def _conv_kernel(
    x_ptr, w_ptr, x2_ptr, w2_ptr, y_ptr, bias_ptr, part_mean_ptr, part_m2_ptr, in_lengths_ptr, out_lengths_ptr,
    x_desc, w_desc, frames, frames_out, groups_in, x_row, x_item, groups_2, x2_row, x2_item, c_out, y_row, y_item,
    taps, stride, padding, dilation, t_blocks,
    HAS_IN_LENGTHS: tl.constexpr, HAS_OUT_LENGTHS: tl.constexpr, HAS_PANES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RELU: tl.constexpr, HAS_STATS: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
    VEC_IN: tl.constexpr, VEC_2: tl.constexpr, VEC_OUT: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # sizes and strides of activations come in units of VEC elements, which tells the compiler their alignment
    C_in = groups_in * VEC_IN
    C_pad = tl.cdiv(c_out, PAD) * PAD
    n_blocks = tl.cdiv(c_out, BLOCK_N)
    tile = (tl.program_id(0) // n_blocks).to(tl.int64)  # channels innermost: neighbours share their frames of x in L2
    n = tile // t_blocks
    t0 = (tile % t_blocks).to(tl.int32) * BLOCK_T
    offs_o = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t = t0 + tl.arange(0, BLOCK_T)
    offs_c = tl.arange(0, BLOCK_K)
    mask_o = offs_o < c_out
    limit, limit_2 = frames, frames_out  # inputs at and beyond these are zero
    end = frames_out  # outputs at and beyond it are zero
    if HAS_IN_LENGTHS:
        length = tl.load(in_lengths_ptr + n).to(tl.int32)
        limit, limit_2 = tl.minimum(length, limit), tl.minimum(length, limit_2)
    if HAS_OUT_LENGTHS:
        end = tl.minimum(tl.load(out_lengths_ptr + n).to(tl.int32), end)
    x_tile = x_ptr + n * x_item * VEC_IN
    first = offs_t * stride - padding
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    steps = taps * tl.cdiv(C_in, BLOCK_K)
    if (t0 * stride - padding >= limit) | (t0 >= end):
        steps = 0
    if HAS_DESCRIPTORS:  # stride 1; rows of padding may hold anything, so a tile that reaches some takes the other loop
        whole = (limit == frames) | (t0 - padding + BLOCK_T + (taps - 1) * dilation <= limit)
        for i in range(tl.where(whole, steps, 0)):
            tap = i % taps
            c0 = (i // taps) * BLOCK_K
            x = x_desc.load([n.to(tl.int32), t0 - padding + tap * dilation, c0]).reshape([BLOCK_T, BLOCK_K])
            w = w_desc.load([tap * C_in + c0, (tl.program_id(0) % n_blocks) * BLOCK_N])
            acc = _dot(x, w, acc, UPCAST, PRECISION)
        steps = tl.where(whole, 0, steps)
    for i in range(steps):
        tap = i % taps
        c0 = (i // taps) * BLOCK_K
        t_in = first + tap * dilation
        mask_c = c0 + offs_c < C_in
        mask = ((t_in >= 0) & (t_in < limit))[:, None] & mask_c[None, :]
        x = tl.load(x_tile + (t_in[:, None] * (x_row * VEC_IN) + (c0 + offs_c)[None, :]), mask=mask, other=0.0)
        w = _weights(w_ptr, tap * C_in + c0, offs_c, mask_c, offs_o, C_pad)
        acc = _dot(x, w, acc, UPCAST, PRECISION)
    if HAS_PANES:
        C_2 = groups_2 * VEC_2
        x2_tile = x2_ptr + n * x2_item * VEC_2
        steps = tl.cdiv(C_2, BLOCK_K)
        if (t0 >= limit_2) | (t0 >= end):
            steps = 0
        for i in range(steps):
            c0 = i * BLOCK_K
            mask_c = c0 + offs_c < C_2
            mask = (offs_t < limit_2)[:, None] & mask_c[None, :]
            x = tl.load(x2_tile + (offs_t[:, None] * (x2_row * VEC_2) + (c0 + offs_c)[None, :]), mask=mask, other=0.0)
            w = _weights(w2_ptr, c0, offs_c, mask_c, offs_o, C_pad)
            acc = _dot(x, w, acc, UPCAST, PRECISION)
    rows = offs_t < frames_out
    if HAS_STATS:
        count = tl.minimum(frames_out - t0, BLOCK_T).to(tl.float32)
        mean = tl.sum(tl.where(rows[:, None], acc, 0.0), 0) / count
        spread = tl.where(rows[:, None], acc - mean[None, :], 0.0)
        tl.store(part_mean_ptr + tile * c_out + offs_o, mean, mask=mask_o)
        tl.store(part_m2_ptr + tile * c_out + offs_o, tl.sum(spread * spread, 0), mask=mask_o)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    if HAS_RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # a NaN passes
    if HAS_OUT_LENGTHS:
        acc = tl.where((offs_t < end)[:, None], acc, 0.0)
    y_tile = y_ptr + n * y_item * VEC_OUT
    offs = offs_t[:, None] * (y_row * VEC_OUT) + offs_o[None, :]
    mask_o = offs_o < (c_out // VEC_OUT) * VEC_OUT  # the same, with its alignment
    tl.store(y_tile + offs, acc.to(y_ptr.dtype.element_ty), mask=rows[:, None] & mask_o[None, :])


@triton.jit(do_not_specialize=["frames_out", "t_blocks", "tiles", "c_out"])
def _stats_merge_kernel(
    part_mean_ptr, part_m2_ptr, mean_ptr, m2_ptr, frames_out, t_blocks, tiles, c_out,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan's merge of the tiles' mean and M2, BLOCK_G at a time in a fixed order, for BLOCK_C channels."""
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


@triton.jit(
    do_not_specialize=[
        "batch", "frames", "frames_out", "groups_in", "groups_out", "taps", "stride", "padding", "dilation", "share",
    ]
)  # fmt: skip
def _wgrad_kernel(
    x_ptr, dy_ptr, dw_ptr, lengths_ptr,
    batch, frames, frames_out, groups_in, groups_out, taps, stride, padding, dilation, share,
    HAS_LENGTHS: tl.constexpr, VEC_IN: tl.constexpr, VEC_OUT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dw of one tap, BLOCK_I by BLOCK_O channels, from `share` utterances: dw (shares, K, C_in, C_out)."""
    C_in = groups_in * VEC_IN
    C_out = groups_out * VEC_OUT
    o_blocks, i_blocks = tl.cdiv(C_out, BLOCK_O), tl.cdiv(C_in, BLOCK_I)
    pid = tl.program_id(0)
    offs_o = (pid % o_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    pid = pid // o_blocks
    offs_i = (pid % i_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    pid = pid // i_blocks
    tap = pid % taps
    part = (pid // taps).to(tl.int64)
    shift = tap * dilation - padding
    offs_t = tl.arange(0, BLOCK_T)
    mask_i, mask_o = offs_i < C_in, offs_o < C_out
    acc = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    first = part * share
    for n in range(first, tl.minimum(first + share, batch)):
        limit = frames
        if HAS_LENGTHS:
            limit = tl.minimum(tl.load(lengths_ptr + n).to(tl.int32), limit)
        # outputs whose shifted input exists and is not padding: the rest multiply zeros
        begin = tl.maximum(0, tl.cdiv(-shift, stride))
        end = tl.minimum(frames_out, tl.cdiv(limit - shift, stride))
        x_n = x_ptr + n * frames * C_in
        dy_n = dy_ptr + n * frames_out * C_out
        for t0 in range(begin, end, BLOCK_T):
            t = t0 + offs_t
            mask_t = t < end
            x = tl.load(
                x_n + ((t * stride + shift)[:, None] * C_in + offs_i[None, :]),
                mask=mask_t[:, None] & mask_i[None, :], other=0.0,
            )  # fmt: skip
            dy = tl.load(
                dy_n + (t[:, None] * C_out + offs_o[None, :]), mask=mask_t[:, None] & mask_o[None, :], other=0.0
            )
            acc = _dot(tl.trans(x), dy, acc, UPCAST, PRECISION)
    base = dw_ptr + (part * taps + tap) * C_in * C_out
    tl.store(base + offs_i[:, None] * C_out + offs_o[None, :], acc, mask=mask_i[:, None] & mask_o[None, :])


# ---- the face ----


class Packed(NamedTuple):
    """A conv's weight as the kernel reads it: `data` (K, C_in, C_out rounded up to 16), zeros in the rest."""

    data: Tensor
    c_out: int
    c_in: int
    taps: int


def pack(weight: Tensor, *, transposed: bool = False, out: Tensor | None = None) -> Packed:
    """`weight` (C_out, C_in, K) packed for `fused`; `transposed` packs the conv that gives the gradient of x.

    out: a zeroed buffer of `packed_shape(...)` and the weight's dtype to write into, so that a module can keep one.
    """
    if out is None:
        out = weight.new_zeros(packed_shape(weight, transposed=transposed))
    w = weight.detach()
    w = w.flip(2).permute(2, 0, 1) if transposed else w.permute(2, 1, 0)
    taps, c_in, c_out = w.shape
    out[:, :, :c_out] = w
    return Packed(out, c_out, c_in, taps)


def packed_shape(weight: Tensor, *, transposed: bool = False) -> tuple[int, int, int]:
    """Shape of what `pack` writes for `weight` (C_out, C_in, K)."""
    c_out, c_in, taps = weight.shape
    if transposed:
        c_out, c_in = c_in, c_out
    return taps, c_in, triton.cdiv(c_out, PAD_OUT) * PAD_OUT


def forward(
    x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, lengths: Tensor | None = None
) -> Tensor:
    """y (N, C_out, T') of `x` (N, C_in, T), zero at t >= `lengths` (N,), and `weight` (C_out, C_in, K); NTC memory.

    fp32 (TF32 where torch.backends.cudnn.allow_tf32, as PyTorch's own conv), fp16, bf16. Equivalent to
    `F.conv1d(x.masked_fill(t >= lengths, 0), weight, None, stride, padding, dilation)`.
    """
    packed = pack(weight)
    y = fused(x.transpose(1, 2), packed, stride=stride, padding=padding, dilation=dilation, in_lengths=lengths)
    return y.transpose(1, 2)


def forward_stats(
    x: Tensor, packed: Packed, stride: int, padding: int, dilation: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y as `forward` gives it, with the mean and M2 (sum of squared deviations) of its channels over all N*T' rows.

    The statistics are those of the fp32 accumulators, not of `y` as rounded: fp32 (C_out,) each.
    """
    y, mean, m2 = _launch(x.transpose(1, 2), packed, stride, padding, dilation, in_lengths=lengths, stats=True)
    return y.transpose(1, 2), mean, m2


def dgrad(
    dy: Tensor, weight: Tensor, t: int, stride: int, padding: int, dilation: int, lengths: Tensor | None = None
) -> Tensor:
    """dx (N, C_in, T = `t`) of `dy` (N, C_out, T'), zero at t >= `lengths`; stride 1; NTC memory."""
    if stride != 1:
        raise ValueError(f"the triton face's dgrad takes stride 1, got {stride}: use backend='reference' for this conv")
    reach = dilation * (weight.shape[2] - 1)
    if dy.shape[2] != t + 2 * padding - reach:
        raise ValueError(f"dy has {dy.shape[2]} frames, but {t} frames of x give {t + 2 * padding - reach}")
    packed = pack(weight, transposed=True)
    dx = fused(dy.transpose(1, 2), packed, padding=reach - padding, dilation=dilation, out_lengths=lengths)
    return dx.transpose(1, 2)


def wgrad(
    x: Tensor, dy: Tensor, k: int, stride: int, padding: int, dilation: int, lengths: Tensor | None = None
) -> Tensor:
    """dweight (C_out, C_in, K) of `x` (N, C_in, T), zero at t >= `lengths` (N,), and `dy` (N, C_out, T')."""
    _check(x, dy)
    n, c_in, t = x.shape
    c_out, t_out = dy.shape[1:]
    tile = wgrad_tile(x.dtype, c_in, c_out)
    programs = k * triton.cdiv(c_in, tile.n) * triton.cdiv(c_out, tile.k)
    share = triton.cdiv(n, max(1, min(n, SHARES // programs)))
    shares = triton.cdiv(n, share)
    parts = torch.empty((shares, k, c_in, c_out), dtype=torch.float32, device=x.device)
    vec_in, vec_out = _vec(c_in), _vec(c_out)
    with _on(x):
        _wgrad_kernel[(programs * shares,)](
            x, dy, parts, lengths, n, t, t_out, c_in // vec_in, c_out // vec_out, k, stride, padding, dilation, share,
            HAS_LENGTHS=lengths is not None, VEC_IN=vec_in, VEC_OUT=vec_out, **_arithmetic(x),
            BLOCK_T=tile.t, BLOCK_I=tile.n, BLOCK_O=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return (parts.sum(0) if shares > 1 else parts[0]).permute(2, 1, 0).to(x.dtype).contiguous()


def fused(
    x: Tensor,
    packed: Packed,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    in_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out_lengths: Tensor | None = None,
    x2: Tensor | None = None,
    packed2: Packed | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """mask(relu(conv1d(x) + x2 @ packed2 + bias)) of `x` (N, T, C_in) and `x2` (N, T', C2), into `out` (N, T', C_out).

    All three have unit channel stride and any other strides, so that a slice of a history buffer will do. Rows of x
    and x2 at t >= `in_lengths` (N,) count as zero and are not read; rows of the result at t >= `out_lengths` (N,) are
    zero; tiles wholly there, or beyond the reach of x, cost no loads and no products. `bias` is fp32 (C_out,).
    """
    return _launch(x, packed, stride, padding, dilation, in_lengths, bias, relu, out_lengths, x2, packed2, out)[0]


def _launch(
    x, packed, stride, padding, dilation, in_lengths=None, bias=None, relu=False, out_lengths=None,
    x2=None, packed2=None, out=None, stats=False,
):  # fmt: skip
    _check(x, packed.data)
    n, t, c_in = x.shape
    c_out, taps = packed.c_out, packed.taps
    if c_in != packed.c_in:
        raise ValueError(f"x has {c_in} channels, the weight takes {packed.c_in}")
    t_out = (t + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    if t_out < 1:
        span = dilation * (taps - 1) + 1
        raise ValueError(f"{t} frames with padding {padding} are fewer than {span}, the span of the taps")
    if out is None:
        out = torch.empty((n, t_out, c_out), dtype=x.dtype, device=x.device)
    if out.shape != (n, t_out, c_out):
        raise ValueError(f"out has shape {tuple(out.shape)}, the conv gives {(n, t_out, c_out)}")
    if x2 is not None:
        _check(x2, packed2.data)
        if x2.shape != (n, t_out, packed2.c_in) or packed2.taps != 1 or packed2.c_out != c_out:
            raise ValueError(f"x2 {tuple(x2.shape)} and its weight do not fit an output of {(n, t_out, c_out)}")
    tile = conv_tile(x.dtype, c_in, c_out, t_out)
    t_blocks = triton.cdiv(t_out, tile.t)
    part_mean, part_m2 = torch.empty((2, n * t_blocks, c_out), device=x.device) if stats else (None, None)
    descriptors = _descriptors(x, packed, stride, tile)
    vec_in, x_sizes = _sizes(x)
    vec_2, x2_sizes = _sizes(x2) if x2 is not None else (1, (0, 0, 0))
    vec_out, (_, y_row, y_item) = _sizes(out)
    with _on(x):
        _conv_kernel[(n * t_blocks * triton.cdiv(c_out, tile.n),)](
            x, packed.data, x2, None if x2 is None else packed2.data, out, bias, part_mean, part_m2,
            in_lengths, out_lengths, *descriptors, t, t_out, *x_sizes, *x2_sizes, c_out, y_row, y_item,
            taps, stride, padding, dilation, t_blocks,
            HAS_IN_LENGTHS=in_lengths is not None, HAS_OUT_LENGTHS=out_lengths is not None, HAS_PANES=x2 is not None,
            HAS_BIAS=bias is not None, HAS_RELU=relu, HAS_STATS=stats, HAS_DESCRIPTORS=descriptors[0] is not None,
            VEC_IN=vec_in, VEC_2=vec_2, VEC_OUT=vec_out, PAD=PAD_OUT, **_arithmetic(x),
            BLOCK_T=tile.t, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if not stats:
            return out, None, None
        mean, m2 = torch.empty((2, c_out), device=x.device)
        _stats_merge_kernel[(triton.cdiv(c_out, 32),)](
            part_mean, part_m2, mean, m2, t_out, t_blocks, n * t_blocks, c_out,
            BLOCK_T=tile.t, BLOCK_G=64, BLOCK_C=32, num_warps=4,
        )  # fmt: skip
    return out, mean, m2


def _descriptors(
    x: Tensor, packed: Packed, stride: int, tile: Tile
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """Tensor descriptors of x and of the weight's (K*C_in, C_out) rows where the hardware has TMA and they fit it."""
    wanted = torch.cuda.get_device_capability(x.device)[0] >= 9 if x.is_cuda else INTERPRET_DESCRIPTORS
    aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:2])
    if not (wanted and aligned and stride == 1 and x.element_size() == 2 and packed.c_in % tile.k == 0):
        return None, None
    rows = packed.data.view(-1, packed.data.shape[2])
    return (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tile.t, tile.k]),
        TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [tile.k, tile.n]),
    )


def conv_tile(dtype: torch.dtype, c_in: int, c_out: int, t_out: int) -> Tile:
    """The tile where no measurement says better: 128 x 128 in 16 bits, a quarter in fp32, less for small shapes."""
    wide = dtype.itemsize == 2
    block_t = 128 if wide and t_out > 64 else 64 if t_out > 32 else 32
    block_n = min(128 if wide else 64, max(16, triton.next_power_of_2(c_out)))
    block_k = min(64 if wide else 32, max(16, triton.next_power_of_2(c_in)))
    return Tile(block_t, block_n, block_k, 8 if block_t * block_n >= 128 * 128 else 4, 3)


def wgrad_tile(dtype: torch.dtype, c_in: int, c_out: int) -> Tile:
    """BLOCK_T frames a step; `n` input by `k` output channels."""
    side = 128 if dtype.itemsize == 2 else 64
    block_i = min(side, max(16, triton.next_power_of_2(c_in)))
    block_o = min(side, max(16, triton.next_power_of_2(c_out)))
    return Tile(64 if dtype.itemsize == 2 else 32, block_i, block_o, 8 if block_i * block_o >= 128 * 128 else 4, 3)


def _check(x: Tensor, other: Tensor) -> None:
    if x.dtype not in DTYPES or x.dtype != other.dtype:
        raise TypeError(f"the triton face takes fp32, fp16 or bf16, all alike, got {x.dtype} and {other.dtype}")
    if x[0].numel() >= 1 << 31:
        raise ValueError(f"one utterance of shape {tuple(x.shape[1:])} exceeds 32-bit offsets")
    if x.numel() == 0:
        raise ValueError(f"x has no elements: shape {tuple(x.shape)}")


def _sizes(x: Tensor) -> tuple[int, tuple[int, int, int]]:
    """VEC of `x` (N, T, C), and its channels and the strides of a row and of an item in units of VEC elements."""
    (n, t, c), (item, row, one) = x.shape, x.stride()
    if one != 1 and c > 1:
        raise ValueError(f"channels must be neighbours in memory, got strides {x.stride()} for (N, T, C)")
    row, item = (row if t > 1 else c), (item if n > 1 else t * c)  # a stride that is never taken aligns with all
    vec = next(v for v in (8, 4, 1) if c % v == row % v == item % v == 0)
    return vec, (c // vec, row // vec, item // vec)


def _vec(c: int) -> int:
    """The largest of 8, 4, 1 that divides C: it tells the compiler the alignment without compiling anew for every C."""
    return next(v for v in (8, 4, 1) if c % v == 0)


def _arithmetic(x: Tensor) -> dict[str, object]:
    tf32 = x.dtype == torch.float32 and x.is_cuda and torch.backends.cudnn.allow_tf32
    interpreted = not isinstance(_conv_kernel, triton.JITFunction)
    return {"UPCAST": interpreted and x.dtype == torch.bfloat16, "PRECISION": "tf32" if tf32 else "ieee"}


def _on(x: Tensor):
    """Triton launches on the current device's current stream: make x's device the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---- for compilation without a GPU ----

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_ACTIVATIONS = ("x_ptr", "w_ptr", "x2_ptr", "w2_ptr", "y_ptr", "dy_ptr")
_LENGTHS = ("lengths_ptr", "in_lengths_ptr", "out_lengths_ptr")
_OPTIONAL = {
    "HAS_IN_LENGTHS": ("in_lengths_ptr",),
    "HAS_OUT_LENGTHS": ("out_lengths_ptr",),
    "HAS_PANES": ("x2_ptr", "w2_ptr"),
    "HAS_BIAS": ("bias_ptr",),
    "HAS_RELU": (),
    "HAS_STATS": ("part_mean_ptr", "part_m2_ptr"),
    "HAS_DESCRIPTORS": ("x_desc", "w_desc"),
}


def sources(
    dtype: torch.dtype, c_in: int, c_out: int, t_out: int, *, descriptors: bool = False
) -> Iterator[aot.Source]:
    """The kernels of one layer's shape; with `descriptors` as sm_90 and later launch them."""
    descriptors = descriptors and dtype.itemsize == 2
    vec_in, vec_out = _vec(c_in), _vec(c_out)
    shared = {"UPCAST": False, "PRECISION": "tf32" if dtype == torch.float32 else "ieee"}

    def source(name: str, kernel: triton.JITFunction, tile: Tile, **constants: object) -> aot.Source:
        types = {a: "*fp32" if a.endswith("_ptr") else "i32" for a in kernel.arg_names if a.islower()}
        types |= {a: _TYPES[dtype] for a in _ACTIVATIONS if a in types} | dict.fromkeys(_LENGTHS, "*i64")
        kind = _TYPES[dtype][1:]
        types["x_desc"] = f"tensordesc<{kind}[1, {tile.t}, {tile.k}]>"
        types["w_desc"] = f"tensordesc<{kind}[{tile.k}, {tile.n}]>"
        types = {a: type_ for a, type_ in types.items() if a in kernel.arg_names and a not in constants}
        return aot.Source(name, kernel, types, shared | constants, tile.num_warps, tile.num_stages)

    def conv_source(name: str, vec_in: int, vec_out: int, tile: Tile, *flags: str) -> aot.Source:
        on = {flag: flag in flags for flag in _OPTIONAL} | {"HAS_DESCRIPTORS": descriptors}
        absent = {pointer: None for flag, pointers in _OPTIONAL.items() if not on[flag] for pointer in pointers}
        return source(
            name, _conv_kernel, tile, VEC_IN=vec_in, VEC_2=8, VEC_OUT=vec_out, PAD=PAD_OUT,
            BLOCK_T=tile.t, BLOCK_N=tile.n, BLOCK_K=tile.k, **on, **absent,
        )  # fmt: skip

    tile = conv_tile(dtype, c_in, c_out, t_out)
    folded = ("HAS_IN_LENGTHS", "HAS_OUT_LENGTHS", "HAS_BIAS", "HAS_RELU")
    yield conv_source("forward", vec_in, vec_out, tile, "HAS_IN_LENGTHS")
    yield conv_source("forward stats", vec_in, vec_out, tile, "HAS_IN_LENGTHS", "HAS_STATS")
    yield conv_source("fused", vec_in, vec_out, tile, *folded)
    yield conv_source("fused panes", vec_in, vec_out, tile, *folded, "HAS_PANES")
    yield conv_source("dgrad", vec_out, vec_in, conv_tile(dtype, c_out, c_in, t_out), "HAS_OUT_LENGTHS")
    tile = wgrad_tile(dtype, c_in, c_out)
    yield source(
        "wgrad", _wgrad_kernel, tile, HAS_LENGTHS=True, VEC_IN=vec_in, VEC_OUT=vec_out,
        BLOCK_T=tile.t, BLOCK_I=tile.n, BLOCK_O=tile.k,
    )  # fmt: skip
