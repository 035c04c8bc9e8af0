"""Depthwise 1D convolution in NTC memory, with the masks of its input and output."""

import torch
from torch import Tensor

from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels.layout import empty_ntc, ntc
from jasper_fast.kernels.operands import Geometry, Lengths
from jasper_fast.ops.bn_relu_dropout_op import check_lengths
from jasper_fast.ops.conv1d_op import autocast, check_geometry
from jasper_fast.ops.registration import lib, op, register_autograd


@op(
    "depthwise(Tensor x, Tensor weight, Tensor? lengths, Tensor? out_lengths, int stride, int padding, int dilation, "
    "str face) -> Tensor"
)
def _forward(x, weight, lengths, out_lengths, stride, padding, dilation, face):
    return backends.face("depthwise", face).forward(
        ntc(x), weight, Geometry(stride, padding, dilation), Lengths(lengths, out_lengths)
    )


@op(
    "depthwise_backward(Tensor dy, Tensor x, Tensor weight, Tensor? lengths, Tensor? out_lengths, int stride, "
    "int padding, int dilation, bool need_dx, str face) -> (Tensor, Tensor)"
)
def _backward(dy, x, weight, lengths, out_lengths, stride, padding, dilation, need_dx, face):
    return backward(
        face, ntc(dy), ntc(x), weight, Geometry(stride, padding, dilation), Lengths(lengths, out_lengths), need_dx
    )


def backward(
    face: str, dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, lengths: Lengths, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """Computes (dx, dweight) on `face`. dx is empty unless `need_dx`."""
    impl = backends.face("depthwise", face)
    dw = impl.wgrad(x, dy, weight.shape[2], geometry, lengths, weight.dtype)
    return impl.dgrad(dy, weight, x.shape[2], geometry, lengths) if need_dx else dy.new_empty(0), dw


@torch.library.register_fake("jasper_fast::depthwise", lib=lib)
def _(x, weight, lengths, out_lengths, stride, padding, dilation, face):
    t_out = Geometry(stride, padding, dilation).frames(x.shape[2], weight.shape[2])
    return empty_ntc(*x.shape[:2], t_out, like=x)


@torch.library.register_fake("jasper_fast::depthwise_backward", lib=lib)
def _(dy, x, weight, lengths, out_lengths, stride, padding, dilation, need_dx, face):
    return empty_ntc(*x.shape, like=x) if need_dx else x.new_empty(0), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.stride, ctx.padding, ctx.dilation, ctx.face = inputs
    ctx.save_for_backward(*tensors)


@register_autograd("depthwise", _save)
def _grad(ctx, dy):
    need_dx = ctx.needs_input_grad[0]
    dx, dw = torch.ops.jasper_fast.depthwise_backward(
        dy, *ctx.saved_tensors, ctx.stride, ctx.padding, ctx.dilation, need_dx, ctx.face
    )
    return dx if need_dx else None, dw, *(None,) * 6


def depthwise(
    x: Tensor,
    weight: Tensor,
    *,
    lengths: Tensor | None = None,
    out_lengths: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolves each channel of `x` (N, C, T) with its own taps of `weight` (C, 1, K). Returns y (N, C, T').

    y is in NTC memory. Takes fp32, fp16, bf16 or fp64 (plain PyTorch). Sums are fp32, and fp64 for fp64. Rows of `x` at
    t >= `lengths` (N,) count as zero, whatever their values; rows of y at t >= `out_lengths` (N,) are zero. Lengths are
    int64 and must not exceed the frames. Under autocast `x` is cast to autocast's dtype. The gradient of the weight has
    the dtype of the weight.

    Raises ValueError for shapes that do not fit. Equivalent to `F.conv1d(x.masked_fill(t >= lengths, 0), weight, None,
    stride, padding, dilation, groups=C)`, followed by `masked_fill` at t >= out_lengths. In NeMo this is a
    depthwise `MaskedConv1d`, followed by the mask of the pointwise `MaskedConv1d` after it.
    """
    lengths, out_lengths = check_depthwise("x", x, weight, Geometry(stride, padding, dilation), lengths, out_lengths)
    x = autocast(x)
    face = choose.depthwise_face(backend, x.device, x.dtype)
    return torch.ops.jasper_fast.depthwise(x, weight, lengths, out_lengths, stride, padding, dilation, face)


def check_depthwise(name: str, x: Tensor, weight: Tensor, geometry: Geometry, *lengths: Tensor | None) -> tuple:
    """Raises ValueError unless `weight` is (C, 1, K), `x` is (N, C, T), `lengths` are (N,) and the geometry is
    possible. Returns `lengths`, contiguous."""
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[1] != 1 or x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"{name} (N, C, T) and a depthwise weight (C, 1, K) do not fit: {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    check_geometry(name, x.shape[2], weight.shape[2], geometry)
    return tuple(check_lengths(of, x.shape[0]) for of in lengths)
