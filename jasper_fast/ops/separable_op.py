"""A depthwise and a pointwise conv as one autograd node, with or without batch norm, ReLU and dropout before them.

The node saves its input and a few vectors. With batch norm, its input is the output of the previous sub-block's
pointwise conv. Backward computes the input and the output of the depthwise conv again. So one tensor is kept per
sub-block, where eager PyTorch keeps four.
"""

import torch
from torch import Tensor

from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels.layout import empty_ntc, ntc
from jasper_fast.kernels.operands import Geometry, Lengths, Mask, Norm
from jasper_fast.ops import depthwise_op
from jasper_fast.ops.bn_relu_dropout_op import check, dropout_seed, fake_stats, mean_sums, norm_face, normaliser
from jasper_fast.ops.conv1d_op import Pack, autocast, conv_forward, pack_for
from jasper_fast.ops.registration import lib, op, register_autograd

POINTWISE = Geometry()


def _input(x, norm: tuple, lengths, seed, p, bn_face) -> Tensor:
    """Returns the input of the depthwise conv: `x` itself, or batch norm, ReLU, dropout and mask of it."""
    x, bn = ntc(x), backends.face(backends.NORM, bn_face)
    return x if norm[0] is None else bn.forward(x, Norm(*norm), None, Mask(lengths, seed, p))


@op(
    "separable(Tensor x, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, Tensor? lengths, Tensor? seed, "
    "Tensor? rows, Tensor depthwise, Tensor weight, Tensor? packed, Tensor? out_lengths, float p, bool batch_stats, "
    "int? halo, int stride, int padding, int dilation, bool stats, str group, str bn_face, str taps_face, str face) "
    "-> (Tensor, Tensor, Tensor)"
)
def _forward(
    x, mean, rstd, gamma, beta, lengths, seed, rows, depthwise, weight, packed, out_lengths,
    p, batch_stats, halo, stride, padding, dilation, stats, group, bn_face, taps_face, face,
):  # fmt: skip
    z = _input(x, (mean, rstd, gamma, beta), lengths, seed, p, bn_face)
    taps, geometry = backends.face("depthwise", taps_face), Geometry(stride, padding, dilation)
    d = taps.forward(z, depthwise, geometry, Lengths(lengths, out_lengths))
    faces = backends.face("conv1d", face), backends.face(backends.NORM, bn_face)
    return conv_forward(*faces, d, weight, POINTWISE, out_lengths, packed, stats)


@op(
    "separable_backward(Tensor dout, Tensor x, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, "
    "Tensor? lengths, Tensor? seed, Tensor? rows, Tensor depthwise, Tensor weight, Tensor? packed, "
    "Tensor? out_lengths, float p, bool batch_stats, int? halo, int stride, int padding, int dilation, bool need_dx, "
    "str group, str bn_face, str taps_face, str face) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _backward(
    dout, x, mean, rstd, gamma, beta, lengths, seed, rows, depthwise, weight, packed, out_lengths,
    p, batch_stats, halo, stride, padding, dilation, need_dx, group, bn_face, taps_face, face,
):  # fmt: skip
    conv, bn = backends.face("conv1d", face), backends.face(backends.NORM, bn_face)
    norm, dout = (mean, rstd, gamma, beta), ntc(dout)
    geometry, masks = Geometry(stride, padding, dilation), Lengths(lengths, out_lengths)
    z = _input(x, norm, lengths, seed, p, bn_face)
    d = backends.face("depthwise", taps_face).forward(z, depthwise, geometry, masks)
    dw = conv.wgrad(d, dout, 1, POINTWISE, out_lengths, weight.dtype, clean=True)
    dd = conv.dgrad(dout, weight, d.shape[2], POINTWISE, out_lengths, packed)
    del d
    dz, dtaps = depthwise_op.backward(taps_face, dd, z, depthwise, geometry, masks, need_dx)
    if mean is None:
        return dz, dout.new_empty(0), dout.new_empty(0), dtaps, dw
    x, mask = ntc(x), Mask(lengths, seed, p)
    dbeta, dgamma = bn.backward_reduce(dz, x, None, Norm(*norm), mask)
    means = mean_sums(dbeta, dgamma, x, rows, group) if batch_stats else None
    dx, _ = bn.backward_apply(dz, x, None, Norm(*norm), means, mask, False, halo)
    return dx, dgamma, dbeta, dtaps, dw


@torch.library.register_fake("jasper_fast::separable", lib=lib)
def _(
    x, mean, rstd, gamma, beta, lengths, seed, rows, depthwise, weight, packed, out_lengths,
    p, batch_stats, halo, stride, padding, dilation, stats, group, bn_face, taps_face, face,
):  # fmt: skip
    t_out = Geometry(stride, padding, dilation).frames(x.shape[2], depthwise.shape[2])
    return empty_ntc(x.shape[0], weight.shape[0], t_out, like=x), *fake_stats(x, weight.shape[0], stats)


@torch.library.register_fake("jasper_fast::separable_backward", lib=lib)
def _(
    dout, x, mean, rstd, gamma, beta, lengths, seed, rows, depthwise, weight, packed, out_lengths,
    p, batch_stats, halo, stride, padding, dilation, need_dx, *_faces,
):  # fmt: skip
    dx = empty_ntc(*x.shape, like=x) if need_dx else x.new_empty(0)
    vectors = (x.new_empty(0), x.new_empty(0)) if mean is None else (torch.empty_like(gamma), torch.empty_like(beta))
    return dx, *vectors, depthwise.new_empty(depthwise.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    # The pack is not saved with save_for_backward: conv1d_op says why.
    *tensors, ctx.packed, out_lengths = inputs[:12]
    ctx.save_for_backward(*tensors, out_lengths)
    *ctx.before, _, group, bn_face, taps_face, face = inputs[12:]
    ctx.after = group, bn_face, taps_face, face
    ctx.mark_non_differentiable(*output[1:])


@register_autograd("separable", _save)
def _grad(ctx, dout, _dmean, _dm2):
    *tensors, out_lengths = ctx.saved_tensors
    normed = tensors[1] is not None
    need_dx = normed or ctx.needs_input_grad[0]
    dx, dgamma, dbeta, dtaps, dw = torch.ops.jasper_fast.separable_backward(
        dout, *tensors, ctx.packed, out_lengths, *ctx.before, need_dx, *ctx.after
    )
    vectors = (dgamma, dbeta) if normed else (None, None)
    return dx if need_dx else None, None, None, *vectors, None, None, None, dtaps, dw, *(None,) * 13


def separable_conv(
    x: Tensor,
    depthwise: Tensor,
    weight: Tensor,
    *,
    lengths: Tensor | None = None,
    out_lengths: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    backend: str = "auto",
    stats: bool = False,
    packed: Tensor | Pack | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Convolves `x` (N, C, T) with `depthwise` (C, 1, K), then pointwise with `weight` (C_out, C, 1), as one node.

    Returns (N, C_out, T') in NTC memory. Rows of `x` at t >= `lengths` (N,) count as zero, and so do rows of the
    depthwise conv's output at t >= `out_lengths`. With `stats` the result is (y, (mean, M2)), as for `conv1d`. `packed`
    is the pack of `weight`, as for `conv1d`. Of all activations, only `x` is kept for backward. Raises ValueError for
    shapes that do not fit. Equivalent to `F.conv1d(ops.depthwise(x, depthwise, ...), weight)`.
    """
    x, geometry = autocast(x), Geometry(stride, padding, dilation)
    lengths, out_lengths = _check("x", x, depthwise, weight, geometry, lengths, out_lengths)
    faces, packed = _faces(x, depthwise, weight, geometry, backend, stats, packed)
    out, mean, m2 = torch.ops.jasper_fast.separable(
        x, None, None, None, None, lengths, None, None, depthwise, weight, packed, out_lengths, 0.0, False, None,
        stride, padding, dilation, stats, "", *faces,
    )  # fmt: skip
    return (out, (mean, m2)) if stats else out


def separable_sub_block(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    depthwise: Tensor,
    weight: Tensor,
    *,
    lengths: Tensor | None = None,
    out_lengths: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    stats: tuple[Tensor, Tensor] | None = None,
    p: float = 0.0,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-3,
    seed: Tensor | int | None = None,
    backend: str = "auto",
    frozen: bool = False,
    halo: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    next_stats: bool = False,
    packed: Tensor | Pack | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Computes batch norm, ReLU, dropout and mask of a conv's output `y` (N, C, T), then `separable_conv`, as one node.

    Returns (N, C_out, T') in NTC memory and in the dtype of `y`. With `next_stats` returns this tensor and (mean, M2).
    The other arguments and the errors are those of `bn_relu_dropout` and `separable_conv`. Of all activations, only `y`
    is kept for backward. Equivalent to `separable_conv(bn_relu_dropout(y, ...), depthwise, weight, ...)`.
    """
    check(y, gamma, beta, running_mean, running_var, stats, None, lengths, p, halo)
    geometry = Geometry(stride, padding, dilation)
    lengths, out_lengths = _check("y", y, depthwise, weight, geometry, lengths, out_lengths)
    p, seed = dropout_seed(p if training else 0.0, seed, y.device)
    norm = normaliser(y, gamma, beta, running_mean, running_var, stats, training, frozen, momentum, eps, backend, group)
    faces, packed = _faces(y, depthwise, weight, geometry, backend, next_stats, packed)
    out, mean, m2 = torch.ops.jasper_fast.separable(
        y, *norm.vectors, lengths, seed, norm.rows, depthwise, weight, packed, out_lengths,
        p, norm.batch_stats, halo, stride, padding, dilation, next_stats, norm.group, *faces,
    )  # fmt: skip
    return (out, (mean, m2)) if next_stats else out


def _check(name, x, depthwise, weight, geometry: Geometry, *lengths) -> tuple[Tensor | None, ...]:
    checked = depthwise_op.check_depthwise(name, x, depthwise, geometry, *lengths)
    if weight.dim() != 3 or weight.shape[1:] != (x.shape[1], 1):
        raise ValueError(f"weight must be (C_out, {x.shape[1]}, 1), got {tuple(weight.shape)}")
    return checked


def _faces(
    x: Tensor, depthwise: Tensor, weight: Tensor, geometry: Geometry, backend: str, stats: bool, packed
) -> tuple[tuple[str, str, str], Tensor | None]:
    """Returns the faces of batch norm, depthwise and pointwise conv of `x`, and the pack of the pointwise conv."""
    grad, frames = torch.is_grad_enabled(), geometry.frames(x.shape[2], depthwise.shape[2])
    face = choose.conv_face(
        backend, x.device, x.dtype,
        calls=choose.conv_calls(stats=stats, dx=grad, dw=grad),
        shape=(weight.shape[1], weight.shape[0], 1, 1, 1), rows_log2=choose.rows_log2(x.shape[0] * frames),
    )  # fmt: skip
    bn_face = norm_face(x, backend, *x.shape[1:])  # for the norm before the convs and the statistics after them
    faces = bn_face, choose.depthwise_face(backend, x.device, x.dtype), face
    return faces, pack_for(face, weight, x.dtype, packed)
