"""The gradient of a conv's input at stride 1, and with it the batch norm's reduction of the sub-block before.

    dz[n, t, :] = sum_k dy[n, t + padding - k*dilation, :] @ w[k]^T
    g = dz/(1-p) where t < length, the ReLU was open ((y - mean)*a + beta > 0) and dropout kept, else 0
    dbeta = sum g,   dgamma = sum g*yhat,   yhat = (y - mean)*rstd,   a = gamma*rstd

It is the forward's loop over dy with the taps reversed and each weight tile transposed on its way. A program owns
BLOCK_T frames of one utterance by BLOCK_N of the C channels of z. With HAS_NORM it reads that tile of y and writes g
instead of dz, and leaves the sums of its fp32 g in (tiles, C) partials that a second kernel adds in a fixed order: the
pass over (dz, y) that a separate reduction takes is saved. Tiles at t >= length are zeros, not computed.
"""

import triton
import triton.language as tl

from jasper_fast.kernels.conv1d.triton_loop import add_taps
from jasper_fast.kernels.triton_dropout import keep


@triton.jit
def _store_g(
    dz, c0, n, t0, end, tile, g_ptr, y_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, seed_ptr, part_g_ptr, part_gy_ptr,
    frames, C, threshold, scale, HAS_DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """g and the partial sums of the tile at row t0 of utterance n, channel c0, from its dz [BLOCK_T, BLOCK_N]."""
    offs_t = t0 + tl.arange(0, BLOCK_T)
    offs_c = c0 + tl.arange(0, BLOCK_N)
    mask_c = offs_c < C
    row0 = (n * frames + t0) * C  # of this tile in y and g; the offsets from there hold in 32 bits
    offs = tl.arange(0, BLOCK_T)[:, None] * C + offs_c[None, :]
    g = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    sum_g = tl.zeros([BLOCK_N], tl.float32)
    sum_gy = tl.zeros([BLOCK_N], tl.float32)
    if t0 < end:
        alive = (offs_t < end)[:, None] & mask_c[None, :]
        mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
        rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
        a = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0) * rstd
        beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0)
        yc = tl.load(y_ptr + row0 + offs, mask=alive, other=0.0).to(tl.float32) - mean[None, :]
        passed = alive & ~(yc * a[None, :] + beta[None, :] <= 0)  # a NaN passes
        if HAS_DROPOUT:
            passed = passed & keep(n * frames + t0, c0, C, seed_ptr, threshold, BLOCK_T, BLOCK_N, VEC)
        g = tl.where(passed, dz * scale, 0.0)
        sum_g = tl.sum(g, 0)
        sum_gy = tl.sum(tl.where(passed, g * yc, 0.0), 0) * rstd  # a dropped NaN must not count as 0 * NaN
    tl.store(part_g_ptr + tile * C + offs_c, sum_g, mask=mask_c)
    tl.store(part_gy_ptr + tile * C + offs_c, sum_gy, mask=mask_c)
    tl.store(g_ptr + row0 + offs, g.to(g_ptr.dtype.element_ty), mask=(offs_t < frames)[:, None] & mask_c[None, :])


@triton.jit(
    do_not_specialize=[
        "frames_dy", "frames", "groups_dy", "dy_row", "dy_item", "groups", "taps", "padding", "dilation", "t_blocks",
        "threshold",
    ]
)  # fmt: skip
def conv1d_dgrad_kernel(
    dy_ptr, dy_desc, w_ptr, w_desc, g_ptr, lengths_ptr,
    y_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, seed_ptr, part_g_ptr, part_gy_ptr,
    frames_dy, frames, groups_dy, dy_row, dy_item, groups, taps, padding, dilation, t_blocks, threshold, scale,
    HAS_LENGTHS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
    VEC_DY: tl.constexpr, VEC: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """padding: dilation*(K - 1) less the forward's; y and g are whole (N, T, C) tensors."""
    C_dy = groups_dy * VEC_DY
    C = groups * VEC
    n_blocks = tl.cdiv(C, BLOCK_N)
    tile = (tl.program_id(0) // n_blocks).to(tl.int64)
    c0 = (tl.program_id(0) % n_blocks) * BLOCK_N
    n = tile // t_blocks
    t0 = (tile % t_blocks).to(tl.int32) * BLOCK_T
    end = frames
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths_ptr + n).to(tl.int32), end)
    steps = taps * tl.cdiv(C_dy, BLOCK_K)
    if t0 >= end:
        steps = 0
    acc = add_taps(
        tl.zeros([BLOCK_T, BLOCK_N], tl.float32), dy_ptr + n * dy_item * VEC_DY, dy_desc, w_ptr, w_desc, n, t0,
        frames_dy, c0, 0, steps, frames_dy, C_dy, C, tl.cdiv(C_dy, PAD) * PAD, dy_row * VEC_DY, 1, taps, 1, padding,
        dilation, HAS_DESCRIPTORS, False, True, UPCAST, PRECISION, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_NORM:  # in two halves of the channels: all at once does not fit the registers
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_T, 2, BLOCK_N // 2]), (0, 2, 1)))
        for half in tl.static_range(2):
            _store_g(
                left if half == 0 else right, c0 + half * (BLOCK_N // 2), n, t0, end, tile, g_ptr,
                y_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, seed_ptr, part_g_ptr, part_gy_ptr,
                frames, C, threshold, scale, HAS_DROPOUT, BLOCK_T, BLOCK_N // 2, VEC,
            )  # fmt: skip
    else:
        offs_t = t0 + tl.arange(0, BLOCK_T)
        offs_c = c0 + tl.arange(0, BLOCK_N)
        offs = tl.arange(0, BLOCK_T)[:, None] * C + offs_c[None, :]
        g = tl.where((offs_t < end)[:, None], acc, 0.0).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + (n * frames + t0) * C + offs, g, mask=(offs_t < frames)[:, None] & (offs_c < C)[None, :])


@triton.jit(do_not_specialize=["tiles", "C"])
def conv1d_sums_merge_kernel(
    part_a_ptr, part_b_ptr, a_ptr, b_ptr, tiles, C, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Two sums over (tiles, C) partials, BLOCK_G tiles at a time in a fixed order, for BLOCK_C channels."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    a = tl.zeros([BLOCK_C], tl.float32)
    b = tl.zeros([BLOCK_C], tl.float32)
    for g0 in range(0, tiles, BLOCK_G):
        offs_g = g0 + tl.arange(0, BLOCK_G)
        mask = (offs_g < tiles)[:, None] & mask_c[None, :]
        offs = offs_g.to(tl.int64)[:, None] * C + offs_c[None, :]
        a += tl.sum(tl.load(part_a_ptr + offs, mask=mask, other=0.0), 0)
        b += tl.sum(tl.load(part_b_ptr + offs, mask=mask, other=0.0), 0)
    tl.store(a_ptr + offs_c, a, mask=mask_c)
    tl.store(b_ptr + offs_c, b, mask=mask_c)
