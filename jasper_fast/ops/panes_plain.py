"""Dense-residual panes (1x1 conv + batch norm) summed as PyTorch computes them: one GEMM and its statistics a pane.

The plain form beside the Gram form of panes.py. A pane's output lives until it is added; backward makes it again, so
that only the block outputs are kept, which have other readers anyway. With y = x W^T, yhat = (y - mean)*rstd and g the
gradient at the sum, the same for every pane:
    dgamma = sum g*yhat,   dbeta = sum g,   u = g - dbeta/M - yhat*dgamma/M,   a = gamma*rstd,
    dW = diag(a) u^T x,   dx = u diag(a) W
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from jasper_fast import sync
from jasper_fast.backends import face as _face
from jasper_fast.kernels.layout import ntc
from jasper_fast.kernels.layout import rows as _rows
from jasper_fast.ops.bn_relu_dropout import norm_face_of
from jasper_fast.ops.library import lib, without_autocast
from jasper_fast.ops.panes import check_rows, product, unbiased, wide_dtype

lib.define(
    "panes_plain(Tensor[] xs, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float eps, str group, str face) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
lib.define(
    "panes_plain_backward(Tensor g, Tensor[] xs, Tensor[] weights, Tensor[] gammas, Tensor pane_mean, Tensor pane_var, "
    "Tensor rows, float eps, str group) -> (Tensor[], Tensor[], Tensor[], Tensor)"
)


def _forward(xs, weights, gammas, betas, eps, group, face):
    n, _, t = xs[0].shape
    bn, count = _face("bn_relu_dropout", face), n * t
    wide = wide_dtype(xs[0])
    out = torch.stack(betas).sum(0)  # of all rows with the first pane; wide: however many panes, one rounding
    pane_mean, pane_var, total = [], [], out.new_empty(0)
    for x, w, gamma in zip(xs, weights, gammas, strict=True):
        y = _rows(ntc(x)) @ w.flatten(1).to(x.dtype).T
        mean, m2 = (s.to(wide) for s in bn.stats(y.view(n, t, -1).transpose(1, 2)))
        if group:
            mean, m2, total = sync.merge_stats(mean, m2, count, group)
        var = m2 / (total if group else count)
        scaled = (_centred(y, mean), gamma * (var + eps).rsqrt())
        out = out.addcmul_(*scaled) if pane_mean else torch.addcmul(out, *scaled)
        pane_mean.append(mean)
        pane_var.append(var)
    out = out.to(xs[0].dtype).view(n, t, -1).transpose(1, 2)
    return out, torch.stack(pane_mean), torch.stack(pane_var), total


def _centred(y, mean):
    """y - mean in the dtype of `mean`, in place of `y` where that is y's."""
    return y.sub_(mean) if y.dtype == mean.dtype else y - mean


def _backward(g, xs, weights, gammas, pane_mean, pane_var, rows, eps, group):
    n, _, t = g.shape
    g = _rows(ntc(g))
    wide, m = pane_mean.dtype, rows if group else n * t
    dbeta = g.sum(0, dtype=wide)
    centred = g - sync.all_reduce(dbeta.clone(), group) / m
    dxs, dweights, dgammas = [], [], []
    for k, (x, weight, gamma) in enumerate(zip(xs, weights, gammas, strict=True)):
        x, w = _rows(ntc(x)), weight.flatten(1).to(x.dtype)
        rstd = (pane_var[k] + eps).rsqrt()
        y = _centred(x @ w.T, pane_mean[k])
        dgamma = (g * y).sum(0).mul_(rstd)
        slope = sync.all_reduce(dgamma.clone(), group).mul_(rstd) / m
        u, a = torch.addcmul(centred, y, slope, value=-1, out=y), gamma * rstd
        if x.dtype == wide:  # a scales the weight and its gradient, rather than every row of u
            dx, dw = u @ (a[:, None] * weight.flatten(1)).to(x.dtype), a[:, None] * product(u.T, x)
        else:  # g has 16 bits and u is near it: rounded before the scale, u would be g again, without what is taken off
            u = torch.mul(u, a, out=u.new_empty(u.shape, dtype=x.dtype))
            dx, dw = u @ w, product(u.T, x)
        dxs.append(dx.view(n, t, -1).transpose(1, 2))
        dweights.append(dw.to(weight.dtype).view(weight.shape))
        dgammas.append(dgamma)
    return dxs, dweights, dgammas, dbeta


lib.impl("panes_plain", without_autocast(_forward), "CompositeExplicitAutograd")
lib.impl("panes_plain_backward", without_autocast(_backward), "CompositeExplicitAutograd")


@torch.library.register_fake("jasper_fast::panes_plain", lib=lib)
def _(xs, weights, gammas, betas, eps, group, face):
    n, _, t = xs[0].shape
    c_out, wide = weights[0].shape[0], wide_dtype(xs[0])
    stat = xs[0].new_empty((len(xs), c_out), dtype=wide)
    out = xs[0].new_empty((n, t, c_out)).transpose(1, 2)
    return out, stat, torch.empty_like(stat), stat.new_empty(() if group else 0)


@torch.library.register_fake("jasper_fast::panes_plain_backward", lib=lib)
def _(g, xs, weights, gammas, pane_mean, pane_var, rows, eps, group):
    n, _, t = g.shape
    dxs = [g.new_empty((n, t, x.shape[1])).transpose(1, 2) for x in xs]
    like = [[torch.empty_like(v) for v in vs] for vs in (weights, gammas)]
    return dxs, *like, pane_mean.new_empty(pane_mean.shape[1])


def _save(ctx, inputs, output):
    xs, weights, gammas, _, ctx.eps, ctx.group, _ = inputs
    ctx.count = len(xs)
    ctx.save_for_backward(*xs, *weights, *gammas, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad(ctx, g, *_):
    n = ctx.count
    if g is None:
        return *([None] * n for _ in range(4)), None, None, None
    saved = list(ctx.saved_tensors)
    lists = [saved[i * n : (i + 1) * n] for i in range(3)]
    dxs, dweights, dgammas, dbeta = torch.ops.jasper_fast.panes_plain_backward(
        g, *lists, *saved[-3:], ctx.eps, ctx.group
    )
    return dxs, dweights, dgammas, [dbeta.clone() for _ in range(n)], None, None, None


torch.library.register_autograd("jasper_fast::panes_plain", _grad, setup_context=_save, lib=lib)


def panes_plain(
    xs: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    *,
    eps: float = 1e-3,
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the panes of a block in training, pane by pane: what `panes` gives, without Gram matrices.

    Returns (sum (N, C_out, T), means, unbiased variances (P, C_out)); `backend` takes the statistics, over the rows of
    all ranks of `group` where there is one. Arguments, errors and equivalent as for `panes`.
    """
    wide, name = wide_dtype(xs[0]), sync.name(group)
    check_rows(xs[0], name)
    out, mean, var, rows = torch.ops.jasper_fast.panes_plain(
        list(xs), list(weights), [g.to(wide) for g in gammas], [b.to(wide) for b in betas], eps, name,
        norm_face_of(xs[0], weights[0].shape[0], xs[0].shape[2], backend),
    )  # fmt: skip
    return out, mean, unbiased(var, xs[0], rows if name else None)
