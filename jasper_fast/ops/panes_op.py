"""The sum of dense-residual panes (1x1 conv + batch norm), with statistics from the Gram matrices of their inputs."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from jasper_fast.kernels.layout import empty_ntc, wide_dtype
from jasper_fast.kernels.panes import gram as impl
from jasper_fast.ops import sync
from jasper_fast.ops.bn_relu_dropout_op import check_rows
from jasper_fast.ops.registration import lib, op, register_autograd


@op("gram(Tensor x, str group) -> (Tensor, Tensor, Tensor)")
def _gram(x, group):
    mean, cov = impl.gram(x)
    if group:
        return sync.merge_covariance(mean, cov, x.shape[0] * x.shape[2], group, impl.lower)
    return mean, cov, mean.new_empty(0)


@op("gram_backward(Tensor x, Tensor mean, Tensor rows, Tensor dmean, Tensor dcov, str group) -> Tensor")
def _gram_backward(x, mean, rows, dmean, dcov, group):
    n, c, t = x.shape
    if group:
        dmean, dcov = sync.all_reduce(torch.cat([dmean, dcov]), group).split([c, len(dcov)])
    return impl.gram_backward(x, mean, dmean, dcov, rows if group else n * t)


@op(
    "panes_given(Tensor[] xs, Tensor[] means, Tensor[] pane_vars, Tensor[] weights, Tensor[] gammas, Tensor[] betas, "
    "float eps, bool synced) -> Tensor"
)
def _panes_given(xs, means, pane_vars, weights, gammas, betas, eps, synced):
    return impl.forward(xs, means, pane_vars, weights, gammas, betas, eps)


@op(
    "panes(Tensor[] xs, Tensor[] means, Tensor[] covs, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float eps, "
    "bool synced) -> (Tensor, Tensor, Tensor)"
)
def _panes(xs, means, covs, weights, gammas, betas, eps, synced):
    """Computes `pane_stats` of each pane, then `panes_given`."""
    stats = [impl.statistics(m, s, [w]) for m, s, w in zip(means, covs, weights, strict=True)]
    mean, var = (torch.stack(of) for of in zip(*stats, strict=True))
    return impl.forward(xs, means, list(var), weights, gammas, betas, eps), mean, var


@op(
    "panes_backward(Tensor g, Tensor[] xs, Tensor[] means, Tensor[] covs, Tensor[] weights, Tensor[] gammas, "
    "Tensor pane_mean, Tensor pane_var, float eps, bool synced) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor)"
)
def _panes_backward(g, xs, means, covs, weights, gammas, pane_mean, pane_var, eps, synced):
    dxs, dmeans, dvars, dweights, dgammas, dbetas = impl.backward(
        g, xs, means, list(pane_var), weights, gammas, eps, synced
    )
    dcovs = []
    for dvar, cov, weight, dw in zip(dvars, covs, weights, dweights, strict=True):
        dcov, more = impl.statistics_backward(dvar, cov, [weight])
        dcovs.append(dcov)
        dw += more.view_as(dw)
    dmeans = [dm.clone() for dm in dmeans.split([m.shape[0] for m in means])]
    return dxs, dmeans, dcovs, dweights, [dgamma.clone() for dgamma in dgammas], dbetas[0].clone()


op("pane_stats(Tensor mean, Tensor cov, Tensor[] weights) -> (Tensor, Tensor)")(impl.statistics)
op("pane_stats_backward(Tensor dvar, Tensor cov, Tensor[] weights) -> (Tensor, Tensor)")(impl.statistics_backward)
op(
    "panes_given_backward(Tensor g, Tensor[] xs, Tensor[] means, Tensor[] pane_vars, Tensor[] weights, "
    "Tensor[] gammas, float eps, bool synced) -> (Tensor[], Tensor, Tensor, Tensor[], Tensor, Tensor)"
)(impl.backward)


@torch.library.register_fake("jasper_fast::gram", lib=lib)
def _(x, group):
    c, wide = x.shape[1], wide_dtype(x)
    return tuple(x.new_empty(size, dtype=wide) for size in (c, impl.kept(c), () if group else 0))


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
    ctx.set_materialize_grads(True)  # the gradient of the mean or of the covariance may be missing


@register_autograd("gram", _gram_save)
def _gram_grad(ctx, dmean, dcov, _drows):
    return torch.ops.jasper_fast.gram_backward(*ctx.saved_tensors, dmean, dcov, ctx.group), None


def _panes_save(ctx, inputs, output):
    *lists, _, ctx.eps, ctx.synced = inputs
    ctx.count, stats = len(lists[0]), output[1:] if isinstance(output, tuple) else ()
    ctx.save_for_backward(*itertools.chain(*lists), *stats)
    ctx.mark_non_differentiable(*stats)


def _saved(ctx):
    """Returns what `_panes_save` has saved: a list for each list of tensors, then the statistics."""
    saved, n = ctx.saved_tensors, ctx.count
    return *(list(saved[i * n : (i + 1) * n]) for i in range(5)), *saved[5 * n :]


@register_autograd("panes", _panes_save)
def _panes_grad(ctx, g, _dmean, _dvar):
    *grads, dbeta = torch.ops.jasper_fast.panes_backward(g, *_saved(ctx), ctx.eps, ctx.synced)
    return *grads, [dbeta.clone() for _ in range(ctx.count)], None, None


def _stats_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], *inputs[2])
    ctx.mark_non_differentiable(output[0])


@register_autograd("pane_stats", _stats_save)
def _stats_grad(ctx, _dmean, dvar):
    cov, *weights = ctx.saved_tensors
    dcov, dweights = torch.ops.jasper_fast.pane_stats_backward(dvar, cov, weights)
    parts = dweights.split([w.shape[0] for w in weights])
    return None, dcov, [dw.view(w.shape).to(w.dtype) for dw, w in zip(parts, weights, strict=True)]


@register_autograd("panes_given", _panes_save)
def _given_grad(ctx, g):
    saved = _saved(ctx)
    dxs, dmeans, dvars, dweights, dgammas, dbetas = torch.ops.jasper_fast.panes_given_backward(
        g, *saved, ctx.eps, ctx.synced
    )
    dmeans = list(dmeans.split([m.shape[0] for m in saved[1]]))
    return dxs, dmeans, list(dvars.unbind()), dweights, list(dgammas.unbind()), list(dbetas.unbind()), None, None


class Gram(NamedTuple):
    """Mean (C,) and covariance of the rows of a block output and, for a group of ranks, the number of rows (0-d).

    The covariance is stored as L (see `kernels.panes.gram.lower`), a vector of about three quarters of C*C elements.
    stats: mean and variance, (C_out,) each, of the output of one pane, if `pane_stats` has computed them.
    """

    mean: Tensor
    cov: Tensor
    rows: Tensor | None
    stats: tuple[Tensor, Tensor] | None = None


def gram(x: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Gram:
    """Returns the mean (C,) and L of the covariance of the rows of `x` (N, C, T), fp32 (fp64 for fp64), differentiable.

    With `group`, the statistics are over the rows of all its ranks (N*T may differ), and backward adds up the gradients
    of all ranks. Equivalent to `r = x.transpose(1, 2).reshape(-1, C)`; `r.mean(0)`, `lower(torch.cov(r.T,
    correction=0))`.
    """
    name = sync.name(group)
    mean, cov, rows = torch.ops.jasper_fast.gram(x, name)
    return Gram(mean, cov, rows if name else None)


def pane_stats(gram: Gram, weights: list[Tensor]) -> list[Gram]:
    """Returns for each pane a copy of `gram` to which the statistics of the pane's output are added.

    All panes read x, the block output of which `gram` is the Gram matrix. `weights`: (C_out, C, 1) of each pane. The
    statistics of all panes are computed together. They equal the mean and the biased variance over the rows of
    `x.transpose(1, 2).reshape(-1, C) @ weight[:, :, 0].T`, per pane.
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
    The statistics are over all N*T rows or, if the grams are of a group, over the rows of all its ranks. The means and
    variances are meant for updating the running statistics. Raises ValueError for empty lists, for shapes that do not
    fit and, without a group, for N*T < 2. Equivalent to
    `sum(F.batch_norm(F.conv1d(x, w), None, None, gamma, beta, training=True, eps=eps) for ...)`.
    """
    rows = grams[0].rows if grams else None
    check_panes(xs, weights, gammas, betas, rows is not None)
    wide, means, how = wide_dtype(xs[0]), [g.mean for g in grams], (eps, rows is not None)
    norms = [g.to(wide) for g in gammas], [b.to(wide) for b in betas]
    if all(g.stats for g in grams):
        mean, var = zip(*(g.stats for g in grams), strict=True)
        out = torch.ops.jasper_fast.panes_given(list(xs), means, list(var), list(weights), *norms, *how)
        mean, var = torch.stack(mean).detach(), torch.stack(var).detach()
    else:
        covs = [g.cov for g in grams]
        out, mean, var = torch.ops.jasper_fast.panes(list(xs), means, covs, list(weights), *norms, *how)
    return out, mean, unbiased(var, xs[0], rows)


def check_panes(
    xs: list[Tensor], weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor], synced: bool
) -> None:
    """Raises ValueError if there is no pane, if the tensors of a pane do not fit those of the first pane, and if
    `check_rows` raises it."""
    if not xs or not weights:
        raise ValueError("a sum of panes needs at least one pane")
    check_rows(xs[0], synced)
    (n, _, t), c_out = xs[0].shape, weights[0].shape[0]
    for x, weight, gamma, beta in zip(xs, weights, gammas, betas, strict=True):
        found = x.shape, weight.shape, gamma.shape, beta.shape
        c = found[0][1]
        if found != (wanted := ((n, c, t), (c_out, c, 1), (c_out,), (c_out,))):
            found = tuple(map(tuple, found))
            raise ValueError(f"x, weight, gamma and beta of a pane must have the shapes {wanted}, got {found}")


def unbiased(var: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    """Returns `var` with divisor M - 1 in place of M, where M is `rows`, or the number of rows of `x` (N, C, T)."""
    m = x.shape[0] * x.shape[2] if rows is None else rows
    return var * (m / (m - 1))
