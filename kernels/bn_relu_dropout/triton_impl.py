"""bn_relu_dropout in Triton (NVIDIA sm_80 and later; on a CPU through Triton's interpreter).

    forward          z = relu((y - mean)*a + beta [+ residual])/(1-p) where t < length and kept, else 0
    backward_reduce  dbeta = sum g, dgamma = sum g*yhat;  g = dz/(1-p) where z was not set to 0, else 0
    backward_apply   dy = a*(g - mean_g - yhat*mean_gy), dres = g;  a = gamma*rstd

An activation is a matrix of M = N*T rows (frames) by C channels. A pointwise program owns one tile of BLOCK_M rows by
BLOCK_C channels. Per element, forward reads 1 value (2 with a residual) and writes 1; backward_apply reads 2 (3) and
writes 1 (2). A reducing program owns a chunk of rows by BLOCK_C channels and writes one partial result per channel; a
second kernel merges the partial results in a fixed order. Per element, stats reads 1 value and backward_reduce 2 (3
with z). Only stats, and backward_apply with batch statistics, read padding, because these statistics include it. With
`halo`, backward_apply does not read y at t >= length + halo: y is zero there, so all those rows of dy are equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels import launch, philox
from jasper_fast.kernels.conv1d.triton_dgrad import conv1d_sums_merge_kernel
from jasper_fast.kernels.layout import empty_fp32, empty_ntc
from jasper_fast.kernels.operands import Mask, Norm
from jasper_fast.kernels.triton_dropout import keep

TILE_BYTES = 8192  # bytes of forward's tile: 64 per thread and input, so each thread has four 16-byte loads in flight
LANES = 2048  # elements of a reducing tile: 16 per thread; each element has two fp32 accumulators
MIN_ROWS = 128  # minimum rows of a reducing program; partial results then add only a few percent to the bytes moved
MAX_PARTIALS = 256  # maximum partial results per channel; a program of the merge kernel loads all of them together
MERGE_C = 16  # channels per program of the merge kernel
NUM_WARPS = 4
APPLY_LANES, APPLY_WARPS = 2048, 8  # for backward_apply, which holds three tiles and spills on some GPUs at other sizes
# Lengths and seeds may be slices of int64 tensors, so they are not always aligned to 16 bytes. Specialising kernels on
# the alignment would compile each one twice.
_SLICES = ("lengths_ptr", "seed_ptr")


# ---- what several kernels share: N batch, T frames, C channels, C = c_groups * VEC ----


@triton.jit
def _places(m0, rows, frames, BLOCK_M: tl.constexpr):
    """Returns utterance n and frame t of each of the BLOCK_M rows from m0 on.

    Both are unsigned integers, with 32 bits if `rows` has 32. A 64-bit division takes 80 instructions, and a signed
    division costs more than an unsigned one.
    """
    UNSIGNED: tl.constexpr = tl.uint32 if rows.dtype == tl.int32 else tl.uint64
    m0, frames = m0.to(UNSIGNED), tl.cast(frames, UNSIGNED)
    n = m0 // frames
    t = m0 - n * frames + tl.arange(0, BLOCK_M).to(UNSIGNED)
    further = t // frames
    return n + further, t - further * frames


@triton.jit
def _alive(n, t, exists, lengths_ptr, halo=0):
    """True for existing rows that lie before the length of their utterance plus `halo`."""
    return exists & (t < tl.load(lengths_ptr + n, mask=exists, other=0) + halo)


@triton.jit
def _passed(
    z, yc, a, beta, alive, m0, c0, C, seed_ptr, threshold,
    HAS_Z: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """True for elements through which gradient flows: bool [BLOCK_M, BLOCK_C]. yc: y - mean; z: output of forward."""
    if HAS_Z:
        passed = alive & ~(z <= 0)
    else:
        passed = alive & ~(yc * a + beta <= 0)
        if HAS_DROPOUT:
            passed = passed & keep(m0, c0, C, seed_ptr, threshold, BLOCK_M, BLOCK_C, VEC)
    return passed


# ---- statistics ----


@triton.jit(do_not_specialize=["rows", "chunk", "c_groups"])
def _stats_kernel(
    y_ptr, mean_ptr, m2_ptr, rows, chunk, c_groups,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Writes the partial result of chunk g. Each lane of the tile runs Welford's algorithm; then lanes are merged."""
    C = c_groups * VEC
    c_blocks = tl.cdiv(C, BLOCK_C)
    g = (tl.program_id(0) // c_blocks).to(tl.int64)
    c0 = (tl.program_id(0) % c_blocks) * BLOCK_C
    offs_m, offs_c = tl.arange(0, BLOCK_M), c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first = g * chunk
    count = tl.minimum(rows - first, chunk).to(tl.int32)  # rows of this chunk
    tile = y_ptr + first * C
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    full = count // BLOCK_M
    for i in range(full):
        y = tl.load(tile + offs_m[:, None] * C + offs_c[None, :], mask=mask_c[None, :], other=0.0).to(tl.float32)
        delta = y - mean
        mean += delta * (1.0 / tl.cast(i + 1, tl.float32))
        m2 += delta * (y - mean)
        tile += BLOCK_M * C
    here = offs_m < count - full * BLOCK_M  # lanes that have one more row
    y = tl.load(tile + offs_m[:, None] * C + offs_c[None, :], mask=here[:, None] & mask_c[None, :], other=0.0)
    delta = tl.where(here[:, None], y.to(tl.float32) - mean, 0.0)
    step = delta * (1.0 / (full + 1).to(tl.float32))
    mean += step
    m2 += delta * (delta - step)
    weight = (full + here.to(tl.int32)).to(tl.float32)[:, None]  # rows each lane has seen
    total = tl.sum(weight * mean, 0) / count.to(tl.float32)
    spread = mean - total[None, :]
    tl.store(mean_ptr + g * C + offs_c, total, mask=mask_c)
    tl.store(m2_ptr + g * C + offs_c, tl.sum(m2 + weight * spread * spread, 0), mask=mask_c)


@triton.jit(do_not_specialize=["rows", "chunk", "partials", "C"])
def _stats_merge_kernel(
    part_mean_ptr, part_m2_ptr, mean_ptr, m2_ptr, rows, chunk, partials, C,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merges the partial results of BLOCK_C channels (Chan's formula)."""
    offs_g, offs_c = tl.arange(0, BLOCK_G), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_g < partials)[:, None] & mask_c[None, :]
    offs = offs_g[:, None] * C + offs_c[None, :]
    mean = tl.load(part_mean_ptr + offs, mask=mask, other=0.0)
    m2 = tl.load(part_m2_ptr + offs, mask=mask, other=0.0)
    shift = tl.load(part_mean_ptr + offs_c, mask=mask_c, other=0.0)
    weight = tl.minimum(rows - offs_g.to(tl.int64) * chunk, chunk)
    weight = tl.where(offs_g < partials, weight, 0).to(tl.float32)[:, None]
    moved = tl.where(mask, mean - shift[None, :], 0.0)
    total = tl.sum(weight * moved, 0) / tl.cast(rows, tl.float32)
    spread = tl.where(mask, moved - total[None, :], 0.0)
    tl.store(mean_ptr + offs_c, shift + total, mask=mask_c)
    tl.store(m2_ptr + offs_c, tl.sum(m2 + weight * spread * spread, 0), mask=mask_c)


# ---- forward ----


@triton.jit(do_not_specialize=["rows", "frames", "c_groups", "threshold", *_SLICES])
def _forward_kernel(
    y_ptr, residual_ptr, z_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, lengths_ptr, seed_ptr,
    rows, frames, c_groups, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    C = c_groups * VEC
    c_blocks = tl.cdiv(C, BLOCK_C)
    m0 = (tl.program_id(0) // c_blocks).to(tl.int64) * BLOCK_M
    c0 = (tl.program_id(0) % c_blocks) * BLOCK_C
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_m = tl.arange(0, BLOCK_M)  # counted from row m0, so that 32 bits hold the offset of every element
    exists = offs_m < tl.minimum(rows - m0, BLOCK_M).to(tl.int32)
    alive = exists[:, None]
    if HAS_LENGTHS:
        n, t = _places(m0, rows, frames, BLOCK_M)
        alive = _alive(n, t, exists, lengths_ptr)[:, None]
    offs = offs_m[:, None] * C + offs_c[None, :]
    stored = exists[:, None] & mask_c[None, :]
    z = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if tl.max(alive.to(tl.int32)) > 0:  # a tile of padding is written but not read
        mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
        a = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0) * tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
        beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
        y = tl.load(y_ptr + m0 * C + offs, mask=alive & mask_c[None, :], other=0.0).to(tl.float32)
        pre = (y - mean) * a[None, :] + beta
        if HAS_RESIDUAL:
            pre += tl.load(residual_ptr + m0 * C + offs, mask=alive & mask_c[None, :], other=0.0).to(tl.float32)
        kept = alive & ~(pre <= 0)  # a NaN passes
        if HAS_DROPOUT:
            kept = kept & keep(m0, c0, C, seed_ptr, threshold, BLOCK_M, BLOCK_C, VEC)
        z = tl.where(kept, pre * scale, 0.0)
    tl.store(z_ptr + m0 * C + offs, z.to(z_ptr.dtype.element_ty), mask=stored)


# ---- backward ----


@triton.jit(do_not_specialize=["rows", "frames", "chunk", "c_groups", "threshold", *_SLICES])
def _backward_reduce_kernel(
    dz_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, lengths_ptr, seed_ptr, dbeta_ptr, dgamma_ptr,
    rows, frames, chunk, c_groups, threshold, scale,
    HAS_Z: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    C = c_groups * VEC
    c_blocks = tl.cdiv(C, BLOCK_C)
    part = (tl.program_id(0) // c_blocks).to(tl.int64)
    c0 = (tl.program_id(0) % c_blocks) * BLOCK_C
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
    a = (tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0) * rstd)[None, :]
    beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
    offs_m = tl.arange(0, BLOCK_M)
    offs = offs_m[:, None] * C + offs_c[None, :]
    sum_g = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_gy = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = part * chunk
    count = tl.minimum(rows - first, chunk).to(tl.int32)
    if HAS_LENGTHS:
        n, t = _places(first, rows, frames, BLOCK_M)
        step_n = tl.cast(BLOCK_M // frames, n.dtype)
        step_t = tl.cast(BLOCK_M - BLOCK_M // frames * frames, t.dtype)
    for i in range(0, count, BLOCK_M):
        m0 = first + i
        alive = offs_m < count - i
        if HAS_LENGTHS:
            alive = _alive(n, t, alive, lengths_ptr)
            n, t = n + step_n, t + step_t
            wraps = (t >= frames).to(n.dtype)
            n, t = n + wraps, t - wraps * frames
        mask = alive[:, None] & mask_c[None, :]
        dz = tl.load(dz_ptr + m0 * C + offs, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + m0 * C + offs, mask=mask, other=0.0).to(tl.float32)
        z = y
        if HAS_Z:
            z = tl.load(z_ptr + m0 * C + offs, mask=mask, other=0.0).to(tl.float32)
        yc = y - mean
        passed = _passed(
            z, yc, a, beta, mask, m0, c0, C, seed_ptr, threshold, HAS_Z, HAS_DROPOUT, BLOCK_M, BLOCK_C, VEC
        )  # fmt: skip
        g = tl.where(passed, dz * scale, 0.0)
        sum_g += g
        sum_gy += tl.where(passed, g * yc, 0.0)  # a dropped NaN must count as 0, but 0 * NaN is NaN
    tl.store(dbeta_ptr + part * C + offs_c, tl.sum(sum_g, 0), mask=mask_c)
    tl.store(dgamma_ptr + part * C + offs_c, tl.sum(sum_gy, 0) * rstd, mask=mask_c)


@triton.jit(do_not_specialize=["rows", "frames", "halo", "c_groups", "threshold", *_SLICES])
def _backward_apply_kernel(
    dz_ptr, y_ptr, z_ptr, dy_ptr, dres_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, mean_g_ptr, mean_gy_ptr,
    lengths_ptr, seed_ptr, rows, frames, halo, c_groups, threshold, scale,
    HAS_Z: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BATCH_STATS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_HALO: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    C = c_groups * VEC
    c_blocks = tl.cdiv(C, BLOCK_C)
    m0 = (tl.program_id(0) // c_blocks).to(tl.int64) * BLOCK_M
    c0 = (tl.program_id(0) % c_blocks) * BLOCK_C
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_m = tl.arange(0, BLOCK_M)
    exists = offs_m < tl.minimum(rows - m0, BLOCK_M).to(tl.int32)
    rows_alive = exists[:, None]
    if HAS_LENGTHS:
        n, t = _places(m0, rows, frames, BLOCK_M)
        rows_alive = _alive(n, t, exists, lengths_ptr)[:, None]
    mask = rows_alive & mask_c[None, :]
    stored = exists[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
    a = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0)[None, :] * rstd
    needed = mask  # elements of y to read: with batch statistics, all except those known to be zero
    if HAS_BATCH_STATS:
        needed = stored
        if HAS_HALO:
            needed = _alive(n, t, exists, lengths_ptr, halo)[:, None] & mask_c[None, :]
    y = tl.load(y_ptr + m0 * C + offs, mask=needed, other=0.0).to(tl.float32)
    yc = y - mean
    g = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if tl.max(rows_alive.to(tl.int32)) > 0:  # in a tile of padding g is zero (dy may not be)
        beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
        dz = tl.load(dz_ptr + m0 * C + offs, mask=mask, other=0.0).to(tl.float32)
        z = y
        if HAS_Z:
            z = tl.load(z_ptr + m0 * C + offs, mask=mask, other=0.0).to(tl.float32)
        passed = _passed(
            z, yc, a, beta, mask, m0, c0, C, seed_ptr, threshold, HAS_Z, HAS_DROPOUT, BLOCK_M, BLOCK_C, VEC
        )  # fmt: skip
        g = tl.where(passed, dz * scale, 0.0)
    if HAS_BATCH_STATS:
        mean_g = tl.load(mean_g_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
        slope = tl.load(mean_gy_ptr + offs_c, mask=mask_c, other=0.0)[None, :] * rstd
        dy = a * (g - mean_g - yc * slope)
    else:
        dy = a * g
    tl.store(dy_ptr + m0 * C + offs, dy.to(dy_ptr.dtype.element_ty), mask=stored)
    if HAS_RESIDUAL:
        tl.store(dres_ptr + m0 * C + offs, g.to(dres_ptr.dtype.element_ty), mask=stored)


# ---- the face ----


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and M2 of each channel over all N*T rows, fp32 (C,) each; see `reference.stats`."""
    rows, c = _rows(y), y.shape[1]
    mean, m2 = empty_fp32(2, c, like=y)
    chunk, partials = _chunks(rows)
    part_mean, part_m2 = empty_fp32(2, partials, c, like=y)
    block_m, block_c, vec = _blocks(c, LANES)
    launch.run(
        _stats_kernel, (partials * triton.cdiv(c, block_c),), y,
        y, part_mean, part_m2, rows, chunk, c // vec,
        BLOCK_M=block_m, BLOCK_C=block_c, VEC=vec, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch.run(
        _stats_merge_kernel, (triton.cdiv(c, MERGE_C),), y,
        part_mean, part_m2, mean, m2, rows, chunk, partials, c,
        BLOCK_G=MAX_PARTIALS, BLOCK_C=MERGE_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return mean, m2


def forward(y: Tensor, norm: Norm, residual: Tensor | None, mask: Mask) -> Tensor:
    """Returns z (N, C, T) in the dtype of y and in NTC memory; see `reference.forward`."""
    n, c, t = y.shape
    rows = _rows(y)
    z = empty_ntc(n, c, t, like=y)
    block_m, block_c, vec = _blocks(c, TILE_BYTES // y.dtype.itemsize)
    launch.run(
        _forward_kernel, (triton.cdiv(rows, block_m) * triton.cdiv(c, block_c),), y,
        y, residual, z, *norm, mask.lengths, mask.seed,
        rows, t, c // vec, *philox.signed_threshold(mask.p),
        HAS_RESIDUAL=residual is not None, HAS_LENGTHS=mask.lengths is not None, HAS_DROPOUT=mask.p > 0,
        BLOCK_M=block_m, BLOCK_C=block_c, VEC=vec, num_warps=NUM_WARPS,
    )  # fmt: skip
    return z


def backward_reduce(dz: Tensor, y: Tensor, z: Tensor | None, norm: Norm, mask: Mask) -> tuple[Tensor, Tensor]:
    """Returns dbeta = sum g and dgamma = sum g*yhat, fp32 (C,) each; see `reference.backward_reduce`."""
    rows, c = _rows(y), y.shape[1]
    dbeta, dgamma = empty_fp32(2, c, like=y)
    chunk, partials = _chunks(rows)
    part_dbeta, part_dgamma = empty_fp32(2, partials, c, like=y)
    block_m, block_c, vec = _blocks(c, LANES)
    launch.run(
        _backward_reduce_kernel, (partials * triton.cdiv(c, block_c),), y,
        dz, y, z, *norm, mask.lengths, None if z is not None else mask.seed,  # z shows what was dropped
        part_dbeta, part_dgamma,
        rows, y.shape[2], chunk, c // vec, *philox.signed_threshold(mask.p),
        HAS_Z=z is not None, HAS_LENGTHS=mask.lengths is not None, HAS_DROPOUT=mask.p > 0 and z is None,
        BLOCK_M=block_m, BLOCK_C=block_c, VEC=vec, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch.run(
        conv1d_sums_merge_kernel, (triton.cdiv(c, MERGE_C),), y,
        part_dbeta, part_dgamma, dbeta, dgamma, partials, c,
        BLOCK_G=MAX_PARTIALS, BLOCK_C=MERGE_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dbeta, dgamma


def backward_apply(
    dz: Tensor,
    y: Tensor,
    z: Tensor | None,
    norm: Norm,
    means: tuple[Tensor, Tensor] | None,
    mask: Mask,
    has_residual: bool,
    halo: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns dy and, with a residual, dres, in the shape, dtype and memory of y; see `reference.backward_apply`."""
    n, c, t = y.shape
    rows = _rows(y)
    dy = empty_ntc(n, c, t, like=y)
    dres = empty_ntc(n, c, t, like=y) if has_residual else None
    block_m, block_c, vec = _blocks(c, APPLY_LANES)
    launch.run(
        _backward_apply_kernel, (triton.cdiv(rows, block_m) * triton.cdiv(c, block_c),), y,
        dz, y, z, dy, dres, *norm, *(means or (None, None)),
        mask.lengths, None if z is not None else mask.seed,  # z shows what was dropped
        rows, t, halo or 0, c // vec, *philox.signed_threshold(mask.p),
        HAS_Z=z is not None, HAS_RESIDUAL=has_residual, HAS_BATCH_STATS=means is not None,
        HAS_LENGTHS=mask.lengths is not None,
        HAS_HALO=not (halo is None or mask.lengths is None or means is None), HAS_DROPOUT=mask.p > 0 and z is None,
        BLOCK_M=block_m, BLOCK_C=block_c, VEC=vec, num_warps=APPLY_WARPS,
    )  # fmt: skip
    return dy, dres


def _rows(y: Tensor) -> int:
    if y.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the triton face takes fp32, fp16 and bf16, got {y.dtype}: use backend='reference'")
    if y.numel() == 0:
        raise ValueError(f"y has no elements: shape {tuple(y.shape)}")
    return y.shape[0] * y.shape[2]


def _chunks(rows: int) -> tuple[int, int]:
    """Returns the rows of a reducing program, and the number of such programs per block of channels."""
    chunk = max(MIN_ROWS, triton.cdiv(rows, MAX_PARTIALS))
    return chunk, triton.cdiv(rows, chunk)


def _blocks(c: int, elements: int) -> tuple[int, int, int]:
    """Returns BLOCK_M and BLOCK_C, the tile, and VEC, the largest of 8, 4 and 1 that divides C.

    As C is computed as c_groups * VEC in the kernels, the compiler knows that rows are aligned to VEC elements.
    """
    block_c = min(128, max(16, triton.next_power_of_2(c)))
    return elements // block_c, block_c, next(v for v in (8, 4, 1) if c % v == 0)
