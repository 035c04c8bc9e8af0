"""The Gram form of the panes: batch statistics of a 1x1 conv's output from the mean and covariance of its input.

A pane is BN(x W^T) over the M = N*T rows of a block output x. With m = mean(x) and S = cov(x) (C x C, computed once for
each block output and shared by every later block):

    mean_y = W m,   var_y = diag(W S W^T),   a = gamma*(var_y + eps)^-1/2
    out = sum_k x_k (diag(a_k) W_k)^T + (beta_k - a_k mean_y_k)

As soon as a block output exists, `statistics` computes the statistics of all its panes in later blocks together, with
one product of the stacked weights and S. No pane output is stored, forward or backward. x may have a large mean, so its
rows are centred before the product that makes S. In other products a matrix by which x is multiplied is rounded first,
and what is subtracted for the mean is computed from the rounded matrix. Rounding errors are then relative to the
deviations from the mean.

S is symmetric, so only three quarters of it are computed and kept. Cut S into 2 x 2 blocks. L consists of the two
diagonal blocks of S and twice the block below the diagonal, in one flat tensor. For any row w of W,
w S w^T = w L w^T. Also, 2 S = L + L^T.
"""

import torch
from torch import Tensor

from jasper_fast.kernels.layout import ntc, product, rows, wide_dtype


def lower(s: Tensor) -> Tensor:
    """Returns L of a symmetric matrix (C, C), flat."""
    half = s.shape[0] // 2
    below = torch.cat([2 * s[half:, :half], s[half:, half:]], 1)
    return torch.cat([s[:half, :half].flatten(), below.flatten()])


def kept(c):
    """Number of elements of L for `c` channels."""
    return (c // 2) ** 2 + (c - c // 2) * c


def _halves(a):
    """Returns the first C//2 of the C columns of `a`, and the other columns."""
    return a.split((a.shape[1] // 2, a.shape[1] - a.shape[1] // 2), 1)


def _blocks(flat, c):
    """Returns views of blocks L11, L21 and L22 of L, cut at c//2, and of L21 and L22 as one block."""
    half = c // 2
    top, below = flat.split((half**2, kept(c) - half**2))
    below = below.view(c - half, c)
    return top.view(half, half), *_halves(below), below


def _lower_product(a, b):
    """Returns the blocks of a^T b in the order of L, but with no block doubled."""
    left, right = _halves(a)
    return torch.cat([product(left.T, _halves(b)[0]).flatten(), product(right.T, b).flatten()])


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (C,) of the rows of `x` (N, C, T) and L of their covariance, fp32 or wider."""
    x = rows(ntc(x))
    mean = x.mean(0, dtype=wide_dtype(x))
    # centred before the product, because E[x x^T] - m m^T would cancel; `out` avoids a copy of the difference in fp32
    centred = torch.sub(x, mean, out=torch.empty_like(x))
    cov = _row_product(centred).div_(x.shape[0]).to(mean.dtype)
    _blocks(cov, x.shape[1])[1].mul_(2)
    return mean, cov


def _row_product(x):
    """Returns x^T x, in the order of L. On a CPU products of 256 rows are added in fp64: as accurate as batch_norm."""
    if x.is_cuda or x.dtype == torch.float64:
        return _lower_product(x, x)
    total = x.new_zeros(kept(x.shape[1]), dtype=torch.float64)
    for chunk in x.split(256):
        total += _lower_product(chunk, chunk)
    return total


def gram_backward(x: Tensor, mean: Tensor, dmean: Tensor, dcov: Tensor, m: Tensor | int) -> Tensor:
    """Returns the gradient of `x` (N, C, T), given those of the mean and of L, which were taken over `m` rows."""
    n, c, t = x.shape
    d11, d21, d22, _ = _blocks(dcov, c)
    d = torch.cat([torch.cat([d11 + d11.T, 2 * d21.T], 1), torch.cat([2 * d21, d22 + d22.T], 1)]).div_(m)
    scale = d.new_ones(())
    if x.dtype.itemsize == 2:  # d is small: a power of two scales it to about 1, so that 16 bits hold it
        scale = torch.ldexp(scale, -d.abs().amax().frexp().exponent)
        d = (d * scale).to(x.dtype)
    # k is computed from the rounded d, so that the rounding error of d multiplies centred rows only
    k = dmean / m - (mean @ d.to(mean.dtype)) / scale
    out = x.new_empty((n * t, c))
    torch.addcdiv(k, product(rows(ntc(x)), d), scale, out=out)
    return out.view(n, t, c).transpose(1, 2)


def _times_lower(w, flat, alpha=1):
    """Returns w L, where `alpha` multiplies the first diagonal block of L."""
    l11, _, _, below = _blocks(flat, w.shape[1])
    left, right = _halves(w)
    out = right @ below
    _halves(out)[0].addmm_(left, l11, alpha=alpha)
    return out


def _times_twice(w, flat):
    """Returns w (L + L^T) = 2 w S."""
    out = _times_lower(w, flat, alpha=2)
    _halves(out)[1].addmm_(_halves(w)[0], _blocks(flat, w.shape[1])[1].T, beta=2)
    return out


def statistics(mean: Tensor, cov: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns means and variances, (sum of C_out,) each, of the outputs of `weights` (C_out, C, 1) for one input."""
    w = _stacked(weights, cov.dtype)
    return w @ mean, (_times_lower(w, cov) * w).sum(1).clamp_min_(0)


def statistics_backward(dvar: Tensor, cov: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the gradients of L and of the stacked weights (sum of C_out, C), given the gradient of the variances."""
    w, dvar = _stacked(weights, cov.dtype), dvar[:, None]
    return _lower_product(w, dvar * w), _times_twice(w, cov).mul_(dvar)


def _stacked(weights, dtype):
    return torch.cat([w.flatten(1) for w in weights]).to(dtype)


def forward(
    xs: list[Tensor],
    means: list[Tensor],
    pane_vars: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: float,
) -> Tensor:
    """Returns the sum of the panes, (N, C_out, T), of P inputs `xs`, given their means and the panes' variances."""
    n, _, t = xs[0].shape
    a = torch.stack(gammas) * (torch.stack(pane_vars) + eps).rsqrt()
    scaled = _scaled(weights, a, xs[0].dtype)
    # shift is computed from the rounded weights, so that their rounding error multiplies centred rows only
    shift = torch.stack(betas).double().sum(0) - torch.cat(scaled, 1).double() @ torch.cat(means).double()
    out = torch.addmm(shift.to(xs[0].dtype), rows(ntc(xs[0])), scaled[0].T)  # adds the shift of all panes
    for x, weight in zip(xs[1:], scaled[1:], strict=True):
        out.addmm_(rows(ntc(x)), weight.T)
    return out.unflatten(0, (n, t)).transpose(1, 2)


def _scaled(weights, a, dtype):
    """Returns diag(a_k) W_k of each pane in `dtype`, rounded once."""
    rounded = [w.new_empty(w.shape[:2], dtype=dtype) for w in weights]
    return [torch.mul(w.flatten(1), by[:, None], out=out) for w, by, out in zip(weights, a, rounded, strict=True)]


def backward(
    g: Tensor,
    xs: list[Tensor],
    means: list[Tensor],
    pane_vars: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor],
    eps: float,
    synced: bool,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Returns the gradients of xs, means (sum of C_k,), variances (P, C_out), weights, gammas and betas (P, C_out).

    g: the gradient of the sum. The gradient of the weights leaves out the part that comes through the statistics.
    synced: the means are over the rows of several ranks.
    """
    n, _, t = g.shape
    g, inputs = rows(ntc(g)), [rows(ntc(x)) for x in xs]
    wide, sizes = means[0].dtype, [x.shape[1] for x in xs]
    total, gamma = g.sum(0, dtype=wide), torch.stack(gammas)
    rstd = (torch.stack(pane_vars) + eps).rsqrt()
    a = gamma * rstd
    products = torch.cat([product(g.T, x) for x in inputs], 1)
    products.addr_(total, torch.cat(means), alpha=-1)  # g^T (x - m)
    weighted = products * torch.cat([w.flatten(1) for w in weights], 1)
    da = torch.stack([part.sum(1) for part in weighted.split(sizes, 1)])
    dgamma = rstd * da
    dvar = dgamma * a * rstd * -0.5
    dweights = [by[:, None] * part for by, part in zip(a, products.split(sizes, 1), strict=True)]
    scaled = _scaled(weights, a, g.dtype)
    # What the means contribute to dx is added here, before dx is rounded to 16 bits. With several ranks it goes into
    # the gradient of the means instead, because the mean of g differs between ranks.
    given = total @ torch.cat(scaled, 1).to(wide)
    shift = torch.zeros_like(given, dtype=g.dtype) if synced else (given / -g.shape[0]).to(g.dtype)
    parts = zip(shift.split(sizes), scaled, strict=True)
    dxs = [torch.addmm(by, g, weight).unflatten(0, (n, t)).transpose(1, 2) for by, weight in parts]
    dmeans = -given - shift.to(wide) * g.shape[0]
    shaped = [dw.to(w.dtype).view(w.shape) for dw, w in zip(dweights, weights, strict=True)]
    return dxs, dmeans, dvar, shaped, dgamma, total.repeat(len(xs), 1)
