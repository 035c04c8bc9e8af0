"""The gradient of a conv's input at stride 1, with the batch norm reductions of the sub-block before it.

    dz[n, t, :] = sum_k dy[n, t + padding - k*dilation, :] @ w[k]^T
    g = dz/(1-p) where z > 0 (t < length, ReLU open, element kept by dropout), else 0
    dbeta = sum g,   dgamma = sum g*yhat,   yhat = (y - mean)*rstd

The kernel runs the forward's loop over dy, with the taps reversed and each weight tile transposed as it is loaded. A
program owns BLOCK_T frames of one utterance by BLOCK_N of the C channels of z. With HAS_NORM it reads the same tile of
y and z, and writes g instead of dz. It also writes the sums of its fp32 g and g*yhat to (tiles, C) partial results,
which a second kernel adds in a fixed order. A separate reduction would need another pass over dz and y. To find where
z > 0, the kernel reads z. Drawing the dropout mask again would save that read, but needs more registers, and wgrad
reads z in any case. Tiles at t >= length are filled with zeros.
"""

import triton
import triton.language as tl

from jasper_fast.kernels.conv1d.triton_loop import add_taps, halves


@triton.jit
def _store_g(
    dz, c0, n, t0, end, tile, g_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr, part_g_ptr, part_gy_ptr,
    frames, C, scale, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores g and the partial sums of the tile at row t0 and channel c0 of utterance n, given its dz."""
    offs_t = t0 + tl.arange(0, BLOCK_T)
    offs_c = c0 + tl.arange(0, BLOCK_N)
    mask_c = offs_c < C
    row0 = (n * frames + t0) * C  # where the tile starts in y, z and g; offsets from there fit in 32 bits
    offs = tl.arange(0, BLOCK_T)[:, None] * C + offs_c[None, :]
    g = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    sum_g = tl.zeros([BLOCK_N], tl.float32)
    sum_gy = tl.zeros([BLOCK_N], tl.float32)
    if t0 < end:
        alive = (offs_t < end)[:, None] & mask_c[None, :]
        passed = ~(tl.load(z_ptr + row0 + offs, mask=alive, other=0.0).to(tl.float32) <= 0)  # a NaN passes
        yc = tl.load(y_ptr + row0 + offs, mask=alive, other=0.0).to(tl.float32)
        yc = yc - tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
        g = tl.where(passed, dz * scale, 0.0)
        sum_g = tl.sum(g, 0)
        # an element that did not pass must count as 0, but 0 * NaN is NaN
        sum_gy = tl.sum(tl.where(passed, g * yc, 0.0), 0) * tl.load(rstd_ptr + offs_c, mask=mask_c, other=0.0)
    tl.store(part_g_ptr + tile * C + offs_c, sum_g, mask=mask_c)
    tl.store(part_gy_ptr + tile * C + offs_c, sum_gy, mask=mask_c)
    tl.store(g_ptr + row0 + offs, g.to(g_ptr.dtype.element_ty), mask=(offs_t < frames)[:, None] & mask_c[None, :])


@triton.jit(
    do_not_specialize=[
        "frames_dy", "frames", "groups_dy", "dy_row", "dy_item", "groups", "taps", "padding", "dilation", "t_blocks",
        "lengths_ptr",
    ]
)  # fmt: skip
def conv1d_dgrad_kernel(
    dy_ptr, dy_desc, w_ptr, w_desc, g_ptr, lengths_ptr,
    y_ptr, z_ptr, mean_ptr, rstd_ptr, part_g_ptr, part_gy_ptr,
    frames_dy, frames, groups_dy, dy_row, dy_item, groups, taps, padding, dilation, t_blocks, scale,
    HAS_LENGTHS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
    VEC_DY: tl.constexpr, VEC: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """padding: dilation*(K - 1) minus the forward's padding; y, z and g are contiguous (N, T, C)."""
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
        frames_dy, c0, 0, steps, frames_dy, C_dy, C, tl.cdiv(C_dy, PAD) * PAD, dy_row * VEC_DY, 1, taps, padding,
        dilation, 1, HAS_DESCRIPTORS, True, False, True, UPCAST, PRECISION, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_NORM:  # by halves of the channels, to avoid spills; on sm_90 by quarters, so that an SM holds two programs
        PARTS: tl.constexpr = 4 if HAS_DESCRIPTORS else 2
        left, right = halves(acc, BLOCK_T, BLOCK_N)
        for i in tl.static_range(PARTS):
            part = left if 2 * i < PARTS else right
            if PARTS == 4:
                first, second = halves(part, BLOCK_T, BLOCK_N // 2)
                part = first if i % 2 == 0 else second
            _store_g(
                part, c0 + i * (BLOCK_N // PARTS), n, t0, end, tile, g_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr,
                part_g_ptr, part_gy_ptr, frames, C, scale, BLOCK_T, BLOCK_N // PARTS,
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
    """Adds two sets of (tiles, C) partial results over the tiles, BLOCK_G at a time in a fixed order."""
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
