"""From the output of one conv to that of the next: batch norm, ReLU, dropout, mask and conv as one autograd node.

The node saves its input y, which is the output of the first conv, and a few vectors. Backward computes z, the input of
the second conv, again. So a sub-block keeps only its conv's output. If a conv computes the statistics of its output,
they are passed along with the output and need no pass of their own.
"""

import torch
from torch import Tensor

from jasper_fast.dispatch import backends
from jasper_fast.kernels.layout import empty_ntc, ntc
from jasper_fast.kernels.operands import Geometry, Mask, Norm
from jasper_fast.ops.bn_relu_dropout_op import check, dropout_seed, fake_stats, mean_sums, norm_face, normaliser
from jasper_fast.ops.conv1d_op import Pack, check_conv, conv_face, conv_forward
from jasper_fast.ops.registration import lib, op, register_autograd


@op(
    "sub_block(Tensor y, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? lengths, Tensor? seed, "
    "Tensor? rows, Tensor weight, Tensor? packed, float p, bool batch_stats, int? halo, int padding, int dilation, "
    "bool stats, str group, str bn_face, str conv) -> (Tensor, Tensor, Tensor)"
)
def _forward(
    y, mean, rstd, gamma, beta, lengths, seed, rows, weight, packed,
    p, batch_stats, halo, padding, dilation, stats, group, bn_face, conv,
):  # fmt: skip
    impl, bn = backends.face("conv1d", conv), backends.face(backends.NORM, bn_face)
    z = bn.forward(ntc(y), Norm(mean, rstd, gamma, beta), None, Mask(lengths, seed, p))
    return conv_forward(impl, bn, z, weight, Geometry(1, padding, dilation), lengths, packed, stats)


@op(
    "sub_block_backward(Tensor dout, Tensor y, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? lengths, "
    "Tensor? seed, Tensor? rows, Tensor weight, Tensor? packed, float p, bool batch_stats, int? halo, int padding, "
    "int dilation, str group, str bn_face, str conv) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _backward(
    dout, y, mean, rstd, gamma, beta, lengths, seed, rows, weight, packed,
    p, batch_stats, halo, padding, dilation, group, bn_face, conv,
):  # fmt: skip
    impl, bn, dout, y = backends.face("conv1d", conv), backends.face(backends.NORM, bn_face), ntc(dout), ntc(y)
    norm, mask, geometry = Norm(mean, rstd, gamma, beta), Mask(lengths, seed, p), Geometry(1, padding, dilation)
    z = bn.forward(y, norm, None, mask)
    dw = impl.wgrad(z, dout, weight.shape[2], geometry, lengths, weight.dtype, clean=True)
    if hasattr(impl, "dgrad_bn"):  # also computes dbeta and dgamma, and its g has been through dropout already
        g, dbeta, dgamma = impl.dgrad_bn(dout, weight, geometry, y, z, norm, mask, packed)
        mask = Mask(lengths)
    else:
        del z
        g = impl.dgrad(dout, weight, y.shape[2], geometry, lengths, packed)
        dbeta, dgamma = bn.backward_reduce(g, y, None, norm, mask)
    means = mean_sums(dbeta, dgamma, y, rows, group) if batch_stats else None
    dy, _ = bn.backward_apply(g, y, None, norm, means, mask, False, halo)
    return dy, dgamma, dbeta, dw


@torch.library.register_fake("jasper_fast::sub_block", lib=lib)
def _(
    y, mean, rstd, gamma, beta, lengths, seed, rows, weight, packed,
    p, batch_stats, halo, padding, dilation, stats, group, bn_face, conv,
):  # fmt: skip
    c_out, _, k = weight.shape
    t_out = Geometry(1, padding, dilation).frames(y.shape[2], k)
    return empty_ntc(y.shape[0], c_out, t_out, like=y), *fake_stats(y, c_out, stats)


@torch.library.register_fake("jasper_fast::sub_block_backward", lib=lib)
def _(dout, y, mean, rstd, gamma, beta, lengths, seed, rows, weight, *_args):
    vectors = torch.empty_like(gamma), torch.empty_like(beta)
    return empty_ntc(*y.shape, like=y), *vectors, weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    # The pack is not saved with save_for_backward: conv1d_op says why.
    tensors, ctx.packed, (*before, _, group, bn, conv) = inputs[:9], inputs[9], inputs[10:]
    ctx.save_for_backward(*tensors)
    ctx.rest = (*before, group, bn, conv)
    ctx.mark_non_differentiable(*output[1:])


@register_autograd("sub_block", _save)
def _grad(ctx, dout, _dmean, _dm2):
    dy, dgamma, dbeta, dw = torch.ops.jasper_fast.sub_block_backward(dout, *ctx.saved_tensors, ctx.packed, *ctx.rest)
    return dy, None, None, dgamma, dbeta, None, None, None, dw, *(None,) * 10


def sub_block(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    *,
    lengths: Tensor | None = None,
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
    """Computes batch norm, ReLU, dropout and mask of `y` (N, C, T), then a conv at stride 1, as one node.

    `y` is the output of the conv before. Returns (N, C_out, T') in NTC memory and in the dtype of `y`. With
    `next_stats` returns this tensor and (mean, M2), as `conv1d` does with `stats`. `weight` (C_out, C, K) is cast
    inside. `packed` is as for `conv1d`. The other arguments are those of `bn_relu_dropout`, and the errors are those of
    both. For backward, `y` is kept and the input of the conv is not. Equivalent to
    `F.conv1d(bn_relu_dropout(y, ...), weight, None, 1, padding, dilation)`.
    """
    lengths = check(y, gamma, beta, running_mean, running_var, stats, None, lengths, p, halo)
    geometry = Geometry(1, padding, dilation)
    check_conv("y", y, weight, geometry)
    p, seed = dropout_seed(p if training else 0.0, seed, y.device)
    norm = normaliser(y, gamma, beta, running_mean, running_var, stats, training, frozen, momentum, eps, backend, group)
    conv, packed = conv_face(y, weight, geometry, backend, packed, stats=next_stats, norm=True)
    out, mean, m2 = torch.ops.jasper_fast.sub_block(
        y, *norm.vectors, lengths, seed, norm.rows, weight, packed,
        p, norm.batch_stats, halo, padding, dilation, next_stats, norm.group,
        norm_face(y, backend, *y.shape[1:]), conv,
    )  # fmt: skip
    return (out, (mean, m2)) if next_stats else out
