"""The sum of dense-residual panes (1x1 conv + batch norm), with statistics from the Gram matrices of their inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jasper_fast.kernels.layout import empty_ntc, wide_dtype
from jasper_fast.kernels.panes import gram as impl
from jasper_fast.ops import sync
from jasper_fast.ops.registration import lib, register_autograd, without_autocast

lib.define("gram(Tensor x, str group) -> (Tensor, Tensor, Tensor)")
lib.define("gram_backward(Tensor x, Tensor mean, Tensor rows, Tensor dmean, Tensor dcov, str group) -> Tensor")
lib.define("pane_stats(Tensor mean, Tensor cov, Tensor[] weights) -> (Tensor, Tensor)")
lib.define("pane_stats_backward(Tensor dvar, Tensor cov, Tensor[] weights) -> (Tensor, Tensor)")
lib.define(
    "panes_given(Tensor[] xs, Tensor[] means, Tensor[] pane_vars, Tensor[] weights, Tensor[] gammas, Tensor[] betas, "
    "float eps, bool synced) -> Tensor"
)
lib.define(
    "panes_given_backward(Tensor g, Tensor[] xs, Tensor[] means, Tensor[] pane_vars, Tensor[] weights, "
    "Tensor[] gammas, float eps, bool synced) -> (Tensor[], Tensor, Tensor, Tensor[], Tensor, Tensor)"
)
lib.define(
    "panes(Tensor[] xs, Tensor[] means, Tensor[] covs, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float eps, "
    "bool synced) -> (Tensor, Tensor, Tensor)"
)
lib.define(
    "panes_backward(Tensor g, Tensor[] xs, Tensor[] means, Tensor[] covs, Tensor[] weights, Tensor[] gammas, "
    "Tensor pane_mean, Tensor pane_var, float eps, bool synced) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor)"
)


def _gram(x, group):
    mean, cov = impl.gram(x)
    if group:
        return sync.merge_covariance(mean, cov, x.shape[0] * x.shape[2], group, impl.lower)
    return mean, cov, mean.new_empty(0)


def _gram_backward(x, mean, rows, dmean, dcov, group):
    n, c, t = x.shape
    if group:
        sums = sync.all_reduce(torch.cat([dmean, dcov]), group)
        dmean, dcov = sums[:c], sums[c:]
    return impl.gram_backward(x, mean, dmean, dcov, rows if group else n * t)


def _panes_given(xs, means, pane_vars, weights, gammas, betas, eps, synced):
    return impl.forward(xs, means, pane_vars, weights, gammas, betas, eps)


def _panes(xs, means, covs, weights, gammas, betas, eps, synced):
    """Computes `pane_stats` of each pane, then `panes_given`."""
    stats = [impl.statistics(m, s, [w]) for m, s, w in zip(means, covs, weights, strict=True)]
    mean, var = (torch.stack(of) for of in zip(*stats, strict=True))
    return impl.forward(xs, means, list(var), weights, gammas, betas, eps), mean, var


def _panes_backward(g, xs, means, covs, weights, gammas, pane_mean, pane_var, eps, synced):
    given = impl.backward(g, xs, means, list(pane_var), weights, gammas, eps, synced)
    dxs, dmeans, dvars, dweights, dgammas, dbetas = given
    dcovs = []
    for dvar, cov, weight, dw in zip(dvars, covs, weights, dweights, strict=True):
        dcov, more = impl.statistics_backward(dvar, cov, [weight])
        dcovs.append(dcov)
        dw += more.view_as(dw)
    dmeans = [dm.clone() for dm in dmeans.split([m.shape[0] for m in means])]
    return dxs, dmeans, dcovs, dweights, [dgamma.clone() for dgamma in dgammas], dbetas[0].clone()


lib.impl("gram", without_autocast(_gram), "CompositeExplicitAutograd")
lib.impl("gram_backward", without_autocast(_gram_backward), "CompositeExplicitAutograd")
lib.impl("pane_stats", without_autocast(impl.statistics), "CompositeExplicitAutograd")
lib.impl("pane_stats_backward", without_autocast(impl.statistics_backward), "CompositeExplicitAutograd")
lib.impl("panes_given", without_autocast(_panes_given), "CompositeExplicitAutograd")
lib.impl("panes_given_backward", without_autocast(impl.backward), "CompositeExplicitAutograd")
lib.impl("panes", without_autocast(_panes), "CompositeExplicitAutograd")
lib.impl("panes_backward", without_autocast(_panes_backward), "CompositeExplicitAutograd")


@torch.library.register_fake("jasper_fast::gram", lib=lib)
def _(x, group):
    c, wide = x.shape[1], wide_dtype(x)
    return (
        x.new_empty(c, dtype=wide),
        x.new_empty(impl.kept(c), dtype=wide),
        x.new_empty(() if group else 0, dtype=wide),
    )


@torch.library.register_fake("jasper_fast::gram_backward", lib=lib)
def _(x, mean, rows, dmean, dcov, group):
    return empty_ntc(*x.shape, like=x)


@torch.library.register_fake("jasper_fast::pane_stats", lib=lib)
def _(mean, cov, weights):
    outputs = sum(w.shape[0] for w in weights)
    return mean.new_empty(outputs), mean.new_empty(outputs)


@torch.library.register_fake("jasper_fast::pane_stats_backward", lib=lib)
def _(dvar, cov, weights):
    return torch.empty_like(cov), cov.new_empty((dvar.shape[0], weights[0].shape[1]))


@torch.library.register_fake("jasper_fast::panes_given", lib=lib)
def _(xs, means, pane_vars, weights, gammas, betas, eps, synced):
    n, _, t = xs[0].shape
    return empty_ntc(n, weights[0].shape[0], t, like=xs[0])


@torch.library.register_fake("jasper_fast::panes_given_backward", lib=lib)
def _(g, xs, means, pane_vars, weights, gammas, eps, synced):
    dxs = [empty_ntc(*x.shape, like=g) for x in xs]
    stats = [means[0].new_empty((len(xs), gammas[0].shape[0])) for _ in range(3)]
    dmeans = means[0].new_empty(sum(m.shape[0] for m in means))
    return dxs, dmeans, stats[0], [torch.empty_like(w) for w in weights], *stats[1:]


@torch.library.register_fake("jasper_fast::panes", lib=lib)
def _(xs, means, covs, weights, gammas, betas, eps, synced):
    n, _, t = xs[0].shape
    c_out = weights[0].shape[0]
    stat = means[0].new_empty((len(xs), c_out))
    return empty_ntc(n, c_out, t, like=xs[0]), stat, torch.empty_like(stat)


@torch.library.register_fake("jasper_fast::panes_backward", lib=lib)
def _(g, xs, means, covs, weights, gammas, pane_mean, pane_var, eps, synced):
    dxs = [empty_ntc(*x.shape, like=g) for x in xs]
    like = [[torch.empty_like(v) for v in vs] for vs in (means, covs, weights, gammas)]
    return dxs, *like, pane_mean.new_empty(pane_mean.shape[1])


def _gram_save(ctx, inputs, output):
    ctx.group = inputs[1]
    ctx.save_for_backward(inputs[0], output[0], output[2])
    ctx.mark_non_differentiable(output[2])


def _gram_grad(ctx, dmean, dcov, _drows):
    return torch.ops.jasper_fast.gram_backward(*ctx.saved_tensors, dmean, dcov, ctx.group), None


def _panes_save(ctx, inputs, output):
    *lists, _, ctx.eps, ctx.synced = inputs
    ctx.count = len(lists[0])
    ctx.save_for_backward(*(t for tensors in lists for t in tensors), output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _panes_grad(ctx, g, _dmean, _dvar):
    n = ctx.count
    if g is None:
        return *([None] * n for _ in range(6)), None, None
    saved = list(ctx.saved_tensors)
    lists = [saved[i * n : (i + 1) * n] for i in range(5)]
    dxs, dmeans, dcovs, dweights, dgammas, dbeta = torch.ops.jasper_fast.panes_backward(
        g, *lists, *saved[-2:], ctx.eps, ctx.synced
    )
    return dxs, dmeans, dcovs, dweights, dgammas, [dbeta.clone() for _ in range(n)], None, None


def _stats_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], *inputs[2])
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)


def _stats_grad(ctx, _dmean, dvar):
    cov, *weights = ctx.saved_tensors
    if dvar is None:
        return None, None, [None] * len(weights)
    dcov, dweights = torch.ops.jasper_fast.pane_stats_backward(dvar, cov, weights)
    parts = dweights.split([w.shape[0] for w in weights])
    return None, dcov, [dw.view(w.shape).to(w.dtype) for dw, w in zip(parts, weights, strict=True)]


def _given_save(ctx, inputs, output):
    *lists, _, ctx.eps, ctx.synced = inputs
    ctx.count = len(lists[0])
    ctx.save_for_backward(*(t for tensors in lists for t in tensors))


def _given_grad(ctx, g):
    n, saved = ctx.count, ctx.saved_tensors
    lists = [list(saved[i * n : (i + 1) * n]) for i in range(5)]
    grads = torch.ops.jasper_fast.panes_given_backward(g, *lists, ctx.eps, ctx.synced)
    dxs, dmeans, dvars, dweights, dgammas, dbetas = grads
    dmeans = list(dmeans.split([m.shape[0] for m in lists[1]]))
    return dxs, dmeans, list(dvars.unbind()), dweights, list(dgammas.unbind()), list(dbetas.unbind()), None, None


register_autograd("gram", _gram_grad, _gram_save)
register_autograd("pane_stats", _stats_grad, _stats_save)
register_autograd("panes_given", _given_grad, _given_save)
register_autograd("panes", _panes_grad, _panes_save)


class Gram(NamedTuple):
    """Mean (C,) and covariance of the rows of a block output and, for a group of ranks, the number of rows (0-d).

    The covariance is stored as L (see `kernels.panes.gram.lower`), a vector of about three quarters of C*C elements.
    stats: mean and variance, (C_out,) each, of the output of one pane, if `pane_stats` has computed them.
    """

    mean: Tensor
    cov: Tensor
    rows: Tensor | None
    stats: tuple[Tensor, Tensor] | None = None


def gram(x: Tensor, group: dist.ProcessGroup | None = None) -> Gram:
    """Returns the mean (C,) and L of the covariance of the rows of `x` (N, C, T), fp32 (fp64 for fp64), differentiable.

    With `group`, the statistics are over the rows of all its ranks (N*T may differ), and backward adds up the gradients
    of all ranks. Equivalent to `r = x.transpose(1, 2).reshape(-1, C)`; `r.mean(0)`, `lower(torch.cov(r.T,
    correction=0))`.
    """
    name = sync.name(group)
    mean, cov, rows = torch.ops.jasper_fast.gram(x, name)
    return Gram(mean, cov, rows if name else None)


def pane_stats(gram: Gram, weights: list[Tensor]) -> list[Gram]:
    """Returns `gram` once for each pane that reads its block output, with the statistics of that pane.

    `weights`: (C_out, C, 1) of each pane. The statistics of all panes are computed at once. They are equivalent to the
    mean and the biased variance over the rows of `x.transpose(1, 2).reshape(-1, C) @ weight[:, :, 0].T`, per pane.
    """
    sizes = [w.shape[0] for w in weights]
    mean, var = torch.ops.jasper_fast.pane_stats(gram.mean, gram.cov, list(weights))
    return [gram._replace(stats=pair) for pair in zip(mean.split(sizes), var.split(sizes), strict=True)]


def panes(
    xs: list[Tensor],
    grams: list[Gram],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    *,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (sum (N, C_out, T), means, unbiased variances (P, C_out)) of a block's panes (1x1 convs) in training.

    `xs`: P block outputs (N, C_k, T) of one dtype, zero in the padding. `grams[k]`: `gram(xs[k])`, or one from
    `pane_stats` with the statistics for `weights[k]`. `weights[k]` (C_out, C_k, 1); `gammas[k]`, `betas[k]` (C_out,).
    The statistics are over all N*T rows, or with grams of a group over the rows of all its ranks. The means and
    variances are meant for updating the running statistics. Raises ValueError for N*T = 1 as PyTorch does. Equivalent
    to `sum(F.batch_norm(F.conv1d(x, w), None, None, gamma, beta, training=True, eps=eps) for ...)`.
    """
    wide, rows = wide_dtype(xs[0]), grams[0].rows
    check_rows(xs[0], rows is not None)
    means, how = [g.mean for g in grams], (eps, rows is not None)
    norms = [g.to(wide) for g in gammas], [b.to(wide) for b in betas]
    if all(g.stats for g in grams):
        mean, var = zip(*(g.stats for g in grams), strict=True)
        out = torch.ops.jasper_fast.panes_given(list(xs), means, list(var), list(weights), *norms, *how)
        mean, var = torch.stack(mean).detach(), torch.stack(var).detach()
    else:
        covs = [g.cov for g in grams]
        out, mean, var = torch.ops.jasper_fast.panes(list(xs), means, covs, list(weights), *norms, *how)
    return out, mean, unbiased(var, xs[0], rows)


def check_rows(x: Tensor, synced: bool | str) -> None:
    """Raises ValueError if `x` (N, C, T) has one row and no other rank has any, because one row has no variance."""
    if not synced and x.shape[0] * x.shape[2] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def unbiased(var: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    """Returns `var` with divisor M - 1 in place of M, where M is `rows`, or the number of rows of `x` (N, C, T)."""
    m = x.shape[0] * x.shape[2] if rows is None else rows
    return var * (m / (m - 1))
