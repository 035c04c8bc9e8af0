"""The definition of bn_relu_dropout in plain PyTorch: any device, fp64-capable.

N batch, C channels, T frames, M = N*T rows. Low-precision inputs are computed in fp32. A NaN passes the ReLU and its
gradient, as in PyTorch; a dropped or masked element is selected away, not multiplied by zero, so what it held is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.kernels import philox
from jasper_fast.kernels.layout import ntc


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and M2 (sum of squared deviations) over all N*T rows, padding included.

    y: (N, C, T). Returns two (C,) tensors, fp32 (fp64 for fp64).
    Equivalent to `mean = y.mean((0, 2)); m2 = (y - mean[:, None]).square().sum((0, 2))`.
    """
    var, mean = torch.var_mean(_wide(y), dim=(0, 2), correction=0)
    return mean, var * (y.shape[0] * y.shape[2])


def forward(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    p: float,
) -> Tensor:
    """z (N, C, T) of y's dtype, NTC memory: mask(dropout(relu((y - mean)*rstd*gamma + beta [+ residual])))."""
    pre = _pre(y, mean, rstd, gamma, beta)
    if residual is not None:
        pre = pre + _wide(residual)
    z = torch.relu(pre) * _scale(p)
    alive = _alive(y, lengths, seed, p)
    if alive is not None:
        z = z.where(alive, 0.0)
    return ntc(z.to(y.dtype))


def backward_reduce(
    dz: Tensor,
    y: Tensor,
    z: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor]:
    """(dbeta, dgamma) = (sum g, sum g*yhat) per channel, (C,) each, where g is the gradient at the ReLU's input.

    z: the forward's output where there was a residual, else None (the ReLU's sign is then remade from y).
    """
    open_ = _open(y, z, mean, rstd, gamma, beta, lengths, seed, p)
    g = (_wide(dz) * _scale(p)).where(open_, 0.0)
    yhat = ((_wide(y) - mean[:, None]) * rstd[:, None]).where(open_, 0.0)
    return g.sum((0, 2)), (g * yhat).sum((0, 2))


def backward_apply(
    dz: Tensor,
    y: Tensor,
    z: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean_g: Tensor | None,
    mean_gy: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    p: float,
    has_residual: bool,
    halo: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dy = gamma*rstd*(g - mean_g - yhat*mean_gy), and dres = g where there was a residual; NTC memory, dtype of y.

    mean_g = dbeta/M, mean_gy = dgamma/M, (C,) each; both None with evaluation statistics, where dy = gamma*rstd*g.
    halo: rows of y at t >= length + halo count as zero and need not be read: y is a conv of an input whose padding is
    zero, so that it is exactly zero there itself. None: nothing is known of them.
    """
    if halo is not None and lengths is not None:
        t = torch.arange(y.shape[2], device=y.device)
        y = y.where((t < lengths[:, None] + halo)[:, None], 0.0)
    open_ = _open(y, z, mean, rstd, gamma, beta, lengths, seed, p)
    g = (_wide(dz) * _scale(p)).where(open_, 0.0)
    a = (gamma * rstd)[:, None]
    if mean_g is None:
        dy = a * g
    else:
        yhat = (_wide(y) - mean[:, None]) * rstd[:, None]
        dy = a * (g - mean_g[:, None] - yhat * mean_gy[:, None])
    return ntc(dy.to(y.dtype)), ntc(g.to(y.dtype)) if has_residual else None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale(p: float) -> float:
    philox.threshold(p)  # refuses a p that no face supports
    return 1.0 / (1.0 - p)


def _pre(y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    # y - mean first: a*y + (beta - a*mean) would cancel where |mean| is large beside the deviation
    return (_wide(y) - mean[:, None]) * (gamma * rstd)[:, None] + beta[:, None]


def _alive(y: Tensor, lengths: Tensor | None, seed: Tensor | None, p: float) -> Tensor | None:
    """Elements that are neither padding nor dropped: bool, broadcastable to (N, C, T); None if all are."""
    n, c, t = y.shape
    alive = None
    if lengths is not None:
        alive = (torch.arange(t, device=y.device) < lengths[:, None])[:, None, :]
    if p > 0:
        keep = philox.keep_mask(n, c, t, p, seed, y.device)
        alive = keep if alive is None else keep & alive
    return alive


def _open(
    y: Tensor,
    z: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    p: float,
) -> Tensor:
    """Elements through which gradient flows: bool (N, C, T)."""
    if z is not None:  # exactly 0 where clipped or dropped; padding goes by its length, whatever z holds there
        passed, seed, p = ~(z <= 0), None, 0.0
    else:
        passed = ~(_pre(y, mean, rstd, gamma, beta) <= 0)
    alive = _alive(y, lengths, seed, p)
    return passed if alive is None else passed & alive
