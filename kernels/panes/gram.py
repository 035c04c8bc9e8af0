"""The Gram form of the panes: batch statistics of a 1x1 conv's output from the mean and covariance of its input.

A pane is BN(x W^T) over the M = N*T rows of a block output x. With m = mean(x) and S = cov(x) (C x C, once for each
block output, shared by every later block):

    mean_y = W m,   var_y = diag(W S W^T),   a = gamma*(var_y + eps)^-1/2
    out = sum_k x_k (diag(a_k) W_k)^T + (beta_k - a_k mean_y_k)

No pane output is stored, forward or backward. Where x has a large mean its rows are centred before a product, or what
multiplies them is centred, so that rounding is relative to deviations.

S is symmetric, so three quarters of it are made and kept: L, the block lower triangle of its halves, flat, with what
lies below the diagonal blocks doubled. For any row w of W, w S w^T = w L w^T, and 2 S = L + L^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.kernels.layout import ntc, product, rows, wide_dtype


def lower(s: Tensor) -> Tensor:
    """L of a symmetric matrix (C, C), as `Gram.cov` holds it."""
    half = s.shape[0] // 2
    below = torch.cat([2 * s[half:, :half], s[half:, half:]], 1)
    return torch.cat([s[:half, :half].flatten(), below.flatten()])


def kept(c):
    """Elements of a flat L."""
    return (c // 2) ** 2 + (c - c // 2) * c


def _halves(a):
    """The first C//2 of the C columns of `a`, and the others."""
    return a.split((a.shape[1] // 2, a.shape[1] - a.shape[1] // 2), 1)


def _blocks(flat, c):
    """Of a flat L the blocks L11, L21 and L22, then the last two as one, all views: rows and columns cut at c//2."""
    half = c // 2
    top, below = flat.split((half**2, kept(c) - half**2))
    below = below.view(c - half, c)
    return top.view(half, half), *_halves(below), below


def _lower_product(a, b):
    """The blocks of a^T b, flat as those of L, nothing doubled."""
    left, right = _halves(a)
    return torch.cat([product(left.T, _halves(b)[0]).flatten(), product(right.T, b).flatten()])


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) of the rows of `x` (N, C, T) and L of their covariance, fp32 or wider."""
    x = rows(ntc(x))
    mean = x.mean(0, dtype=wide_dtype(x))
    # centred before the product, as E[x x^T] - m m^T would cancel; by `out` in one pass, without a difference in fp32
    centred = torch.sub(x, mean, out=torch.empty_like(x))
    cov = _row_product(centred).div_(x.shape[0]).to(mean.dtype)
    _blocks(cov, x.shape[1])[1].mul_(2)
    return mean, cov


def _row_product(x):
    """x^T x, on the CPU summed in fp64 over chunks of rows: a variance keeps the accuracy that batch_norm has there."""
    if x.is_cuda or x.dtype == torch.float64:
        return _lower_product(x, x)
    total = x.new_zeros(kept(x.shape[1]), dtype=torch.float64)
    for chunk in x.split(256):
        total += _lower_product(chunk, chunk)
    return total


def gram_backward(x: Tensor, mean: Tensor, dmean: Tensor, dcov: Tensor, m: Tensor | int) -> Tensor:
    """The gradient of `x` (N, C, T) from those of the mean and of L, taken over `m` rows."""
    n, c, t = x.shape
    d11, d21, d22, _ = _blocks(dcov, c)
    d = torch.cat([torch.cat([d11 + d11.T, 2 * d21.T], 1), torch.cat([2 * d21, d22 + d22.T], 1)]).div_(m)
    scale = d.new_ones(())
    if x.dtype.itemsize == 2:  # d is small: to about 1, by a power of two, so that 16 bits hold it
        scale = torch.ldexp(scale, -d.abs().amax().frexp().exponent)
        d = (d * scale).to(x.dtype)
    # from d as rounded, so that its rounding moves the centred rows only
    k = dmean / m - (mean @ d.to(mean.dtype)) / scale
    out = x.new_empty((n * t, c))
    torch.addcdiv(k, product(rows(ntc(x)), d), scale, out=out)
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


def forward(
    xs: list[Tensor],
    means: list[Tensor],
    covs: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the panes (N, C_out, T), means (P, C_out), variances (P, C_out)) of P inputs and their `gram`s."""
    n, _, t = xs[0].shape
    shift, products, pane_mean, pane_var = 0, [], [], []
    for x, m, s, w, gamma, beta in zip(xs, means, covs, weights, gammas, betas, strict=True):
        w = w.flatten(1).to(s.dtype)
        mean, var = w @ m, (_times_lower(w, s) * w).sum(1).clamp_min_(0)
        scaled = ((gamma * (var + eps).rsqrt())[:, None] * w).to(x.dtype)
        # from the rounded weights, so that their rounding moves the centred rows only
        shift = shift + beta.double() - scaled.double() @ m.double()
        products.append((rows(ntc(x)), scaled.T))
        pane_mean.append(mean)
        pane_var.append(var)
    out = torch.addmm(shift.to(xs[0].dtype), *products[0])  # all shifts at once: the sum is written once a pane
    for x, scaled in products[1:]:
        out.addmm_(x, scaled)
    return out.view(n, t, -1).transpose(1, 2), torch.stack(pane_mean), torch.stack(pane_var)


def backward(
    g: Tensor,
    xs: list[Tensor],
    means: list[Tensor],
    covs: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor],
    pane_mean: Tensor,
    pane_var: Tensor,
    eps: float,
    synced: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Gradients of xs, means, covs, weights and gammas, lists of P, and of each beta (they are equal), from `g`.

    `synced`: means and covariances are those of several ranks.
    """
    n, _, t = g.shape
    g = rows(ntc(g))
    wide = pane_mean.dtype
    total = g.sum(0, dtype=wide)
    dxs, dmeans, dcovs, dweights, dgammas = [], [], [], [], []
    for k, (x, m, s, weight, gamma) in enumerate(zip(xs, means, covs, weights, gammas, strict=True)):
        w = weight.flatten(1).to(wide)
        rstd = (pane_var[k] + eps).rsqrt()
        a = gamma * rstd
        p = product(g.T, rows(ntc(x))).addr_(total, m, alpha=-1)  # g^T (x - m)
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
