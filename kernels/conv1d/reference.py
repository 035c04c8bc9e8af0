"""The definition of conv1d in plain PyTorch, with a hand-written backward, for any device and dtype, fp64 included.

N batch, C channels, T frames, K taps. A conv is a sum of K shifted matrix products, and so is the gradient of its
input. The gradient of the weight is K such products, one for each tap.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.kernels.bn_relu_dropout import reference as bn
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.kernels.operands import FULL, Geometry, Lengths, Mask, Norm


def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns y (N, C_out, T'), the conv of `x` (N, C_in, T) with `weight` (C_out, C_in, K), in NTC memory.

    x counts as zero at t >= `lengths` (N,). The weight is cast to the dtype of `x`. `packed` and `clean` are for other
    faces and are not used. Equivalent to `F.conv1d(x.masked_fill(t >= lengths, 0), weight, None, *geometry)`.
    """
    return fused(x.transpose(1, 2), weight.to(x.dtype), geometry, lengths=Lengths(lengths)).transpose(1, 2)


def forward_stats(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y of `forward`, and the mean and M2 (sum of squared deviations) of each channel over all N*T' rows."""
    y = forward(x, weight, geometry, lengths)
    return y, *bn.stats(y)


def dgrad(
    dy: Tensor,
    weight: Tensor,
    t: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of x, (N, C_in, T = `t`) in NTC memory, from `dy` (N, C_out, T'); zero at t >= `lengths`."""
    (stride, padding, dilation), k, t_out = geometry, weight.shape[2], dy.shape[2]
    span = max(t + 2 * padding, (t_out - 1) * stride + (k - 1) * dilation + 1)
    dx = dy.new_zeros((dy.shape[0], span, weight.shape[1]))  # one row for each row of the padded x
    for tap in range(k):
        dx[:, tap_rows(tap, t_out, geometry)] += dy.transpose(1, 2) @ weight[:, :, tap].to(dy.dtype)
    return ntc(mask(dx[:, padding : padding + t].transpose(1, 2), lengths))


def dgrad_bn(
    dy: Tensor,
    weight: Tensor,
    geometry: Geometry,
    y: Tensor,
    z: Tensor,
    norm: Norm,
    mask: Mask,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (g, dbeta, dgamma): `dgrad` at stride 1, followed by the `backward_reduce` of bn_relu_dropout.

    Batch norm (`norm`), ReLU, dropout and mask (`mask`) turned y (N, C, T) into `z`, the input of the conv. g has the
    shape and dtype of y and is the gradient at the input of the ReLU, which was open where z > 0. dbeta = sum g and
    dgamma = sum g*yhat are (C,) each.
    """
    dz = dgrad(dy, weight, y.shape[2], geometry, mask.lengths)
    sums = bn.backward_reduce(dz, y, z, norm, mask)  # z tells where the ReLU was open
    return bn.backward_apply(dz, y, z, norm, None, mask, True)[1], *sums


def wgrad(
    x: Tensor,
    dy: Tensor,
    k: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns the gradient of the weight, (C_out, C_in, K = `k`), from `x` (N, C_in, T) and `dy` (N, C_out, T').

    x counts as zero at t >= `lengths`. The result is in `dtype` (default: that of `x`).
    """
    rows, t_out = padded(x, geometry, lengths), dy.shape[2]
    taps = [rows[:, tap_rows(tap, t_out, geometry)] for tap in range(k)]
    return torch.stack([torch.einsum("not,ntc->oc", dy, tap) for tap in taps], dim=2).to(dtype or x.dtype)


def fused(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    *,
    lengths: Lengths = FULL,
    bias: Tensor | None = None,
    relu: bool = False,
    panes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns mask(relu(conv1d(x) + x2 @ weight2 + bias)), (N, T', C_out), for `x` (N, T, C_in).

    weight: (C_out, C_in, K); panes: x2 (N, T', C2) and weight2 (C_out, C2, 1); bias: (C_out,). Rows of x and x2 at
    t >= `lengths.before` count as zero. Rows of the result at t >= `lengths.after` are zero.
    """
    k = weight.shape[2]
    rows, t_out = padded(x.transpose(1, 2), geometry, lengths.before), geometry.frames(x.shape[1], k)
    y = x.new_zeros((x.shape[0], t_out, weight.shape[0]))
    for tap in range(k):
        y = y + rows[:, tap_rows(tap, t_out, geometry)] @ weight[:, :, tap].T
    if panes is not None:
        x2, weight2 = panes
        y = y + mask(x2.transpose(1, 2), lengths.before).transpose(1, 2) @ weight2[:, :, 0].T
    if bias is not None:
        y = y + bias
    return mask((y.relu() if relu else y).transpose(1, 2), lengths.after).transpose(1, 2)


def tap_rows(tap: int, t_out: int, geometry: Geometry) -> slice:
    """Returns the rows of a padded input that are multiplied with `tap`, for `t_out` frames of output."""
    begin = tap * geometry.dilation
    return slice(begin, begin + max(0, (t_out - 1) * geometry.stride + 1), geometry.stride)


def padded(x: Tensor, geometry: Geometry, lengths: Tensor | None) -> Tensor:
    """Returns `x` (N, C, T) as (N, T + 2*padding, C), with zeros in the added rows and at t >= length."""
    return F.pad(mask(x, lengths).transpose(1, 2), (0, 0, geometry.padding, geometry.padding))
