"""From y to y: batch norm, ReLU, dropout and mask of one conv's output, then the next conv, as one autograd node.

It saves y and a few vectors and remakes z once in backward, so that of a sub-block only its conv's output is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.backends import face as _face
from jasper_fast.backends import resolve
from jasper_fast.kernels.layout import ntc
from jasper_fast.ops.bn_relu_dropout import check, dropout_seed, normaliser
from jasper_fast.ops.conv1d import conv_face
from jasper_fast.ops.library import lib, without_autocast

lib.define(
    "sub_block(Tensor y, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? lengths, Tensor? seed, float p, "
    "bool batch_stats, Tensor weight, int padding, int dilation, str bn_face, str conv_face) -> Tensor"
)
lib.define(
    "sub_block_backward(Tensor dout, Tensor y, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? lengths, "
    "Tensor? seed, float p, bool batch_stats, Tensor weight, int padding, int dilation, str bn_face, str conv_face) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(y, mean, rstd, gamma, beta, lengths, seed, p, batch_stats, weight, padding, dilation, bn_face, conv):
    z = _face("bn_relu_dropout", bn_face).forward(ntc(y), mean, rstd, gamma, beta, None, lengths, seed, p)
    return _face("conv1d", conv).forward(z, weight, 1, padding, dilation, lengths)


def _backward(
    dout, y, mean, rstd, gamma, beta, lengths, seed, p, batch_stats, weight, padding, dilation, bn_face, conv_face
):
    bn, conv = _face("bn_relu_dropout", bn_face), _face("conv1d", conv_face)
    dout, y = ntc(dout), ntc(y)
    z = bn.forward(y, mean, rstd, gamma, beta, None, lengths, seed, p)
    dw = conv.wgrad(z, dout, weight.shape[2], 1, padding, dilation, lengths)
    del z
    dz = conv.dgrad(dout, weight, y.shape[2], 1, padding, dilation, lengths)
    dbeta, dgamma = bn.backward_reduce(dz, y, None, mean, rstd, gamma, beta, lengths, seed, p)
    m = y.shape[0] * y.shape[2]
    mean_g, mean_gy = (dbeta / m, dgamma / m) if batch_stats else (None, None)
    dy, _ = bn.backward_apply(dz, y, None, mean, rstd, gamma, beta, mean_g, mean_gy, lengths, seed, p, False)
    return dy, dgamma, dbeta, dw


lib.impl("sub_block", without_autocast(_forward), "CompositeExplicitAutograd")
lib.impl("sub_block_backward", without_autocast(_backward), "CompositeExplicitAutograd")


@torch.library.register_fake("jasper_fast::sub_block", lib=lib)
def _(y, mean, rstd, gamma, beta, lengths, seed, p, batch_stats, weight, padding, dilation, bn_face, conv_face):
    n, _, t = y.shape
    c_out, _, k = weight.shape
    return y.new_empty((n, t + 2 * padding - dilation * (k - 1), c_out)).transpose(1, 2)


@torch.library.register_fake("jasper_fast::sub_block_backward", lib=lib)
def _(dout, y, mean, rstd, gamma, beta, lengths, seed, p, batch_stats, weight, *_args):
    n, c, t = y.shape
    dy = y.new_empty((n, t, c)).transpose(1, 2)
    return dy, torch.empty_like(gamma), torch.empty_like(beta), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], inputs[9])
    ctx.p, ctx.batch_stats, ctx.rest = inputs[7], inputs[8], inputs[10:]


def _grad(ctx, dout):
    *saved, weight = ctx.saved_tensors
    dy, dgamma, dbeta, dw = torch.ops.jasper_fast.sub_block_backward(
        dout, *saved, ctx.p, ctx.batch_stats, weight, *ctx.rest
    )
    return dy, None, None, dgamma, dbeta, None, None, None, None, dw, None, None, None, None


torch.library.register_autograd("jasper_fast::sub_block", _grad, setup_context=_save, lib=lib)


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
    p: float = 0.0,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-3,
    seed: Tensor | int | None = None,
    backend: str = "auto",
    frozen: bool = False,
) -> Tensor:
    """Batch norm, ReLU, dropout and mask of a conv's output `y` (N, C, T), then the next conv at stride 1, one node.

    Returns (N, C_out, T') in NTC memory and in the dtype of `y`; `weight` (C_out, C, K); the other arguments, and the
    errors, are those of `bn_relu_dropout`. Keeps `y`, not what the conv reads, for backward. Equivalent to
    `F.conv1d(bn_relu_dropout(y, ...), weight, None, 1, padding, dilation)`.
    """
    check(y, gamma, beta, running_mean, running_var, None, lengths, p)
    mean, rstd, batch_stats = normaliser(y, running_mean, running_var, None, training, frozen, momentum, eps, backend)
    p, seed = dropout_seed(p if training else 0.0, seed, y.device)
    return torch.ops.jasper_fast.sub_block(
        y, mean, rstd, gamma.to(mean.dtype), beta.to(mean.dtype), lengths, seed, p, batch_stats, weight.to(y.dtype),
        padding, dilation, resolve(backend, y.device.type), conv_face(y, 1, backend),
    )  # fmt: skip
