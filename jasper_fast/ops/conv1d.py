"""1D convolution in NTC memory."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.backends import face as _face
from jasper_fast.backends import resolve
from jasper_fast.kernels.layout import ntc
from jasper_fast.ops.library import lib, without_autocast

lib.define(
    "conv1d(Tensor x, Tensor weight, Tensor? lengths, int stride, int padding, int dilation, str face) -> Tensor"
)
lib.define(
    "conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? lengths, int stride, int padding, int dilation, "
    "bool need_dx, str face) -> (Tensor, Tensor)"
)


def _forward(x, weight, lengths, stride, padding, dilation, face):
    impl = _face("conv1d", face)
    return impl.forward(ntc(x), weight, stride, padding, dilation, lengths)


def _backward(dy, x, weight, lengths, stride, padding, dilation, need_dx, face):
    impl = _face("conv1d", face)
    dy, x = ntc(dy), ntc(x)
    dw = impl.wgrad(x, dy, weight.shape[2], stride, padding, dilation, lengths)
    dx = impl.dgrad(dy, weight, x.shape[2], stride, padding, dilation, lengths) if need_dx else dy.new_empty(0)
    return dx, dw


lib.impl("conv1d", without_autocast(_forward), "CompositeExplicitAutograd")
lib.impl("conv1d_backward", without_autocast(_backward), "CompositeExplicitAutograd")


@torch.library.register_fake("jasper_fast::conv1d", lib=lib)
def _(x, weight, lengths, stride, padding, dilation, face):
    n, _, t = x.shape
    c_out, _, k = weight.shape
    t_out = (t + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    return x.new_empty((n, t_out, c_out)).transpose(1, 2)


@torch.library.register_fake("jasper_fast::conv1d_backward", lib=lib)
def _(dy, x, weight, lengths, stride, padding, dilation, need_dx, face):
    n, c, t = x.shape
    dx = x.new_empty((n, t, c)).transpose(1, 2) if need_dx else x.new_empty(0)
    return dx, weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, lengths, ctx.stride, ctx.padding, ctx.dilation, ctx.face = inputs
    ctx.save_for_backward(x, weight, lengths)


def _grad(ctx, dy):
    x, weight, lengths = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, dw = torch.ops.jasper_fast.conv1d_backward(
        dy, x, weight, lengths, ctx.stride, ctx.padding, ctx.dilation, need_dx, ctx.face
    )
    return dx if need_dx else None, dw, None, None, None, None, None


torch.library.register_autograd("jasper_fast::conv1d", _grad, setup_context=_save, lib=lib)


def conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    lengths: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolve `x` (N, C_in, T) with `weight` (C_out, C_in, K); returns (N, C_out, T') in NTC memory.

    `x` must be zero at t >= `lengths` (N,), as bn_relu_dropout leaves it: kernels then skip those frames, and the
    gradient of `x` there may be anything. Under autocast both are cast to its dtype. The native CPU kernel takes fp32,
    Triton's fp32, fp16 and bf16, both at stride 1 (or without a gradient of `x`); every other case runs ATen's conv2d
    on the channels-last view of the same memory.

    Equivalent to `F.conv1d(x, weight, None, stride, padding, dilation)`.
    """
    x, weight = autocast(x, weight)
    return torch.ops.jasper_fast.conv1d(x, weight, lengths, stride, padding, dilation, conv_face(x, stride, backend))


def autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on, else the weight in the dtype of `x`."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.to(dtype), weight.to(dtype)


def conv_face(x: Tensor, stride: int, backend: str) -> str:
    """Which face of the conv serves `x` (N, C, T): ours where it has the dtype and the gradients, ATen's elsewhere.

    On a GPU "auto" stays with cuDNN in channels-last memory until measurements there say otherwise; "triton" asks for
    the Triton kernels.
    """
    if stride != 1 and x.requires_grad:
        return "aten"
    if resolve(backend, x.device.type) == "cpu":
        return "cpu" if x.dtype == torch.float32 else "aten"
    return "triton" if backend == "triton" and x.dtype != torch.float64 else "aten"
