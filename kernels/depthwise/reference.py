"""The definition of the depthwise conv in plain PyTorch, with a hand-written backward, for any device and dtype.

N batch, C channels, T frames, K taps. The conv and the gradient of x are sums of K shifted products. The gradient of a
tap is one such product of x and dy, summed over N and T.
"""

import torch
from torch import Tensor

from jasper_fast.kernels.conv1d.reference import padded, tap_rows
from jasper_fast.kernels.layout import mask, ntc, wide_dtype
from jasper_fast.kernels.operands import FULL, Geometry, Lengths


def forward(x: Tensor, weight: Tensor, geometry: Geometry, lengths: Lengths = FULL) -> Tensor:
    """Returns y (N, C, T'), the conv of `x` (N, C, T) with `weight` (C, 1, K), in NTC memory.

    Rows of x at t >= `lengths.before` count as zero. Rows of y at t >= `lengths.after` are zero.
    Equivalent to `mask(F.conv1d(mask(x), weight, None, *geometry, groups=C))`.
    """
    rows, t_out = padded(x, geometry, lengths.before).to(wide_dtype(x)), geometry.frames(x.shape[2], weight.shape[2])
    y = rows.new_zeros((x.shape[0], max(t_out, 0), x.shape[1]))
    for tap in range(weight.shape[2]):
        y.addcmul_(rows[:, tap_rows(tap, t_out, geometry)], weight[:, 0, tap].to(y.dtype))
    return ntc(mask(y.to(x.dtype).transpose(1, 2), lengths.after))


def dgrad(dy: Tensor, weight: Tensor, t: int, geometry: Geometry, lengths: Lengths = FULL) -> Tensor:
    """Returns the gradient of x, (N, C, T = `t`) in NTC memory, from `dy` (N, C, T').

    dy counts as zero at t >= `lengths.after`; the result is zero at t >= `lengths.before`.
    """
    (stride, padding, dilation), k, t_out = geometry, weight.shape[2], dy.shape[2]
    rows = mask(dy, lengths.after).transpose(1, 2).to(wide_dtype(dy))
    span = max(t + 2 * padding, (t_out - 1) * stride + (k - 1) * dilation + 1)
    dx = rows.new_zeros((dy.shape[0], span, dy.shape[1]))  # one row for each row of the padded x
    for tap in range(k):
        dx[:, tap_rows(tap, t_out, geometry)] += rows * weight[:, 0, tap].to(rows.dtype)
    return ntc(mask(dx[:, padding : padding + t].to(dy.dtype).transpose(1, 2), lengths.before))


def wgrad(
    x: Tensor, dy: Tensor, k: int, geometry: Geometry, lengths: Lengths = FULL, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns the gradient of the weight, (C, 1, K = `k`), from `x` (N, C, T) and `dy` (N, C, T').

    x counts as zero at t >= `lengths.before`, and dy at t >= `lengths.after`. The result is in `dtype` (default: that
    of `x`).
    """
    rows, t_out = padded(x, geometry, lengths.before).to(wide_dtype(x)), dy.shape[2]
    dy_rows = mask(dy, lengths.after).transpose(1, 2).to(rows.dtype)
    taps = [(rows[:, tap_rows(tap, t_out, geometry)] * dy_rows).sum((0, 1)) for tap in range(k)]
    return torch.stack(taps, dim=1).unsqueeze(1).to(dtype or x.dtype)
