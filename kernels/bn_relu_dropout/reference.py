"""The definition of bn_relu_dropout in plain PyTorch, for any device, fp64 included.

N batch, C channels, T frames, M = N*T rows. 16-bit inputs are converted to fp32 first. As in PyTorch, the
ReLU lets a NaN pass, and in backward the gradient of that element. Dropped elements and padding become 0 even if they
are NaN.
"""

import torch
from torch import Tensor

from jasper_fast.kernels import philox
from jasper_fast.kernels.layout import ntc, padding, wide_dtype
from jasper_fast.kernels.operands import Mask, Norm


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and M2 (sum of squared deviations) of each channel over all N*T rows, padding included.

    y: (N, C, T). Returns two (C,) tensors, fp32 (fp64 for fp64).
    Equivalent to `mean = y.mean((0, 2)); m2 = (y - mean[:, None]).square().sum((0, 2))`.
    """
    var, mean = torch.var_mean(y.to(wide_dtype(y)), dim=(0, 2), correction=0)
    return mean, var * (y.shape[0] * y.shape[2])


def forward(y: Tensor, norm: Norm, residual: Tensor | None, mask: Mask) -> Tensor:
    """Returns z = mask(dropout(relu((y - mean)*rstd*gamma + beta [+ residual]))), (N, C, T), in NTC memory."""
    pre = _pre(y, norm)
    if residual is not None:
        pre = pre + residual.to(wide_dtype(residual))
    z = torch.relu(pre) * _scale(mask.p)
    return ntc(z.where(_alive(y, mask), 0.0).to(y.dtype))


def backward_reduce(dz: Tensor, y: Tensor, z: Tensor | None, norm: Norm, mask: Mask) -> tuple[Tensor, Tensor]:
    """Returns dbeta = sum g and dgamma = sum g*yhat, (C,) each, where g is the gradient at the input of the ReLU.

    z: the output of `forward` if there was a residual, else None. Without z, y gives the sign of the ReLU's input.
    """
    open_ = _open(y, z, norm, mask)
    g = (dz.to(wide_dtype(dz)) * _scale(mask.p)).where(open_, 0.0)
    yhat = _yhat(y, norm).where(open_, 0.0)
    return g.sum((0, 2)), (g * yhat).sum((0, 2))


def backward_apply(
    dz: Tensor,
    y: Tensor,
    z: Tensor | None,
    norm: Norm,
    means: tuple[Tensor, Tensor] | None,
    mask: Mask,
    has_residual: bool,
    halo: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns dy = gamma*rstd*(g - mean_g - yhat*mean_gy), and dres = g with a residual, else None.

    Both have NTC memory and the dtype of y. means: mean_g = dbeta/M and mean_gy = dgamma/M, (C,) each. With evaluation
    statistics `means` is None, and dy = gamma*rstd*g. halo: a promise that y is zero at t >= length + halo, so that a
    face need not read it there. This is true if y is the output of a conv and the padding of the conv's input is zero.
    With halo None, the padding of y may hold anything.
    """
    if halo is not None and mask.lengths is not None:
        y = y.masked_fill(padding(mask.lengths + halo, y.shape[2]), 0.0)
    g = (dz.to(wide_dtype(dz)) * _scale(mask.p)).where(_open(y, z, norm, mask), 0.0)
    dy = g
    if means is not None:
        mean_g, mean_gy = means
        dy = g - mean_g[:, None] - _yhat(y, norm) * mean_gy[:, None]
    dy = (norm.gamma * norm.rstd)[:, None] * dy
    return ntc(dy.to(y.dtype)), ntc(g.to(y.dtype)) if has_residual else None


def _scale(p: float) -> float:
    philox.threshold(p)  # raises ValueError for a p that no face supports
    return 1.0 / (1.0 - p)


def _yhat(y: Tensor, norm: Norm) -> Tensor:
    return (y.to(wide_dtype(y)) - norm.mean[:, None]) * norm.rstd[:, None]


def _pre(y: Tensor, norm: Norm) -> Tensor:
    # subtract the mean first: a*y + (beta - a*mean) would cancel if |mean| is far larger than the standard deviation
    return (y.to(wide_dtype(y)) - norm.mean[:, None]) * (norm.gamma * norm.rstd)[:, None] + norm.beta[:, None]


def _alive(y: Tensor, mask: Mask) -> Tensor:
    """Returns bool, broadcastable to (N, C, T): True for elements that are neither padding nor dropped."""
    alive = y.new_ones((), dtype=torch.bool)
    if mask.lengths is not None:
        alive = ~padding(mask.lengths, y.shape[2])
    if mask.p > 0:
        alive = alive & philox.keep_mask(*y.shape, mask.p, mask.seed, y.device)
    return alive


def _open(y: Tensor, z: Tensor | None, norm: Norm, mask: Mask) -> Tensor:
    """Returns bool (N, C, T): True for elements through which the gradient flows."""
    if z is None:
        return ~(_pre(y, norm) <= 0) & _alive(y, mask)
    return ~(z <= 0) & _alive(y, Mask(mask.lengths))  # z also shows what was dropped: a dropped element is 0
