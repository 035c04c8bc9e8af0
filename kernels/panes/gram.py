"""The Gram form of the panes: batch statistics of a 1x1 conv's output from the mean and covariance of its input.

A pane is BN(x W^T) over the M = N*T rows of a block output x. With m = mean(x) and S = cov(x) (C x C, computed once for
each block output and shared by every later block):

    mean_y = W m,   var_y = diag(W S W^T),   a = gamma*(var_y + eps)^-1/2
    out = sum_k x_k (diag(a_k) W_k)^T + (beta_k - a_k mean_y_k)

No pane output is stored, forward or backward. Either the rows of x or the matrix that multiplies them are centred
before a product. Rounding is then relative to deviations, even if x has a large mean.

S is symmetric, so only three quarters of it are computed and kept. Cut S into 2 x 2 blocks. L is its two diagonal
blocks and twice the block below the diagonal, in one flat tensor. For any row w of W, w S w^T = w L w^T, and 2 S = L +
L^T.
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
    """Number of elements of L."""
    return (c // 2) ** 2 + (c - c // 2) * c


def _halves(a):
    """The first C//2 of the C columns of `a`, and the other columns."""
    return a.split((a.shape[1] // 2, a.shape[1] - a.shape[1] // 2), 1)


def _blocks(flat, c):
    """Views of the blocks L11, L21 and L22 of L, and of L21 and L22 as one block; rows and columns are cut at c//2."""
    half = c // 2
    top, below = flat.split((half**2, kept(c) - half**2))
    below = below.view(c - half, c)
    return top.view(half, half), *_halves(below), below


def _lower_product(a, b):
    """The blocks of a^T b, laid out as those of L, but with no block doubled."""
    left, right = _halves(a)
    return torch.cat([product(left.T, _halves(b)[0]).flatten(), product(right.T, b).flatten()])


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (C,) of the rows of `x` (N, C, T) and the L of their covariance, fp32 or wider."""
    x = rows(ntc(x))
    mean = x.mean(0, dtype=wide_dtype(x))
    # centred before the product, because E[x x^T] - m m^T would cancel; `out` avoids a copy of the difference in fp32
    centred = torch.sub(x, mean, out=torch.empty_like(x))
    cov = _row_product(centred).div_(x.shape[0]).to(mean.dtype)
    _blocks(cov, x.shape[1])[1].mul_(2)
    return mean, cov


def _row_product(x):
    """x^T x. On a CPU, chunks of rows are summed in fp64, so that variances are as accurate as those of batch_norm
    there."""
    if x.is_cuda or x.dtype == torch.float64:
        return _lower_product(x, x)
    total = x.new_zeros(kept(x.shape[1]), dtype=torch.float64)
    for chunk in x.split(256):
        total += _lower_product(chunk, chunk)
    return total


def gram_backward(x: Tensor, mean: Tensor, dmean: Tensor, dcov: Tensor, m: Tensor | int) -> Tensor:
    """The gradient of `x` (N, C, T) from the gradients of the mean and of L, which were taken over `m` rows."""
    n, c, t = x.shape
    d11, d21, d22, _ = _blocks(dcov, c)
    d = torch.cat([torch.cat([d11 + d11.T, 2 * d21.T], 1), torch.cat([2 * d21, d22 + d22.T], 1)]).div_(m)
    scale = d.new_ones(())
    if x.dtype.itemsize == 2:  # d is small: a power of two scales it to about 1, so that 16 bits hold it
        scale = torch.ldexp(scale, -d.abs().amax().frexp().exponent)
        d = (d * scale).to(x.dtype)
    # from the rounded d, so that its rounding error multiplies centred rows only
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
    """(sum of the panes (N, C_out, T), means (P, C_out), variances (P, C_out)) of P inputs with their means and
    covariances."""
    n, _, t = xs[0].shape
    shift, products, pane_mean, pane_var = 0, [], [], []
    for x, m, s, w, gamma, beta in zip(xs, means, covs, weights, gammas, betas, strict=True):
        w = w.flatten(1).to(s.dtype)
        mean, var = w @ m, (_times_lower(w, s) * w).sum(1).clamp_min_(0)
        scaled = ((gamma * (var + eps).rsqrt())[:, None] * w).to(x.dtype)
        # from the rounded weights, so that their rounding error multiplies centred rows only
        shift = shift + beta.double() - scaled.double() @ m.double()
        products.append((rows(ntc(x)), scaled.T))
        pane_mean.append(mean)
        pane_var.append(var)
    out = torch.addmm(shift.to(xs[0].dtype), *products[0])  # adds all shifts at once: the sum is written once per pane
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
    """From `g`: lists of the P gradients of xs, means, covs, weights and gammas, and the gradient that all betas share.

    synced: means and covariances were taken over several ranks.
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
        # The part that comes from the mean of g over rows cancels later, so it is subtracted here, before rounding.
        # With several ranks that mean differs between ranks, so there it is left to the gradient of the mean.
        given = total @ scaled.to(wide)
        shift = torch.zeros_like(scaled[0]) if synced else (-given / g.shape[0]).to(g.dtype)
        dxs.append(torch.addmm(shift, g, scaled).view(n, t, -1).transpose(1, 2))
        dmeans.append(-given - shift.to(wide) * g.shape[0])
        dcovs.append(_lower_product(w, dvar[:, None] * w))
        dweights.append(dw.to(weight.dtype).view(weight.shape))
        dgammas.append(dgamma)
    return dxs, dmeans, dcovs, dweights, dgammas, total
