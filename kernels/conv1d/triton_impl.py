"""conv1d in Triton as K shifted GEMMs over NTC memory (NVIDIA sm_80 and later; numpy through Triton's interpreter).

    forward  y[n, t, :]  = sum_k x[n, t*stride + k*dilation - padding, :] @ w[k]
    dgrad    the same kernel over dy with the taps reversed and each transposed (stride 1)
    wgrad    dw[k] = sum_(n,t) x[n, t*stride + k*dilation - padding, :]^T dy[n, t, :]

N batch, T frames, C channels, K taps. A forward program owns BLOCK_T frames of one utterance by BLOCK_N output
channels; its loop runs over chunks of BLOCK_K input channels and, innermost, over the taps, so that a chunk's frames
are read from cache K - 1 times of K. A wgrad program owns BLOCK_I by BLOCK_O of one tap, over a share of the
utterances; shares are added in a fixed order. No im2col and no transpose of an activation. Accumulators are fp32. A
tile whose inputs all lie beyond the utterance's length is not computed: it is zero. Loads are masked pointers, which
become cp.async; weights are packed to (K, C_in, C_out) with C_out rounded up to 16, so that each of their rows starts
on 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels import aot
from jasper_fast.kernels.layout import empty_ntc

PAD_OUT = 16  # packed weights' rows are a multiple of this many channels
SHARES = 264  # wgrad programs wanted: two for each SM of a large GPU, and not the device's own count, so runs repeat
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """BLOCK_T frames by BLOCK_N output channels, BLOCK_K input channels a step."""

    t: int
    n: int
    k: int
    num_warps: int
    num_stages: int


class Statistics(NamedTuple):
    """Per-channel mean and M2 (sum of squared deviations) over all N*T' rows: fp32 (C_out,) each."""

    mean: Tensor
    m2: Tensor


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:  # the interpreter's bf16 product is garbage; fp32 holds bf16 exactly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "frames", "frames_out", "groups_in", "c_out", "groups_out", "taps", "stride", "padding", "dilation", "t_blocks",
    ]
)  # fmt: skip
def _conv_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, part_mean_ptr, part_m2_ptr, lengths_ptr,
    frames, frames_out, groups_in, c_out, groups_out, taps, stride, padding, dilation, t_blocks,
    HAS_LENGTHS: tl.constexpr, MASK_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RELU: tl.constexpr,
    HAS_STATS: tl.constexpr, VEC_IN: tl.constexpr, VEC_OUT: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    C_in = groups_in * VEC_IN
    C_out = groups_out * VEC_OUT  # = c_out, with its alignment
    C_pad = tl.cdiv(c_out, PAD) * PAD
    n_blocks = tl.cdiv(C_out, BLOCK_N)
    tile = (tl.program_id(0) // n_blocks).to(tl.int64)  # channels innermost: neighbours share their frames of x in L2
    n = tile // t_blocks
    t0 = (tile % t_blocks).to(tl.int32) * BLOCK_T
    offs_o = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t = t0 + tl.arange(0, BLOCK_T)
    offs_c = tl.arange(0, BLOCK_K)
    mask_o = offs_o < C_out
    limit = frames  # inputs at and beyond it are zero
    end = frames_out  # outputs at and beyond it are zero
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + n).to(tl.int32)
        if MASK_OUT:
            end = tl.minimum(length, end)
        else:
            limit = tl.minimum(length, limit)
    x_tile = x_ptr + n * frames * C_in
    first = offs_t * stride - padding
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    steps = taps * tl.cdiv(C_in, BLOCK_K)
    if (t0 * stride - padding >= limit) | (t0 >= end):
        steps = 0
    for i in range(steps):
        tap = i % taps
        c0 = (i // taps) * BLOCK_K
        t_in = first + tap * dilation
        mask_t = (t_in >= 0) & (t_in < limit)
        mask_c = c0 + offs_c < C_in
        x = tl.load(
            x_tile + (t_in[:, None] * C_in + (c0 + offs_c)[None, :]), mask=mask_t[:, None] & mask_c[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + ((tap * C_in + c0 + offs_c)[:, None] * C_pad + offs_o[None, :]),
            mask=mask_c[:, None] & (offs_o < C_pad)[None, :], other=0.0,
        )  # fmt: skip
        acc = _dot(x, w, acc, UPCAST, PRECISION)
    rows = offs_t < frames_out
    if HAS_STATS:
        count = tl.minimum(frames_out - t0, BLOCK_T).to(tl.float32)
        mean = tl.sum(tl.where(rows[:, None], acc, 0.0), 0) / count
        spread = tl.where(rows[:, None], acc - mean[None, :], 0.0)
        tl.store(part_mean_ptr + tile * C_out + offs_o, mean, mask=mask_o)
        tl.store(part_m2_ptr + tile * C_out + offs_o, tl.sum(spread * spread, 0), mask=mask_o)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    if HAS_RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # a NaN passes
    if MASK_OUT:
        acc = tl.where((offs_t < end)[:, None], acc, 0.0)
    y_tile = y_ptr + (n * frames_out + t0) * C_out
    offs = tl.arange(0, BLOCK_T)[:, None] * C_out + offs_o[None, :]
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


def pack(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """`weight` (C_out, C_in, K) as the forward kernel wants it: (K, C_in, C_out rounded up to 16), zero-filled."""
    return _pack(weight.permute(2, 1, 0), out)


def pack_reversed(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """`weight` (C_out, C_in, K) as dgrad wants it: taps reversed, (K, C_out, C_in rounded up to 16)."""
    return _pack(weight.flip(2).permute(2, 0, 1), out)


def forward(
    x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, lengths: Tensor | None = None
) -> Tensor:
    """y (N, C_out, T') of `x` (N, C_in, T) and `weight` (C_out, C_in, K); `x` is zero at t >= `lengths` (N,).

    fp32 (TF32 where torch.backends.cudnn.allow_tf32, as PyTorch's own conv), fp16, bf16. Equivalent to
    `F.conv1d(x, weight, None, stride, padding, dilation)`.
    """
    return conv(x, pack(weight), weight.shape[0], stride, padding, dilation, lengths)[0]


def dgrad(
    dy: Tensor, weight: Tensor, t: int, stride: int, padding: int, dilation: int, lengths: Tensor | None = None
) -> Tensor:
    """dx (N, C_in, T) of `dy` (N, C_out, T'), stride 1; zero at t >= `lengths` (N,), where nobody asks for it."""
    if stride != 1:
        raise ValueError(f"the triton face's dgrad takes stride 1, got {stride}: its input is the features")
    k = weight.shape[2]
    if dy.shape[2] != t + 2 * padding - dilation * (k - 1):
        raise ValueError(f"dy has {dy.shape[2]} frames, which {t} frames of x do not give")
    reach = dilation * (k - 1) - padding
    return conv(dy, pack_reversed(weight), weight.shape[1], 1, reach, dilation, lengths, mask_out=True)[0]


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


def conv(
    x: Tensor,
    packed: Tensor,
    c_out: int,
    stride: int,
    padding: int,
    dilation: int,
    lengths: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    mask_out: bool = False,
    stats: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """y (N, C_out, T') = mask(relu(conv(x) + bias)) from packed weights, and the statistics of the bare conv.

    `lengths` (N,) bounds the input, or with `mask_out` the output, which is zero from there on. `bias` is (C_out,)
    in fp32. `stats` are those of the fp32 accumulators, not of `y` as rounded.
    """
    _check(x, packed)
    n, c_in, t = x.shape
    taps = packed.shape[0]
    t_out = (t + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    if t_out < 1:
        raise ValueError(f"{t} frames with padding {padding} are fewer than {dilation * (taps - 1) + 1} that taps span")
    tile = conv_tile(x.dtype, c_in, c_out, t_out)
    t_blocks = triton.cdiv(t_out, tile.t)
    y = empty_ntc(n, c_out, t_out, like=x)
    part_mean, part_m2 = torch.empty((2, n * t_blocks, c_out), device=x.device) if stats else (None, None)
    vec_in, vec_out = _vec(c_in), _vec(c_out)
    with _on(x):
        _conv_kernel[(n * t_blocks * triton.cdiv(c_out, tile.n),)](
            x, packed, y, bias, part_mean, part_m2, lengths,
            t, t_out, c_in // vec_in, c_out, c_out // vec_out, taps, stride, padding, dilation, t_blocks,
            HAS_LENGTHS=lengths is not None, MASK_OUT=mask_out, HAS_BIAS=bias is not None, HAS_RELU=relu,
            HAS_STATS=stats, VEC_IN=vec_in, VEC_OUT=vec_out, PAD=PAD_OUT, **_arithmetic(x),
            BLOCK_T=tile.t, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if not stats:
            return y, None
        mean, m2 = torch.empty((2, c_out), device=x.device)
        _stats_merge_kernel[(triton.cdiv(c_out, 32),)](
            part_mean, part_m2, mean, m2, t_out, t_blocks, n * t_blocks, c_out,
            BLOCK_T=tile.t, BLOCK_G=64, BLOCK_C=32, num_warps=4,
        )  # fmt: skip
    return y, Statistics(mean, m2)


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


def _pack(weight: Tensor, out: Tensor | None) -> Tensor:
    k, rows, columns = weight.shape
    padded = triton.cdiv(columns, PAD_OUT) * PAD_OUT
    if out is None:
        out = weight.new_zeros((k, rows, padded))
    out[:, :, :columns] = weight
    return out


def _check(x: Tensor, other: Tensor) -> None:
    if x.dtype not in DTYPES or x.dtype != other.dtype:
        raise TypeError(f"the triton face takes fp32, fp16 or bf16, all alike, got {x.dtype} and {other.dtype}")
    if x.shape[1] * x.shape[2] >= 1 << 31:
        raise ValueError(f"one utterance of {x.shape[2]} frames by {x.shape[1]} channels exceeds 32-bit offsets")
    if x.numel() == 0:
        raise ValueError(f"x has no elements: shape {tuple(x.shape)}")


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
_ACTIVATIONS = ("x_ptr", "w_ptr", "y_ptr", "dy_ptr")


def sources(dtype: torch.dtype, c_in: int, c_out: int, t_out: int) -> Iterator[aot.Source]:
    """The kernels of forward, with and without statistics or bias and ReLU, dgrad and wgrad for one layer's shape."""
    vec_in, vec_out = _vec(c_in), _vec(c_out)
    shared = {"UPCAST": False, "PRECISION": "tf32" if dtype == torch.float32 else "ieee"}

    def source(name: str, kernel: triton.JITFunction, tile: Tile, **constants: object) -> aot.Source:
        types = {a: "*fp32" if a.endswith("_ptr") else "i32" for a in kernel.arg_names if a.islower()}
        types |= {a: _TYPES[dtype] for a in _ACTIVATIONS if a in types} | {"lengths_ptr": "*i64"}
        types = {a: type_ for a, type_ in types.items() if a not in constants}
        return aot.Source(name, kernel, types, shared | constants, tile.num_warps, tile.num_stages)

    def conv_source(name: str, vec_in: int, vec_out: int, tile: Tile, *flags: str) -> aot.Source:
        on = {flag: flag in flags for flag in ("MASK_OUT", "HAS_BIAS", "HAS_RELU", "HAS_STATS")}
        absent = {} if on["HAS_BIAS"] else {"bias_ptr": None}
        absent |= {} if on["HAS_STATS"] else {"part_mean_ptr": None, "part_m2_ptr": None}
        return source(
            name, _conv_kernel, tile, HAS_LENGTHS=True, VEC_IN=vec_in, VEC_OUT=vec_out, PAD=PAD_OUT,
            BLOCK_T=tile.t, BLOCK_N=tile.n, BLOCK_K=tile.k, **on, **absent,
        )  # fmt: skip

    tile = conv_tile(dtype, c_in, c_out, t_out)
    yield conv_source("forward", vec_in, vec_out, tile)
    yield conv_source("forward stats", vec_in, vec_out, tile, "HAS_STATS")
    yield conv_source("forward bias relu mask", vec_in, vec_out, tile, "MASK_OUT", "HAS_BIAS", "HAS_RELU")
    yield conv_source("dgrad", vec_out, vec_in, conv_tile(dtype, c_out, c_in, t_out), "MASK_OUT")
    tile = wgrad_tile(dtype, c_in, c_out)
    yield source(
        "wgrad", _wgrad_kernel, tile, HAS_LENGTHS=True, VEC_IN=vec_in, VEC_OUT=vec_out,
        BLOCK_T=tile.t, BLOCK_I=tile.n, BLOCK_O=tile.k,
    )  # fmt: skip
