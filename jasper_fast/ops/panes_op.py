"""Dense-residual panes (1x1 conv + batch norm) summed, with batch statistics from the Gram matrix of their inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jasper_fast.kernels.layout import wide_dtype
from jasper_fast.kernels.panes import gram as impl
from jasper_fast.ops import sync
from jasper_fast.ops.registration import lib, register_autograd, without_autocast

lib.define("gram(Tensor x, str group) -> (Tensor, Tensor, Tensor)")
lib.define("gram_backward(Tensor x, Tensor mean, Tensor rows, Tensor dmean, Tensor dcov, str group) -> Tensor")
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


def _panes(xs, means, covs, weights, gammas, betas, eps, synced):
    return impl.forward(xs, means, covs, weights, gammas, betas, eps)


lib.impl("gram", without_autocast(_gram), "CompositeExplicitAutograd")
lib.impl("gram_backward", without_autocast(_gram_backward), "CompositeExplicitAutograd")
lib.impl("panes", without_autocast(_panes), "CompositeExplicitAutograd")
lib.impl("panes_backward", without_autocast(impl.backward), "CompositeExplicitAutograd")


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
    n, c, t = x.shape
    return x.new_empty((n, t, c)).transpose(1, 2)


@torch.library.register_fake("jasper_fast::panes", lib=lib)
def _(xs, means, covs, weights, gammas, betas, eps, synced):
    n, _, t = xs[0].shape
    c_out = weights[0].shape[0]
    stat = means[0].new_empty((len(xs), c_out))
    return xs[0].new_empty((n, t, c_out)).transpose(1, 2), stat, torch.empty_like(stat)


@torch.library.register_fake("jasper_fast::panes_backward", lib=lib)
def _(g, xs, means, covs, weights, gammas, pane_mean, pane_var, eps, synced):
    n, _, t = g.shape
    dxs = [g.new_empty((n, t, x.shape[1])).transpose(1, 2) for x in xs]
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


register_autograd("gram", _gram_grad, _gram_save)
register_autograd("panes", _panes_grad, _panes_save)


class Gram(NamedTuple):
    """Mean (C,) and covariance of the rows of a block output, and, for a group of ranks, the number of rows (0-d).

    `cov` holds the covariance as L (see `kernels.panes.gram.lower`), a vector of about 3/4*C*C elements.
    """

    mean: Tensor
    cov: Tensor
    rows: Tensor | None


def gram(x: Tensor, group: dist.ProcessGroup | None = None) -> Gram:
    """Mean (C,) and L of the covariance of the rows of `x` (N, C, T), fp32 (fp64 for fp64), differentiable.

    With `group`, the statistics are over the rows of all its ranks (N*T may differ), and backward adds up the gradients
    of all ranks. Equivalent to `r = x.transpose(1, 2).reshape(-1, C)`; `r.mean(0)`, `lower(torch.cov(r.T,
    correction=0))`.
    """
    name = sync.name(group)
    mean, cov, rows = torch.ops.jasper_fast.gram(x, name)
    return Gram(mean, cov, rows if name else None)


def panes(
    xs: list[Tensor],
    grams: list[Gram],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    *,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the panes of a block in training: returns (sum (N, C_out, T), means, unbiased variances (P, C_out)).

    `xs`: P block outputs (N, C_k, T) of one dtype, zero in the padding; `grams[k] = gram(xs[k])`; `weights[k]`
    (C_out, C_k, 1); `gammas[k]`, `betas[k]` (C_out,). The statistics are over all N*T rows (of all ranks, if the grams
    are) and can update the running ones. Raises ValueError for N*T = 1, as PyTorch does. Equivalent to
    `sum(F.batch_norm(F.conv1d(x, w), None, None, gamma, beta, training=True, eps=eps) for ...)`.
    """
    wide, rows = wide_dtype(xs[0]), grams[0].rows
    check_rows(xs[0], rows is not None)
    out, mean, var = torch.ops.jasper_fast.panes(
        list(xs), [g.mean for g in grams], [g.cov for g in grams], list(weights), [g.to(wide) for g in gammas],
        [b.to(wide) for b in betas], eps, rows is not None,
    )  # fmt: skip
    return out, mean, unbiased(var, xs[0], rows)


def check_rows(x: Tensor, synced: bool | str) -> None:
    """Raises ValueError if `x` (N, C, T) has a single row and no other rank has any: it has no variance."""
    if not synced and x.shape[0] * x.shape[2] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def unbiased(var: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    """`var` with divisor M - 1 in place of M, where M is the number of rows of `x` (N, C, T), or `rows` if given."""
    m = x.shape[0] * x.shape[2] if rows is None else rows
    return var * (m / (m - 1))
