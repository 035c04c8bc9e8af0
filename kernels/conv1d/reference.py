"""The definition of conv1d in plain PyTorch: any device and dtype, fp64 included, with a hand-written backward.

N batch, C channels, T frames, K taps. A conv is K shifted matrix products; backward is the same sums the other way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.kernels.bn_relu_dropout import reference as bn
from jasper_fast.kernels.layout import ntc


def forward(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> Tensor:
    """y (N, C_out, T') of `x` (N, C_in, T), zero at t >= `lengths` (N,), and `weight` (C_out, C_in, K); NTC memory.

    The weight is cast to the dtype of `x`; `packed` is for faces that keep packs. Equivalent to
    `F.conv1d(x.masked_fill(t >= lengths, 0), weight, None, stride, padding, dilation)`.
    """
    weight = weight.to(x.dtype)
    out = fused(x.transpose(1, 2), weight, stride=stride, padding=padding, dilation=dilation, in_lengths=lengths)
    return out.transpose(1, 2)


def forward_stats(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y of `forward`, with the mean and M2 (sum of squared deviations) of its channels over all N*T' rows."""
    y = forward(x, weight, stride, padding, dilation, lengths)
    return y, *bn.stats(y)


def dgrad(
    dy: Tensor,
    weight: Tensor,
    t: int,
    stride: int,
    padding: int,
    dilation: int,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """dx (N, C_in, T = `t`) of `dy` (N, C_out, T'), zero at t >= `lengths`; NTC memory."""
    k, t_out = weight.shape[2], dy.shape[2]
    span = max(t + 2 * padding, (t_out - 1) * stride + (k - 1) * dilation + 1)
    dx = dy.new_zeros((dy.shape[0], span, weight.shape[1]))  # rows as in the padded x
    for tap in range(k):
        dx[:, _tap_rows(tap, t_out, stride, dilation)] += dy.transpose(1, 2) @ weight[:, :, tap].to(dy.dtype)
    return ntc(_mask_rows(dx[:, padding : padding + t], lengths).transpose(1, 2))


def dgrad_bn(
    dy: Tensor,
    weight: Tensor,
    padding: int,
    dilation: int,
    y: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Tensor | None,
    p: float,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(g, dbeta, dgamma): `dgrad` at stride 1, then what bn_relu_dropout's backward reduces of it.

    y (N, C, T) is what batch norm, ReLU, dropout of rate `p` and mask turned into the conv's input `z`; g, of its shape
    and dtype, is the gradient at the ReLU's input, open where z > 0; dbeta = sum g and dgamma = sum g*yhat, (C,) each.
    """
    dz = dgrad(dy, weight, y.shape[2], 1, padding, dilation, lengths)
    norm = (y, z, mean, rstd, torch.ones_like(mean), torch.zeros_like(mean))  # z says where the ReLU was open
    dbeta, dgamma = bn.backward_reduce(dz, *norm, lengths, None, p)
    return bn.backward_apply(dz, *norm, None, None, lengths, None, p, True)[1], dbeta, dgamma


def wgrad(
    x: Tensor,
    dy: Tensor,
    k: int,
    stride: int,
    padding: int,
    dilation: int,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
) -> Tensor:
    """dweight (C_out, C_in, K = `k`), in `dtype` (default: that of `x`), of `x` (N, C_in, T), zero at t >= `lengths`,
    and `dy` (N, C_out, T')."""
    padded, t_out = _padded(x.transpose(1, 2), padding, lengths), dy.shape[2]
    taps = [padded[:, _tap_rows(tap, t_out, stride, dilation)] for tap in range(k)]
    return torch.stack([torch.einsum("not,ntc->oc", dy, rows) for rows in taps], dim=2).to(dtype or x.dtype)


def fused(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    in_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out_lengths: Tensor | None = None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Tensor:
    """mask(relu(conv1d(x) + x2 @ weight2 + bias)) of `x` (N, T, C_in) and `x2` (N, T', C2); returns (N, T', C_out).

    weight: (C_out, C_in, K); weight2: (C_out, C2, 1); bias: (C_out,). Rows of x and x2 at t >= `in_lengths` count as
    zero; rows of the result at t >= `out_lengths` are zero.
    """
    k = weight.shape[2]
    padded = _padded(x, padding, in_lengths)
    t_out = (padded.shape[1] - dilation * (k - 1) - 1) // stride + 1
    y = x.new_zeros((x.shape[0], t_out, weight.shape[0]))
    for tap in range(k):
        y = y + padded[:, _tap_rows(tap, t_out, stride, dilation)] @ weight[:, :, tap].T
    if x2 is not None:
        y = y + _mask_rows(x2, in_lengths) @ weight2[:, :, 0].T
    if bias is not None:
        y = y + bias
    return _mask_rows(y.relu() if relu else y, out_lengths)


def _tap_rows(tap: int, t_out: int, stride: int, dilation: int) -> slice:
    begin = tap * dilation
    return slice(begin, begin + (t_out - 1) * stride + 1, stride)


def _padded(x: Tensor, padding: int, lengths: Tensor | None) -> Tensor:
    return F.pad(_mask_rows(x, lengths), (0, 0, padding, padding))


def _mask_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return x
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(beyond[:, :, None], 0)
