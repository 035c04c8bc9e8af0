"""1D convolution in NTC memory, and the batch statistics of its output."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels.layout import empty_ntc, ntc
from jasper_fast.kernels.operands import Geometry
from jasper_fast.ops.bn_relu_dropout_op import check_lengths, fake_stats, norm_face
from jasper_fast.ops.registration import lib, op, register_autograd

Pack = Callable[[Tensor, torch.dtype, str], Tensor | None]  # (weight, dtype, face) -> the packed weight


def conv_forward(
    conv: ModuleType,
    bn: ModuleType,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None,
    packed: Tensor | None,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y, mean, M2) of a conv on the face `conv`. Without `stats`, mean and M2 are empty.

    The statistics come from `conv.forward_stats` if the face has it, otherwise from the face `bn`. `weight` may have a
    wider dtype than `x`; each face rounds it when it packs or copies it.
    """
    if stats and hasattr(conv, "forward_stats"):
        return conv.forward_stats(x, weight, geometry, lengths, packed, clean=True)
    y = conv.forward(x, weight, geometry, lengths, packed, clean=True)
    mean, m2 = bn.stats(y) if stats else (x.new_empty(0), x.new_empty(0))
    return y, mean, m2


@op(
    "conv1d(Tensor x, Tensor weight, Tensor? lengths, Tensor? packed, int stride, int padding, int dilation, "
    "bool stats, str bn_face, str face) -> (Tensor, Tensor, Tensor)"
)
def _forward(x, weight, lengths, packed, stride, padding, dilation, stats, bn_face, face):
    faces = backends.face("conv1d", face), backends.face(backends.NORM, bn_face)
    return conv_forward(*faces, ntc(x), weight, Geometry(stride, padding, dilation), lengths, packed, stats)


@op(
    "conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? lengths, Tensor? packed, int stride, int padding, "
    "int dilation, bool need_dx, str face) -> (Tensor, Tensor)"
)
def _backward(dy, x, weight, lengths, packed, stride, padding, dilation, need_dx, face):
    impl, geometry, dy, x = backends.face("conv1d", face), Geometry(stride, padding, dilation), ntc(dy), ntc(x)
    dw = impl.wgrad(x, dy, weight.shape[2], geometry, lengths, weight.dtype, clean=True)
    dx = impl.dgrad(dy, weight, x.shape[2], geometry, lengths, packed) if need_dx else dy.new_empty(0)
    return dx, dw


@torch.library.register_fake("jasper_fast::conv1d", lib=lib)
def _(x, weight, lengths, packed, stride, padding, dilation, stats, bn_face, face):
    c_out, _, k = weight.shape
    t_out = Geometry(stride, padding, dilation).frames(x.shape[2], k)
    return empty_ntc(x.shape[0], c_out, t_out, like=x), *fake_stats(x, c_out, stats)


@torch.library.register_fake("jasper_fast::conv1d_backward", lib=lib)
def _(dy, x, weight, lengths, packed, stride, padding, dilation, need_dx, face):
    return empty_ntc(*x.shape, like=x) if need_dx else x.new_empty(0), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    # The pack is not saved with save_for_backward, because each forward pass of the module refills its buffer in place.
    # The weight is saved, so autograd raises an error if the weight changes before backward.
    x, weight, lengths, ctx.packed, ctx.stride, ctx.padding, ctx.dilation, _, _, ctx.face = inputs
    ctx.save_for_backward(x, weight, lengths)
    ctx.mark_non_differentiable(*output[1:])


@register_autograd("conv1d", _save)
def _grad(ctx, dy, _dmean, _dm2):
    need_dx = ctx.needs_input_grad[0]
    dx, dw = torch.ops.jasper_fast.conv1d_backward(
        dy, *ctx.saved_tensors, ctx.packed, ctx.stride, ctx.padding, ctx.dilation, need_dx, ctx.face
    )
    return dx if need_dx else None, dw, *(None,) * 8


def conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    lengths: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    backend: str = "auto",
    stats: bool = False,
    packed: Tensor | Pack | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Convolves `x` (N, C_in, T) with `weight` (C_out, C_in, K). Returns y (N, C_out, T') in NTC memory.

    `x` must be zero at t >= `lengths` (N,), as bn_relu_dropout leaves it. Lengths must not exceed T. Kernels skip the
    frames beyond them, and the gradient of `x` is undefined there. Under autocast `x` is cast to autocast's dtype. The
    weight is cast inside, and its gradient has the dtype of the weight.

    With `stats` the result is (y, (mean, M2)), for `bn_relu_dropout` and `sub_block`. mean and M2 are (C_out,) in fp32
    (fp64 for fp64 input), over all N*T' rows, and have no gradient. `packed` is either `weight` packed by the Triton
    face in the dtype of `x`, or a function. The function takes (weight, dtype, face) and returns the pack for that
    face, or None if the face packs weights itself.

    The kernels of the cpu and triton backends take fp32, fp16 and bf16, those of the cuda backend fp16 and bf16 (on
    sm_75 only fp16). With a stride they run only if `x` needs no gradient. All other cases, and 16-bit dtypes for which
    the CPU has AMX, run ATen's conv2d on a channels-last view of the same memory. On a GPU "auto" does so too where
    cuDNN is faster.

    Raises ValueError for shapes that do not fit. Equivalent to `F.conv1d(x, weight, None, stride, padding, dilation)`,
    and with `stats` to `bn_stats` of the result. NVIDIA's `MaskedConv1d` (jasper/model.py) also zeroes the padding of
    `x`; here bn_relu_dropout has done that.
    """
    x, geometry = autocast(x), Geometry(stride, padding, dilation)
    check_conv("x", x, weight, geometry)
    lengths = check_lengths(lengths, x.shape[0])
    face, packed = conv_face(x, weight, geometry, backend, packed, stats=stats)
    frames = geometry.frames(x.shape[2], weight.shape[2])
    bn_face = norm_face(x, backend, weight.shape[0], frames) if stats else "reference"  # not used without statistics
    y, mean, m2 = torch.ops.jasper_fast.conv1d(
        x, weight, lengths, packed, stride, padding, dilation, stats, bn_face, face
    )
    return (y, (mean, m2)) if stats else y


def check_conv(name: str, x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """Raises ValueError unless `weight` is (C_out, C_in, K), `x` is (N, C_in, T) and the geometry is possible."""
    if x.dim() != 3 or weight.dim() != 3 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} (N, C, T) and weight (C_out, C, K) do not fit: {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    check_geometry(name, x.shape[2], weight.shape[2], geometry)


def check_geometry(name: str, frames: int, taps: int, geometry: Geometry) -> None:
    """Raises ValueError if no conv has these taps and this geometry, or if `name` has too few frames for it."""
    stride, padding, dilation = geometry
    if min(taps, stride, dilation) < 1 or padding < 0:
        raise ValueError(
            f"taps, stride and dilation must be at least 1 and padding at least 0, got {taps}, {stride}, {dilation}, "
            f"{padding}"
        )
    if geometry.frames(frames, taps) < 0:
        raise ValueError(f"{name} has {frames} frames, too few for {taps} taps without more padding")


def autocast(x: Tensor) -> Tensor:
    """Returns `x` in the dtype of autocast if that is on, else `x` itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def conv_face(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    backend: str,
    packed: Tensor | Pack | None,
    *,
    stats: bool = False,
    norm: bool = False,
) -> tuple[str, Tensor | None]:
    """Returns the face for the conv of `x` (N, C, T), and the weight packed for that face (or None).

    The face is one of ours if it supports the dtype and computes the gradients that are needed, else "aten". On a GPU
    "auto" takes the face with the least measured or estimated time, which may be "aten" (cuDNN in channels-last
    memory). `stats` and `norm` say which functions of the conv are called (see `choose.conv_calls`).
    """
    grad, (c_out, c_in, taps) = torch.is_grad_enabled(), weight.shape
    dx, dw = grad and x.requires_grad, grad and weight.requires_grad
    face = choose.conv_face(
        backend, x.device, x.dtype,
        strided_dx=dx and geometry.stride != 1,
        calls=choose.conv_calls(stats=stats, dx=dx, dw=dw, norm=norm),
        shape=(c_in, c_out, taps, geometry.stride, geometry.dilation),
        rows_log2=choose.rows_log2(x.shape[0] * -(-x.shape[2] // geometry.stride)),
    )  # fmt: skip
    return face, pack_for(face, weight, x.dtype, packed)


def pack_for(face: str, weight: Tensor, dtype: torch.dtype, packed: Tensor | Pack | None) -> Tensor | None:
    """Returns the pack of `weight` for `face`, given `packed` of `conv1d`. None: the face packs the weight itself."""
    if callable(packed):
        return packed(weight, dtype, face)
    return packed if face == "triton" else None  # a tensor is a pack of the Triton face, which no other face can read
