"""The Triton face of conv1d (NVIDIA sm_80 and later; on a CPU through Triton's interpreter): launches and checks.

N batch, C channels, T frames, K taps. The kernels are in triton_forward.py, triton_dgrad.py and triton_wgrad.py for
training, triton_fused.py for inference and triton_pack.py for weights. triton_loop.py is the reduction that forward,
dgrad and fused share. Activations are fp16, bf16 or fp32. fp32 is rounded to TF32 if PyTorch's own conv does so (see
`takes_tf32`). Accumulators are fp32.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from jasper_fast.kernels import launch, tables
from jasper_fast.kernels.conv1d import triton_tiles
from jasper_fast.kernels.conv1d.gpu_shared import (
    ALONE,
    Chain,
    Packed,
    Workspace,
    check_offsets,
    check_operands,
    check_sub_block,
    dgrad_padding,
    frames_of,
    fused_out,
    out_frames,
    pack_buffer,
    packed_weight,
    sizes,
)
from jasper_fast.kernels.conv1d.triton_dgrad import conv1d_dgrad_kernel, conv1d_sums_merge_kernel
from jasper_fast.kernels.conv1d.triton_forward import conv1d_forward_kernel, conv1d_stats_merge_kernel
from jasper_fast.kernels.conv1d.triton_fused import conv1d_fused_kernel
from jasper_fast.kernels.conv1d.triton_pack import PAD_OUT, conv1d_pack_kernel
from jasper_fast.kernels.conv1d.triton_tiles import MERGE_C, MERGE_G, Shape, Tile, transpose_meta
from jasper_fast.kernels.conv1d.triton_wgrad import conv1d_wgrad_kernel, conv1d_wgrad_merge_kernel
from jasper_fast.kernels.layout import empty_fp32, empty_ntc
from jasper_fast.kernels.operands import FULL, Geometry, Lengths, Mask, Norm

INTERPRET_DESCRIPTORS = False  # tests set it to run the descriptor loops in the interpreter


def pack(weight: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Packed:
    """Packs `weight` (C_out, C_in, K) for the functions here, in `dtype`. Both are fp32, fp16 or bf16.

    The default dtype is that of `out`, or without `out` that of `weight`. out: a buffer of `packed_shape(weight)` to
    write into, which a module may keep from call to call. Raises TypeError for other dtypes, and ValueError if `out`
    does not fit.
    """
    w, out = pack_buffer("triton", tables.DTYPES, weight, packed_shape(weight), dtype, out)
    c_out, c_in, taps = w.shape
    meta = transpose_meta(taps)
    launch.run(
        conv1d_pack_kernel, _transpose_grid(c_in, out.shape[2], meta), w, w, out, taps, c_in, c_out,
        PAD=PAD_OUT, num_warps=4, **meta,
    )  # fmt: skip
    return Packed(out, *w.shape)


def packed_shape(weight: Tensor) -> tuple[int, int, int]:
    """Returns the shape of what `pack` writes for `weight` (C_out, C_in, K): (K, C_in, C_pad).

    C_pad is C_out rounded up to a multiple of 16.
    """
    c_out, c_in, taps = weight.shape
    return taps, c_in, triton.cdiv(c_out, PAD_OUT) * PAD_OUT


def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns y (N, C_out, T'), the conv of `x` (N, C_in, T) with `weight` (C_out, C_in, K), in NTC memory.

    x counts as zero at t >= `lengths` (N,). packed: `pack(weight, x.dtype).data`; made here if None. clean: these rows
    of x are zero in memory too, so tiles that reach into the padding need no mask. Equivalent to
    `F.conv1d(x.masked_fill(t >= lengths, 0), weight, None, *geometry)` in the dtype of `x`.
    """
    return _forward(x, weight, geometry, lengths, packed, clean, stats=False)[0]


def forward_stats(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y of `forward`, and the mean and M2 (sum of squared deviations) of each channel over all N*T' rows.

    The statistics are taken from the fp32 accumulators before y is rounded: fp32 (C_out,) each.
    """
    return _forward(x, weight, geometry, lengths, packed, clean, stats=True)


def _forward(x, weight, geometry, lengths, packed, clean, stats):
    w, (stride, padding, dilation) = _packed(weight, packed, x), geometry
    n, c_in, t = x.shape
    t_out = frames_of(t, c_in, w, geometry)
    op = "forward_stats" if stats else "forward"
    tile = triton_tiles.choose(op, x.device, x.dtype, Shape(c_in, w.c_out, w.taps, stride, dilation, n * t_out), t_out)
    t_blocks = triton.cdiv(t_out, tile.t)
    y = empty_ntc(n, w.c_out, t_out, like=x)
    check_offsets(y)
    part_mean, part_m2 = empty_fp32(2, n * t_blocks, w.c_out, like=x) if stats else (None, None)
    vec_in, (groups, x_row, x_item) = sizes(x.transpose(1, 2))
    vec_out, (_, y_row, y_item) = sizes(y.transpose(1, 2))
    x_desc = _activations(x.transpose(1, 2), stride, tile.t, tile.k)
    launch.run(
        conv1d_forward_kernel, (n * t_blocks * triton.cdiv(w.c_out, tile.n),), x,
        x, x_desc, w.data, _weights(w, tile.k, tile.n, x_desc is not None), y, part_mean, part_m2, lengths,
        t, t_out, groups, x_row, x_item, w.c_out, y_row, y_item, w.taps, padding, dilation, t_blocks,
        STRIDE=stride, HAS_LENGTHS=lengths is not None, HAS_STATS=stats, HAS_DESCRIPTORS=x_desc is not None,
        IS_CLEAN=x_desc is not None and (clean or lengths is None),
        VEC_IN=vec_in, VEC_OUT=vec_out, PAD=PAD_OUT, **_arithmetic(x), **_blocks(tile),
    )  # fmt: skip
    if not stats:
        return y, None, None
    mean, m2 = empty_fp32(2, w.c_out, like=x)
    launch.run(
        conv1d_stats_merge_kernel, (triton.cdiv(w.c_out, MERGE_C),), x,
        part_mean, part_m2, mean, m2, t_out, t_blocks, n * t_blocks, w.c_out,
        BLOCK_T=tile.t, BLOCK_G=MERGE_G, BLOCK_C=MERGE_C, num_warps=4,
    )  # fmt: skip
    return y, mean, m2


def dgrad(
    dy: Tensor,
    weight: Tensor,
    t: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of x, (N, C_in, T = `t`) in NTC memory, from `dy` (N, C_out, T') for a conv of stride 1.

    The gradient is zero at t >= `lengths`.
    """
    return _dgrad(dy, weight, t, geometry, lengths, packed)[0]


def dgrad_bn(
    dy: Tensor,
    weight: Tensor,
    geometry: Geometry,
    y: Tensor,
    z: Tensor,
    norm: Norm,
    mask: Mask,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (g, dbeta, dgamma): `dgrad` at stride 1 and the `backward_reduce` of bn_relu_dropout in one pass.

    dy (N, C_out, T') is the gradient of the conv's output. The conv's input was `z` = mask(dropout(relu(batch norm of
    `y`))), with the vectors in `norm` and the lengths and dropout in `mask`; y and z are (N, C, T). g has the shape and
    dtype of y and is the gradient at the input of the ReLU, which was open where z > 0. dbeta = sum g and
    dgamma = sum g*yhat are (C,) fp32, summed before g is rounded.
    """
    return _dgrad(dy, weight, y.shape[2], geometry, mask.lengths, packed, (y, z, norm.mean, norm.rstd, mask.p))


def _dgrad(dy, weight, t, geometry, lengths, packed, norm=None):
    w, (n, c_out, t_dy), dilation = _packed(weight, packed, dy), dy.shape, geometry.dilation
    padding = dgrad_padding("triton", dy, w, t, geometry)
    op = "dgrad" if norm is None else "dgrad_bn"
    tile = triton_tiles.choose(op, dy.device, dy.dtype, Shape(w.c_in, c_out, w.taps, 1, dilation, n * t_dy), t)
    t_blocks = triton.cdiv(t, tile.t)
    y, z, mean, rstd, p = (None,) * 4 + (0.0,) if norm is None else norm
    g = empty_ntc(n, w.c_in, t, like=dy)
    if norm is not None:
        check_sub_block(y, z, g)
    part_g, part_gy = (None, None) if norm is None else empty_fp32(2, n * t_blocks, w.c_in, like=dy)
    vec_dy, (groups_dy, dy_row, dy_item) = sizes(dy.transpose(1, 2))
    vec, (groups, _, _) = sizes(g.transpose(1, 2))
    dy_desc = _activations(dy.transpose(1, 2), 1, tile.t, tile.k)
    launch.run(
        conv1d_dgrad_kernel, (n * t_blocks * triton.cdiv(w.c_in, tile.n),), dy,
        dy, dy_desc, w.data, _weights(w, tile.n, tile.k, dy_desc is not None), g, lengths,
        y, z, mean, rstd, part_g, part_gy,
        t_dy, t, groups_dy, dy_row, dy_item, groups, w.taps, padding, dilation, t_blocks,
        1 / (1 - p), HAS_LENGTHS=lengths is not None, HAS_NORM=norm is not None, HAS_DESCRIPTORS=dy_desc is not None,
        VEC_DY=vec_dy, VEC=vec, PAD=PAD_OUT, **_arithmetic(dy), **_blocks(tile),
    )  # fmt: skip
    if norm is None:
        return g, None, None
    dbeta, dgamma = empty_fp32(2, w.c_in, like=dy)
    launch.run(
        conv1d_sums_merge_kernel, (triton.cdiv(w.c_in, MERGE_C),), dy,
        part_g, part_gy, dbeta, dgamma, n * t_blocks, w.c_in, BLOCK_G=MERGE_G, BLOCK_C=MERGE_C, num_warps=4,
    )  # fmt: skip
    return g, dbeta, dgamma


def wgrad(
    x: Tensor,
    dy: Tensor,
    k: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns the gradient of the weight, (C_out, C_in, K = `k`), from `x` (N, C_in, T) and `dy` (N, C_out, T').

    Both are dense in NTC memory; x counts as zero at t >= `lengths` (N,). The result is in `dtype` (default: that of
    `x`). clean: as in `forward`.
    """
    _check(x, dy)
    check_offsets(dy)
    n, c_in, t = x.shape
    (stride, padding, dilation), (c_out, t_out) = geometry, dy.shape[1:]
    if dy.shape[0] != n or t_out != out_frames(t, k, geometry):
        raise ValueError(f"dy {tuple(dy.shape)} does not fit the conv of x {tuple(x.shape)} with {k} taps")
    if not (x.transpose(1, 2).is_contiguous() and dy.transpose(1, 2).is_contiguous()):
        raise ValueError(f"x and dy must be dense in NTC memory, got strides {x.stride()} and {dy.stride()}")
    tile = triton_tiles.choose("wgrad", x.device, x.dtype, Shape(c_in, c_out, k, stride, dilation, n * t_out), t_out)
    share = triton.cdiv(n, min(n, tile.splits))
    shares = triton.cdiv(n, share)
    dw = torch.empty((c_out, c_in, k), dtype=dtype or x.dtype, device=x.device)
    direct = shares == 1 and k > 1  # with one tap, the merge kernel writes dw, because it stores 16 bytes at a time
    to = dw if direct else torch.empty((shares, k, c_in, c_out), dtype=torch.float32, device=x.device)
    (vec_in, (groups_in, _, _)), (vec_out, (groups_out, _, _)) = (sizes(v.transpose(1, 2)) for v in (x, dy))
    x_desc = _activations(x.transpose(1, 2), stride, tile.t, tile.n)
    dy_desc = None if x_desc is None else _activations(dy.transpose(1, 2), 1, tile.t, tile.k)
    both = dy_desc is not None
    is_clean = both and (clean or lengths is None)
    taps = triton_tiles.wgrad_taps(tile, k) if is_clean and stride == 1 else 1
    programs = triton.cdiv(k, taps) * triton.cdiv(c_in, tile.n) * triton.cdiv(c_out, tile.k)
    launch.run(
        conv1d_wgrad_kernel, (programs * shares,), x,
        x, x_desc if both else None, dy, dy_desc, to, lengths,
        n, t, t_out, groups_in, groups_out, k, padding, dilation, share,
        STRIDE=stride, HAS_LENGTHS=lengths is not None, HAS_DESCRIPTORS=both,
        IS_CLEAN=is_clean, IS_DIRECT=direct, VEC_IN=vec_in, VEC_OUT=vec_out,
        **_arithmetic(x), TAPS=taps,
        BLOCK_T=tile.t, BLOCK_I=tile.n, BLOCK_O=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if direct:
        return dw
    meta = transpose_meta(k)
    launch.run(
        conv1d_wgrad_merge_kernel, _transpose_grid(c_in, c_out, meta), x, to, dw, shares, k, c_in, c_out,
        num_warps=4, **meta,
    )  # fmt: skip
    return dw


def pack_once(weight: Tensor, dtype: torch.dtype, stride: int = 1) -> Packed:
    """Packs `weight` (C_out, C_in, K) of any dtype for many calls of `fused` at `stride`, in a network in `dtype`."""
    return pack(weight.float(), dtype)


def fused(
    x: Tensor,
    packed: Packed,
    geometry: Geometry,
    *,
    lengths: Lengths = FULL,
    bias: Tensor | None = None,
    relu: bool = False,
    panes: tuple[Tensor, Packed] | None = None,
    out: Tensor | None = None,
    clean: bool = False,
    log_softmax: bool = False,
    workspace: Workspace | None = None,
    chain: Chain = ALONE,
) -> Tensor:
    """Returns mask(relu(conv1d(x) + x2 @ packed2 + bias)), (N, T', C_out), for `x` (N, T, C_in), in `out` if given.

    panes: x2 (N, T', C2) and packed2, a 1x1 conv. `out` and x2 need unit channel stride; their other strides are free,
    so they may be slices of wider buffers. `x` has unit channel stride too, or it is features with unit frame stride,
    which may be fp32 for any dtype of the pack. Rows of x and x2 at t >= `lengths.before` count as zero. Rows of the
    result at t >= `lengths.after` are zero. A tile that has only such rows, or only rows that depend on no row of x and
    x2, multiplies nothing. If output lengths mask the result, `out` may have more rows than the conv produces. `bias`
    is fp32 (C_out,).

    clean: as in `forward`, for x and x2. log_softmax: ends with a log-softmax over C_out, at most 128; `out` is then
    fp32. workspace: lets several programs share the reduction of a tile. chain: not used. Raises ValueError for shapes
    that do not fit and TypeError for dtypes.
    """
    w, (stride, padding, dilation), (n, t, c_in) = packed, geometry, x.shape
    # nct: x is features, with unit frame stride. With one frame its strides fit both layouts, so the dtype decides.
    nct = c_in > 1 and (x.stride(2) != 1 or (t == 1 and x.dtype != w.data.dtype))
    masked = lengths.masked and (lengths.before is not None or lengths.after is not None)
    x2, w2 = panes or (None, None)
    out = _fused_out(x, w, geometry, lengths, panes, out, log_softmax, masked, workspace, nct)
    t_out = out.shape[1]
    shape = Shape(c_in, w.c_out, w.taps, stride, dilation, n * t_out)
    arithmetic = _arithmetic(w.data)
    tile = triton_tiles.choose("fused", x.device, w.data.dtype, shape, t_out, arithmetic["PRECISION"] == "ieee")
    if log_softmax:
        tile = tile._replace(n=max(16, triton.next_power_of_2(w.c_out)))
    t_blocks, n_blocks = triton.cdiv(t_out, tile.t), triton.cdiv(w.c_out, tile.n)
    splits = 1 if workspace is None or nct else tile.splits  # sharing a reduction needs a workspace
    part = arrived = None
    if splits > 1:
        tiles = n * t_blocks * n_blocks
        workspace.reserve(tiles * splits * tile.t * tile.n, tiles)
        part, arrived = workspace.part, workspace.arrived
    x_desc = None if nct else _activations(x, stride, tile.t, tile.k)
    x2_desc = None if x_desc is None or x2 is None else _activations(x2, 1, tile.t, tile.k)
    if x2 is not None and x2_desc is None:
        x_desc = None
    whole = x_desc is not None and (clean or not masked or lengths.before is None)
    by_descriptor = x_desc is not None or (nct and x2 is None and _has_tma(w.data))
    vec_in, x_sizes, x_chan = (1, (c_in, 0, x.stride(0)), x.stride(2)) if nct else (*sizes(x), 1)
    vec_2, x2_sizes = (1, (0, 0, 0)) if x2 is None else sizes(x2)
    vec_out, (_, z_row, z_item) = sizes(out)
    launch.run(
        conv1d_fused_kernel, (n * t_blocks * n_blocks * splits,), x,
        x, x_desc, w.data, _weights(w, tile.k, tile.n, by_descriptor),
        x2, x2_desc, None if x2 is None else w2.data, _weights(w2, tile.k, tile.n, x2_desc is not None),
        out, bias, *lengths[:3], part, arrived,
        t, t_out, *x_sizes, x_chan, *x2_sizes, w.c_out, z_row, z_item,
        w.taps, padding, dilation, t_blocks, splits,
        STRIDE=stride, HAS_IN_LENGTHS=lengths.before is not None, HAS_OUT_LENGTHS=masked and lengths.after is not None,
        HAS_LENGTHS_OUT=lengths.made is not None, HAS_MASK=masked, HAS_PANES=x2 is not None,
        HAS_BIAS=bias is not None, HAS_RELU=relu, HAS_LOG_SOFTMAX=log_softmax, HAS_SPLITS=splits > 1,
        HAS_DESCRIPTORS=by_descriptor, IS_CLEAN=whole, IS_NCT=nct,
        VEC_IN=vec_in, VEC_2=vec_2, VEC_OUT=vec_out, PAD=PAD_OUT, **arithmetic, **_blocks(tile),
    )  # fmt: skip
    return out


def _fused_out(x, w, geometry, lengths, panes, out, log_softmax, masked, workspace, nct) -> Tensor:
    """Returns `out`, or a new tensor if it is None. Raises ValueError or TypeError if the operands do not fit."""
    if x.dtype != w.data.dtype and not (nct and x.dtype == torch.float32):
        raise TypeError(f"the triton face takes x and weights of one dtype, got {x.dtype} and {w.data.dtype}")
    if nct and x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x has unit stride neither over channels nor over frames: strides {x.stride()} (N, T, C)")
    _check(w.data, w.data)
    if panes is not None:
        _check(panes[0], panes[1].data)
    out = fused_out(x, w, geometry, lengths, panes, out, log_softmax, masked, workspace)
    check_offsets(x, out)
    return out


def takes_tf32() -> bool:
    """Returns whether PyTorch's own fp32 convs round to TF32. The fp32 convs of this face do the same."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # PyTorch forbids reading allow_tf32 once this is set


# ---- what the launches share ----


def _packed(weight: Tensor, data: Tensor | None, x: Tensor) -> Packed:
    data = pack(weight, x.dtype).data if data is None else data
    _check(x, data)
    return packed_weight(weight, data, packed_shape(weight))


def _activations(x: Tensor, stride: int, block_t: int, block_c: int) -> TensorDescriptor | None:
    """Returns a descriptor of `x` (N, T, C) as (N, T // stride, stride*C), for blocks of frames by channels.

    Returns None if the GPU has no TMA, if `x` is not in 16 bits, or if its channels, strides or address do not fit.
    """
    (n, t, c), (item, row, _) = x.shape, x.stride()
    if not _has_tma(x) or c % block_c or x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in (item, row)):
        return None
    # CUDA needs each stride to be a multiple of the next smaller one, which an odd T at stride 2 does not meet
    if stride > 1 and (row != c or t < stride or (n > 1 and item % (stride * row))):
        return None
    item = item if n > 1 else stride * row
    return TensorDescriptor(x, [n, t // stride, stride * c], [item, stride * row, 1], [1, block_t, block_c])


def _has_tma(x: Tensor) -> bool:
    arch = launch.architecture(x.device)
    return x.element_size() == 2 and (INTERPRET_DESCRIPTORS if arch is None else arch >= 90)


def _weights(packed: Packed | None, block_rows: int, block_cols: int, wanted: bool) -> TensorDescriptor | None:
    """Returns a descriptor of a pack as (K*C_in, C_pad), or None if no descriptor is `wanted` or there is no pack."""
    if packed is None or not wanted:
        return None
    rows = packed.data.view(-1, packed.data.shape[2])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [block_rows, block_cols])


def _check(x: Tensor, other: Tensor) -> None:
    check_operands("triton", tables.DTYPES, x, other)
    check_offsets(x)


def _transpose_grid(c_in: int, c_out: int, meta: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(c_in, meta["BLOCK_I"]) * triton.cdiv(c_out, meta["BLOCK_O"]),)


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_T": tile.t, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def _arithmetic(x: Tensor) -> dict[str, object]:
    arch = launch.architecture(x.device)
    tf32 = x.dtype == torch.float32 and arch is not None and takes_tf32()
    return {"UPCAST": arch is None and x.dtype == torch.bfloat16, "PRECISION": "tf32" if tf32 else "ieee"}
