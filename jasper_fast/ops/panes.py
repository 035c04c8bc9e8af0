"""Dense-residual panes (1x1 conv + batch norm) summed, with batch statistics from the Gram matrix of their inputs.

A pane is BN(x W^T) over the M = N*T rows of a block output x. With m = mean(x) and S = cov(x) (C x C, once per block
output, shared by every later block):  mean_y = W m,  var_y = diag(W S W^T),  a = gamma * (var_y + eps)^-1/2, and the
panes of a block are one sum of GEMMs,  out = sum_k x_k (diag(a_k) W_k)^T + (beta_k - a_k mean_y_k):  no pane output is
ever stored, forward or backward. DESIGN 4.3. Where x has a large mean its rows are centred before a product, or what
multiplies them is centred, so that rounding is relative to deviations.

Of the symmetric S only L is made and kept, three quarters of it: the block lower triangle of its halves, with what lies
below the diagonal blocks doubled, flat. For any row w of W, w S w^T = w L w^T, and 2 S = L + L^T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jasper_fast import sync
from jasper_fast.kernels.layout import ntc, product, wide_dtype
from jasper_fast.kernels.layout import rows as _rows
from jasper_fast.ops.library import lib, without_autocast

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


def lower(s: Tensor) -> Tensor:
    """L of a symmetric matrix (C, C), as `Gram.cov` holds it."""
    half = s.shape[0] // 2
    below = torch.cat([2 * s[half:, :half], s[half:, half:]], 1)
    return torch.cat([s[:half, :half].flatten(), below.flatten()])


def _kept(c):
    """Elements of a flat L."""
    return (c // 2) ** 2 + (c - c // 2) * c


def _halves(a):
    """The first C//2 of the C columns of `a`, and the others."""
    return a.split((a.shape[1] // 2, a.shape[1] - a.shape[1] // 2), 1)


def _blocks(flat, c):
    """Of a flat L the blocks L11, L21 and L22, then the last two as one, all views: rows and columns cut at c//2."""
    half = c // 2
    top, below = flat.split((half**2, _kept(c) - half**2))
    below = below.view(c - half, c)
    return top.view(half, half), *_halves(below), below


def _lower_product(a, b):
    """The blocks of a^T b, flat as those of L, nothing doubled."""
    left, right = _halves(a)
    return torch.cat([product(left.T, _halves(b)[0]).flatten(), product(right.T, b).flatten()])


def _gram(x, group):
    x = _rows(ntc(x))
    mean = x.mean(0, dtype=wide_dtype(x))
    # centred before the product, as E[x x^T] - m m^T would cancel; by `out` in one pass, without a difference in fp32
    centred = torch.sub(x, mean, out=torch.empty_like(x))
    cov = _row_product(centred).div_(x.shape[0]).to(mean.dtype)
    _blocks(cov, x.shape[1])[1].mul_(2)
    if group:
        return sync.merge_covariance(mean, cov, x.shape[0], group, lower)
    return mean, cov, mean.new_empty(0)


def _row_product(x):
    """x^T x, on the CPU summed in fp64 over chunks of rows: a variance keeps the accuracy that batch_norm has there."""
    if x.is_cuda or x.dtype == torch.float64:
        return _lower_product(x, x)
    total = x.new_zeros(_kept(x.shape[1]), dtype=torch.float64)
    for chunk in x.split(256):
        total += _lower_product(chunk, chunk)
    return total


def _gram_backward(x, mean, rows, dmean, dcov, group):
    n, c, t = x.shape
    if group:
        sums = sync.all_reduce(torch.cat([dmean, dcov]), group)
        dmean, dcov = sums[:c], sums[c:]
    m = rows if group else n * t
    d11, d21, d22, _ = _blocks(dcov, c)
    d = torch.cat([torch.cat([d11 + d11.T, 2 * d21.T], 1), torch.cat([2 * d21, d22 + d22.T], 1)]).div_(m)
    scale = d.new_ones(())
    if x.dtype.itemsize == 2:  # d is small: to about 1, by a power of two, so that 16 bits hold it
        scale = torch.ldexp(scale, -d.abs().amax().frexp().exponent)
        d = (d * scale).to(x.dtype)
    # from d as rounded, so that its rounding moves the centred rows only
    k = dmean / m - (mean @ d.to(mean.dtype)) / scale
    out = x.new_empty((n * t, c))
    torch.addcdiv(k, product(_rows(ntc(x)), d), scale, out=out)
    return out.view(n, t, c).transpose(1, 2)


def _times_lower(w, flat):
    """w L."""
    l11, _, _, below = _blocks(flat, w.shape[1])
    left, right = _halves(w)
    out = right @ below
    _halves(out)[0].addmm_(left, l11)
    return out


def _times_twice(w, flat):
    """w (L + L^T) = 2 w S."""
    l11, l21, _, below = _blocks(flat, w.shape[1])
    left, right = _halves(w)
    out = right @ below
    _halves(out)[0].addmm_(left, l11, alpha=2)
    _halves(out)[1].addmm_(left, l21.T, beta=2)
    return out


def _panes(xs, means, covs, weights, gammas, betas, eps, synced):
    n, _, t = xs[0].shape
    shift, products, pane_mean, pane_var = 0, [], [], []
    for x, m, s, w, gamma, beta in zip(xs, means, covs, weights, gammas, betas, strict=True):
        w = w.flatten(1).to(s.dtype)
        mean, var = w @ m, (_times_lower(w, s) * w).sum(1).clamp_min_(0)
        scaled = ((gamma * (var + eps).rsqrt())[:, None] * w).to(x.dtype)
        # from the rounded weights, so that their rounding moves the centred rows only
        shift = shift + beta.double() - scaled.double() @ m.double()
        products.append((_rows(ntc(x)), scaled.T))
        pane_mean.append(mean)
        pane_var.append(var)
    out = torch.addmm(shift.to(xs[0].dtype), *products[0])  # all shifts at once: the sum is written once a pane
    for x, scaled in products[1:]:
        out.addmm_(x, scaled)
    return out.view(n, t, -1).transpose(1, 2), torch.stack(pane_mean), torch.stack(pane_var)


def _panes_backward(g, xs, means, covs, weights, gammas, pane_mean, pane_var, eps, synced):
    n, _, t = g.shape
    g = _rows(ntc(g))
    wide = pane_mean.dtype
    total = g.sum(0, dtype=wide)
    dxs, dmeans, dcovs, dweights, dgammas = [], [], [], [], []
    for k, (x, m, s, weight, gamma) in enumerate(zip(xs, means, covs, weights, gammas, strict=True)):
        w = weight.flatten(1).to(wide)
        rstd = (pane_var[k] + eps).rsqrt()
        a = gamma * rstd
        p = product(g.T, _rows(ntc(x))).addr_(total, m, alpha=-1)  # g^T (x - m)
        da = (p * w).sum(1)
        dgamma = rstd * da
        dvar = -0.5 * gamma * rstd**3 * da
        dw = torch.addcmul(a[:, None] * p, dvar[:, None], _times_twice(w, s))
        scaled = (a[:, None] * w).to(g.dtype)
        # what the rows' mean of g gives is taken off at once: it would only cancel, later and rounded. Ranks have
        # different ones, so where there are more it is left to the gradient of the mean.
        given = total @ scaled.to(wide)
        shift = torch.zeros_like(scaled[0]) if synced else (-given / g.shape[0]).to(g.dtype)
        dxs.append(torch.addmm(shift, g, scaled).view(n, t, -1).transpose(1, 2))
        dmeans.append(-given - shift.to(wide) * g.shape[0])
        dcovs.append(_lower_product(w, dvar[:, None] * w))
        dweights.append(dw.to(weight.dtype).view(weight.shape))
        dgammas.append(dgamma)
    return dxs, dmeans, dcovs, dweights, dgammas, total


lib.impl("gram", without_autocast(_gram), "CompositeExplicitAutograd")
lib.impl("gram_backward", without_autocast(_gram_backward), "CompositeExplicitAutograd")
lib.impl("panes", without_autocast(_panes), "CompositeExplicitAutograd")
lib.impl("panes_backward", without_autocast(_panes_backward), "CompositeExplicitAutograd")


@torch.library.register_fake("jasper_fast::gram", lib=lib)
def _(x, group):
    c, wide = x.shape[1], wide_dtype(x)
    return x.new_empty(c, dtype=wide), x.new_empty(_kept(c), dtype=wide), x.new_empty(() if group else 0, dtype=wide)


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


torch.library.register_autograd("jasper_fast::gram", _gram_grad, setup_context=_gram_save, lib=lib)
torch.library.register_autograd("jasper_fast::panes", _panes_grad, setup_context=_panes_save, lib=lib)


class Gram(NamedTuple):
    """Mean (C,) and covariance of a block output's rows, and their number (0-d) where all ranks of a group count.

    Of the covariance `lower` is held, a vector of about three quarters of C*C elements.
    """

    mean: Tensor
    cov: Tensor
    rows: Tensor | None


def gram(x: Tensor, group: dist.ProcessGroup | None = None) -> Gram:
    """Mean (C,) and `lower` of the covariance of the rows of `x` (N, C, T), fp32 (fp64 for fp64), differentiable.

    With `group` over the rows of all its ranks, which may have unlike N*T; backward then adds up their gradients.
    Equivalent to `r = x.transpose(1, 2).reshape(-1, C)`; `r.mean(0)`, `lower(torch.cov(r.T, correction=0))`.
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
    (C_out, C_k, 1); `gammas[k]`, `betas[k]` (C_out,). Statistics run over all N*T rows (of all ranks, where the grams
    do); they are what the running ones take in. Raises ValueError for N*T = 1 as PyTorch does. Equivalent to
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
    """Raises ValueError where `x` (N, C, T) has a single row to take a variance of, and no other rank has more."""
    if not synced and x.shape[0] * x.shape[2] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def unbiased(var: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    """`var` over the rows of `x` (N, C, T), or over `rows` of them on all ranks, with M - 1 in place of M."""
    m = x.shape[0] * x.shape[2] if rows is None else rows
    return var * (m / (m - 1))
