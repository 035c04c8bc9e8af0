"""Dense-residual panes (1x1 conv + batch norm) summed, with batch statistics from the Gram matrix of their inputs.

A pane is BN(x W^T) over the M = N*T rows of a block output x. With m = mean(x) and S = cov(x) (C x C, once per block
output, shared by every later block):  mean_y = W m,  var_y = diag(W S W^T),  a = gamma * (var_y + eps)^-1/2, and the
panes of a block are one sum of GEMMs,  out = sum_k x_k (diag(a_k) W_k)^T + (beta_k - a_k mean_y_k):  no pane output is
ever stored, forward or backward. DESIGN 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.kernels.layout import ntc, rows
from jasper_fast.ops.library import lib, without_autocast

lib.define("gram(Tensor x) -> (Tensor, Tensor)")
lib.define("gram_backward(Tensor x, Tensor mean, Tensor dmean, Tensor dcov) -> Tensor")
lib.define(
    "panes(Tensor[] xs, Tensor[] means, Tensor[] covs, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float eps) "
    "-> (Tensor, Tensor, Tensor)"
)
lib.define(
    "panes_backward(Tensor g, Tensor[] xs, Tensor[] means, Tensor[] covs, Tensor[] weights, Tensor[] gammas, "
    "Tensor pane_mean, Tensor pane_var, float eps) -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor)"
)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gram(x):
    x = rows(ntc(x)).to(_wide(x))
    mean = x.mean(0)
    centred = x - mean  # before the product: E[x x^T] - m m^T would cancel
    return mean, _row_product(centred).div_(x.shape[0]).to(mean.dtype)


def _row_product(x):
    """x^T x, on the CPU summed in fp64 over chunks of rows: a variance keeps the accuracy that batch_norm has there."""
    if x.is_cuda or x.dtype == torch.float64:
        return x.T @ x
    total = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
    for chunk in x.split(256):
        total += chunk.T @ chunk
    return total


def _gram_backward(x, mean, dmean, dcov):
    n, c, t = x.shape
    m = n * t
    d = (dcov + dcov.T).div_(m)
    k = dmean / m - mean @ d
    return torch.addmm(k, rows(ntc(x)).to(d.dtype), d).to(x.dtype).view(n, t, c).transpose(1, 2)


def _panes(xs, means, covs, weights, gammas, betas, eps):
    n, _, t = xs[0].shape
    out, pane_mean, pane_var = None, [], []
    for x, m, s, w, gamma, beta in zip(xs, means, covs, weights, gammas, betas, strict=True):
        w = w.flatten(1).to(s.dtype)
        mean, var = w @ m, ((w @ s) * w).sum(1).clamp_min_(0)
        scaled = ((gamma * (var + eps).rsqrt())[:, None] * w).to(x.dtype)
        # from the rounded weights, so that their rounding moves the centred rows only
        shift = (beta.double() - scaled.double() @ m.double()).to(x.dtype)
        x, scaled = rows(ntc(x)), scaled.T
        out = torch.addmm(shift, x, scaled) if out is None else out.add_(shift).addmm_(x, scaled)
        pane_mean.append(mean)
        pane_var.append(var)
    return out.view(n, t, -1).transpose(1, 2), torch.stack(pane_mean), torch.stack(pane_var)


def _panes_backward(g, xs, means, covs, weights, gammas, pane_mean, pane_var, eps):
    n, _, t = g.shape
    g = rows(ntc(g))
    wide = pane_mean.dtype
    total = g.sum(0, dtype=wide)
    dxs, dmeans, dcovs, dweights, dgammas = [], [], [], [], []
    for k, (x, m, s, weight, gamma) in enumerate(zip(xs, means, covs, weights, gammas, strict=True)):
        w = weight.flatten(1).to(wide)
        rstd = (pane_var[k] + eps).rsqrt()
        a = gamma * rstd
        p = (g.T @ rows(ntc(x))).to(wide)
        da = (p * w).sum(1) - total * pane_mean[k]
        dgamma = rstd * da
        dvar = -0.5 * gamma * rstd**3 * da
        dmean_y = -a * total
        ws = w @ s
        dw = a[:, None] * p + dmean_y[:, None] * m + (2 * dvar)[:, None] * ws
        dxs.append((g @ (a[:, None] * w).to(g.dtype)).view(n, t, -1).transpose(1, 2))
        dmeans.append(dmean_y @ w)
        dcovs.append(w.T @ (dvar[:, None] * w))
        dweights.append(dw.to(weight.dtype).view(weight.shape))
        dgammas.append(dgamma)
    return dxs, dmeans, dcovs, dweights, dgammas, total


lib.impl("gram", without_autocast(_gram), "CompositeExplicitAutograd")
lib.impl("gram_backward", without_autocast(_gram_backward), "CompositeExplicitAutograd")
lib.impl("panes", without_autocast(_panes), "CompositeExplicitAutograd")
lib.impl("panes_backward", without_autocast(_panes_backward), "CompositeExplicitAutograd")


@torch.library.register_fake("jasper_fast::gram", lib=lib)
def _(x):
    c = x.shape[1]
    return x.new_empty(c, dtype=_wide(x)), x.new_empty((c, c), dtype=_wide(x))


@torch.library.register_fake("jasper_fast::gram_backward", lib=lib)
def _(x, mean, dmean, dcov):
    n, c, t = x.shape
    return x.new_empty((n, t, c)).transpose(1, 2)


@torch.library.register_fake("jasper_fast::panes", lib=lib)
def _(xs, means, covs, weights, gammas, betas, eps):
    n, _, t = xs[0].shape
    c_out = weights[0].shape[0]
    stat = means[0].new_empty((len(xs), c_out))
    return xs[0].new_empty((n, t, c_out)).transpose(1, 2), stat, torch.empty_like(stat)


@torch.library.register_fake("jasper_fast::panes_backward", lib=lib)
def _(g, xs, means, covs, weights, gammas, pane_mean, pane_var, eps):
    n, _, t = g.shape
    dxs = [g.new_empty((n, t, x.shape[1])).transpose(1, 2) for x in xs]
    like = [[torch.empty_like(v) for v in vs] for vs in (means, covs, weights, gammas)]
    return dxs, *like, pane_mean.new_empty(pane_mean.shape[1])


def _gram_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])


def _gram_grad(ctx, dmean, dcov):
    return torch.ops.jasper_fast.gram_backward(*ctx.saved_tensors, dmean, dcov)


def _panes_save(ctx, inputs, output):
    xs, means, covs, weights, gammas, _, ctx.eps = inputs
    ctx.count = len(xs)
    ctx.save_for_backward(*xs, *means, *covs, *weights, *gammas, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _panes_grad(ctx, g, _dmean, _dvar):
    n = ctx.count
    saved = list(ctx.saved_tensors)
    lists = [saved[i * n : (i + 1) * n] for i in range(5)]
    dxs, dmeans, dcovs, dweights, dgammas, dbeta = torch.ops.jasper_fast.panes_backward(g, *lists, *saved[-2:], ctx.eps)
    return dxs, dmeans, dcovs, dweights, dgammas, [dbeta.clone() for _ in range(n)], None


torch.library.register_autograd("jasper_fast::gram", _gram_grad, setup_context=_gram_save, lib=lib)
torch.library.register_autograd("jasper_fast::panes", _panes_grad, setup_context=_panes_save, lib=lib)


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of the rows of `x` (N, C, T), fp32 (fp64 for fp64), differentiable.

    Equivalent to `r = x.transpose(1, 2).reshape(-1, C)`; `r.mean(0)`, `torch.cov(r.T, correction=0)`.
    """
    return torch.ops.jasper_fast.gram(x)


def panes(
    xs: list[Tensor],
    grams: list[tuple[Tensor, Tensor]],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    *,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the panes of a block in training: returns (sum (N, C_out, T), pane means (P, C_out), biased variances).

    `xs`: P block outputs (N, C_k, T), zero in the padding; `grams[k] = gram(xs[k])`; `weights[k]` (C_out, C_k, 1);
    `gammas[k]`, `betas[k]` (C_out,). Statistics run over all N*T rows. Equivalent to
    `sum(F.batch_norm(F.conv1d(x, w), None, None, gamma, beta, training=True, eps=eps) for ...)`.
    """
    means, covs = zip(*grams, strict=True)
    wide = _wide(xs[0])
    return torch.ops.jasper_fast.panes(
        list(xs), list(means), list(covs), list(weights), [g.to(wide) for g in gammas], [b.to(wide) for b in betas], eps
    )
