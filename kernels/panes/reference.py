"""The definition of the panes in plain PyTorch, for any device and floating dtype. Products include the padding.

For P panes: xs[k] is (N, C_k, T) and weights[k] (C_out, C_k, 1); the outputs y are (P, N*T, C_out) in the dtype of the
xs; mean, scale = gamma*rstd and slope = rstd^2 * mean(g*(y - mean)) are (P, C_out), fp32 or wider; g is the gradient of
the sum, (N*T, C_out), and mean_g (C_out,) its mean over rows. The xs are zero at t >= lengths, (N,) int64 or None.
"""

import torch
from torch import Tensor

from jasper_fast.kernels.layout import matmul, ntc, product, rows


def outputs(xs: list[Tensor], weights: list[Tensor], lengths: Tensor | None, y: Tensor) -> None:
    """Fills `y` with x W^T of each pane."""
    for x, weight, out in zip(xs, weights, y, strict=True):
        matmul(rows(ntc(x)), weight.flatten(1).to(x.dtype).T, out=out)


def forward(y: Tensor, mean: Tensor, scale: Tensor, start: Tensor) -> Tensor:
    """Returns `start` + sum over panes of (y - mean)*scale, (N*T, C_out).

    `start` is (C_out,), or (N*T, C_out), which a face may overwrite.
    """
    out = start
    for of, m, s in zip(y, mean, scale, strict=True):
        out = torch.addcmul(out, of - m, s)
    return out


def backward_reduce(g: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    """Returns the sum of g*(y - mean) over rows, (P, C_out)."""
    return torch.stack([(g * (of - m)).sum(0) for of, m in zip(y, mean, strict=True)])


def gradients(
    g: Tensor,
    mean_g: Tensor,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    xs: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns lists of dx = dy W and of dW = dy^T x of each pane, where dy = scale*(g - mean_g - slope*(y - mean)).

    dx has the shape of x, and dW the shape and dtype of the weight. dx is undefined at t >= `lengths`.
    """
    centred, dxs, dweights = g - mean_g, [], []
    for x, weight, of, m, a, s in zip(xs, weights, y, mean, scale, slope, strict=True):
        # dy is rounded to 16 bits only after scaling: rounding earlier could lose the small terms subtracted from g
        dy = torch.mul(torch.addcmul(centred, of - m, s, value=-1), a, out=torch.empty_like(g))
        dxs.append(matmul(dy, weight.flatten(1).to(dy.dtype)).view(*x.transpose(1, 2).shape).transpose(1, 2))
        dweights.append(product(dy.T, rows(ntc(x))).view(weight.shape).to(weight.dtype))
    return dxs, dweights
