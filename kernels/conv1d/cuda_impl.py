"""The CUDA C++ face of conv1d (NVIDIA sm_75 and later, fp16; bf16 from sm_80): checks, workspace, plans and launches.

N batch, C channels, T frames, K taps. The kernels are in csrc/cuda: conv1d_mma.cuh and conv1d_wgmma.cuh for outputs and
gradients of inputs, conv1d_wgrad.cuh and conv1d_wgrad90.cuh for gradients of weights, conv1d_epilogue.cuh for the
epilogue. Accumulators are fp32. Dispatch takes ATen for other dtypes, for convs that do not fit into shared memory, and
if the gradient of x is needed at a stride above 1.
"""

import torch
from torch import Tensor

from jasper_fast.kernels.conv1d import cuda_launch, cuda_tiles
from jasper_fast.kernels.conv1d.cuda_args import (
    IMAGE,
    LOG_SOFTMAX,
    NORM,
    OUT,
    PLAIN,
    STATS,
    Ahead,
    Args,
    Operand,
    WgradArgs,
    address,
    pack_blocks,
)
from jasper_fast.kernels.conv1d.cuda_launch import DTYPES
from jasper_fast.kernels.conv1d.cuda_tiles import SLAB, Plan, Work
from jasper_fast.kernels.conv1d.gpu_shared import (
    ALONE,
    Chain,
    Packed,
    Workspace,
    check_operands,
    check_sub_block,
    dgrad_padding,
    frames_of,
    fused_out,
    out_frames,
    pack_buffer,
    packed_weight,
)
from jasper_fast.kernels.layout import empty_fp32, empty_ntc
from jasper_fast.kernels.operands import FULL, Geometry, Lengths, Mask, Norm

SIXTEEN = (torch.float16, torch.bfloat16)
_VECTOR = (torch.float32, "bias, mean and rstd")


def packed_shape(weight: Tensor) -> tuple[int, int, int, int]:
    """Returns the shape of what `pack` writes for `weight` (C_out, C_in, K).

    The shape is (K, blocks of C_in, blocks of C_out, 4096); the last dimension has the weights of 64 input by 64 output
    channels.
    """
    c_out, c_in, taps = weight.shape
    return taps, pack_blocks(c_in), pack_blocks(c_out), IMAGE


def pack(weight: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Packed:
    """Packs `weight` (C_out, C_in, K), fp32, fp16 or bf16, for the functions here, in `dtype`: fp16 or bf16.

    The default dtype is that of `out`, or without `out` that of `weight`. out: a buffer of `packed_shape(weight)` to
    write into, which a module may keep from call to call. Raises TypeError for other dtypes, so an fp32 weight needs
    `dtype` or `out`, and ValueError if `out` does not fit.
    """
    w, out = pack_buffer("cuda", SIXTEEN, weight, packed_shape(weight), dtype, out)
    cuda_launch.run(
        "jf_conv1d_pack", w, out.shape[1] * out.shape[2], 0, DTYPES[w.dtype], DTYPES[out.dtype], address(w),
        address(out), *w.shape,
    )  # fmt: skip
    return Packed(out, *w.shape)


def pack_once(weight: Tensor, dtype: torch.dtype, stride: int = 1) -> Packed:
    """Packs `weight` (C_out, C_in, K) of any dtype for many calls of `fused` at `stride`, in a network in `dtype`."""
    return pack(weight.float(), dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns y (N, C_out, T'), the conv of `x` (N, C_in, T) with `weight` (C_out, C_in, K), in NTC memory.

    x counts as zero at t >= `lengths` (N,). packed: `pack(weight, x.dtype).data`; made here if None. clean: not used.
    Equivalent to `F.conv1d(x.masked_fill(t >= lengths, 0), weight, None, *geometry)` in the dtype of `x`.
    """
    return _forward(x, weight, geometry, lengths, packed, PLAIN)[0]


def forward_stats(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y of `forward`, and the mean and M2 (sum of squared deviations) of each channel over all N*T' rows.

    Mean and M2 are fp32 (C_out,) each. They are computed from the fp32 accumulators, before y is rounded.
    """
    return _forward(x, weight, geometry, lengths, packed, STATS)


def _forward(x, weight, geometry, lengths, packed, mode):
    w = _packed(weight, packed, x)
    n, c_in, t = x.shape
    t_out = frames_of(t, c_in, w, geometry)
    y = empty_ntc(n, w.c_out, t_out, like=x)
    work = Work(n, t_out, c_in, w.c_out, 0, w.taps, geometry.stride, geometry.dilation)
    args = _args(Operand.of(x.transpose(1, 2), w.data, c_in, w.c_out), y.transpose(1, 2), t, w.taps, geometry)
    args.in_lengths, args.masked = _checked(lengths), True
    return y, *_launch(args, x, w, work, mode, False)


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
    return _dgrad(dy, weight, y.shape[2], geometry, mask.lengths, packed, (y, z, norm, mask))


def _dgrad(dy, weight, t, geometry, lengths, packed, sub_block=None):
    w, (n, c_out, t_dy) = _packed(weight, packed, dy), dy.shape
    flipped = Geometry(1, dgrad_padding("cuda", dy, w, t, geometry), geometry.dilation)
    g = empty_ntc(n, w.c_in, t, like=dy)
    work = Work(n, t, c_out, w.c_in, 0, w.taps, 1, flipped.dilation)
    args = _args(Operand.of(dy.transpose(1, 2), w.data, w.c_in, c_out), g.transpose(1, 2), t_dy, w.taps, flipped)
    args.out_lengths = _checked(lengths)
    if sub_block is None:
        return g, *_launch(args, dy, w, work, PLAIN, True)
    y, z, norm, mask = sub_block
    check_sub_block(y, z, g)
    args.y, args.z, args.scale = address(y), address(z), 1 / (1 - mask.p)
    args.mean, args.rstd = _checked(norm.mean, *_VECTOR), _checked(norm.rstd, *_VECTOR)
    args.out_vector = args.out_vector and w.c_in % 8 == 0 and y.data_ptr() % 16 == 0 and z.data_ptr() % 16 == 0
    return g, *_launch(args, dy, w, work, NORM, True)


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

    x counts as zero at t >= `lengths` (N,). The result is in `dtype` (default: that of `x`).
    """
    check_operands("cuda", SIXTEEN, x, dy)
    n, c_in, t = x.shape
    c_out, t_out = dy.shape[1:]
    if dy.shape[0] != n or t_out != out_frames(t, k, geometry):
        raise ValueError(f"dy {tuple(dy.shape)} does not fit the conv of x {tuple(x.shape)} with {k} taps")
    cut = cuda_tiles.plan_wgrad(cuda_launch.gpu(x.device), Work(n, t_out, c_in, c_out, 0, k, geometry[0], geometry[2]))
    parts = torch.empty((cut.shares, k, c_out, c_in), dtype=torch.float32, device=x.device)
    dw = torch.empty((c_out, c_in, k), dtype=dtype or x.dtype, device=x.device)
    args = WgradArgs(
        Operand.of(x.transpose(1, 2)), Operand.of(dy.transpose(1, 2)), _checked(lengths), address(parts),
        n, t, t_out, k, *geometry, cut.in_blocks, cut.out_blocks, cut.tap_groups, cut.shares, cut.segments, cut.share,
        cut.stages,
    )  # fmt: skip
    cuda_launch.run("jf_conv1d_wgrad", x, cut.grid, cut.shared, DTYPES[x.dtype], cut.taps, args, loop=cut.loop)
    pairs = c_out * c_in
    cuda_launch.run(
        "jf_conv1d_wgrad_merge", x, -(-pairs // 128), 0, DTYPES[dw.dtype], address(parts), address(dw),
        cut.shares, k, pairs,
    )  # fmt: skip
    return dw


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

    panes: x2 (N, T', C2) and packed2, a 1x1 conv. `x`, x2 and `out` may be slices of wider buffers. `x` may have any
    strides, and may be fp32 for any dtype of the pack. Rows of x and x2 at t >= `lengths.before` count as zero and are
    not read. Rows of the result at t >= `lengths.after` are zero. If output lengths mask the result, `out` may have
    more rows than the conv produces. `bias` is fp32 (C_out,).

    log_softmax: ends with a log-softmax over C_out, at most 128; `out` is then fp32. workspace: lets several CTAs share
    the reduction of a tile. clean: not used. chain: whether this launch may begin early (on sm_90 and later), and the
    weights that it fetches for the next launch. Raises ValueError for shapes that do not fit and TypeError for dtypes.
    """
    w, (n, t, c_in) = packed, x.shape
    x2, w2 = panes or (None, None)
    masked = lengths.masked and (lengths.before is not None or lengths.after is not None)
    if x.dtype not in (w.data.dtype, torch.float32):
        raise TypeError(
            "the cuda face takes x in fp32 or in the dtype of the weights, "
            f"got x in {x.dtype} and weights in {w.data.dtype}"
        )
    if panes is not None and not x2.dtype == w2.data.dtype == w.data.dtype:
        raise TypeError(f"x2 and both packs must have one dtype, got {x2.dtype}, {w2.data.dtype}, {w.data.dtype}")
    out = fused_out(x, w, geometry, lengths, panes, out, log_softmax, masked, workspace)
    args = _args(Operand.of(x, w.data, c_in, w.c_out), out, t, w.taps, geometry)
    if x2 is not None:
        args.panes = Operand.of(x2, w2.data, w2.c_in, w2.c_out)
    args.in_lengths, args.out_lengths, args.lengths_out = map(_checked, lengths[:3])
    args.masked, args.bias, args.relu = masked, _checked(bias, *_VECTOR), relu
    if not masked:
        args.out_lengths = None
    work = Work(n, out.shape[1], c_in, w.c_out, w2.c_in if panes else 0, w.taps, geometry.stride, geometry.dilation)
    _fetch_ahead(args, cuda_launch.gpu(x.device), chain.ahead)
    _launch(args, x, w, work, LOG_SOFTMAX if log_softmax else PLAIN, False, workspace, chain.early)
    return out


def takes_tf32() -> bool:
    """Returns whether fp32 convs round to TF32: False, because this face has no fp32 convs."""
    return False


# ---- what the launches share ----


def _args(source: Operand, out: Tensor, frames: int, taps: int, geometry: Geometry) -> Args:
    """Returns the arguments of a conv from `frames` frames into `out` (N, T', C_out)."""
    (n, t_out, c_out), (item, row, one) = out.shape, out.stride()
    if one != 1 and c_out > 1:
        raise ValueError(f"out needs unit stride over channels, got strides {out.stride()} for (N, T, C)")
    taken = (item if n > 1 else 0, row if t_out > 1 else 0, out.data_ptr() // 2)
    return Args(
        main=source, out=address(out), out_item=item, out_row=row, scale=1.0, batch=n, frames=frames, frames_out=t_out,
        c_out=c_out, taps=taps, stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation,
        out_vector=all(s % 8 == 0 for s in taken),
    )  # fmt: skip


def _fetch_ahead(args: Args, gpu: cuda_tiles.Gpu, packs: tuple[Tensor, ...]) -> None:
    """Makes the launch fetch `packs` into L2, up to half of the size of L2."""
    room, image = gpu.l2 // 2, IMAGE * 2
    for i, pack in enumerate(packs):
        taken = min(pack.numel() * pack.element_size(), room) // image * image
        args.ahead[i], room = Ahead(address(pack), taken), room - taken


def _launch(args, x, w, work, mode, transposed, workspace=None, early=False) -> tuple[Tensor | None, Tensor | None]:
    """Plans and launches. Returns the two results of the modes STATS and NORM, (C_out,) fp32 each, or (None, None)."""
    gpu = cuda_launch.gpu(x.device)
    cut: Plan = cuda_tiles.plan(gpu, work, workspace is not None)
    args.t_blocks, args.o_blocks, args.splits = cut.t_blocks, cut.o_blocks, cut.splits
    args.panels_kept, args.stages = cut.panels, cut.stages
    tiles = work.batch * cut.t_blocks
    if cut.splits > 1:
        shared_tiles = tiles * cut.o_blocks
        workspace.reserve(shared_tiles * cut.splits * -(-cut.block // SLAB) * SLAB * OUT, shared_tiles)
        args.shares, args.arrived = address(workspace.part), address(workspace.arrived)
    parts = None
    if mode in (STATS, NORM):
        parts = torch.empty((2, tiles, work.c_out), dtype=torch.float32, device=x.device)
        args.part_a, args.part_b = address(parts[0]), address(parts[1])
    cuda_launch.run(
        "jf_conv1d", x, cut.grid, cut.shared, DTYPES[w.data.dtype], mode, transposed, cut.block, args,
        cooperative=cut.splits > 1, early=early, loop=gpu.loop,
    )  # fmt: skip
    if parts is None:
        return None, None
    first, second = empty_fp32(2, work.c_out, like=x)
    cuda_launch.run(
        "jf_conv1d_merge", x, -(-work.c_out // 32), 256 * 3 * 4, args.part_a, args.part_b, address(first),
        address(second), tiles, cut.t_blocks, cut.block, work.frames, work.c_out, mode == STATS,
    )  # fmt: skip
    return first, second


def _packed(weight: Tensor, data: Tensor | None, x: Tensor) -> Packed:
    data = pack(weight, x.dtype).data if data is None else data
    check_operands("cuda", SIXTEEN, x, data)
    return packed_weight(weight, data, packed_shape(weight))


def _checked(x: Tensor | None, dtype: torch.dtype = torch.int64, names: str = "lengths") -> int | None:
    """Returns the address of `x`, or None. Raises TypeError unless `x` is contiguous and in `dtype`."""
    if x is not None and (x.dtype != dtype or not x.is_contiguous()):
        raise TypeError(f"{names} must be contiguous {dtype}, got {x.dtype}, strides {x.stride()}")
    return address(x)
