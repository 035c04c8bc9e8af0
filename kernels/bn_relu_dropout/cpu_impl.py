"""The CPU face of bn_relu_dropout: threaded C++ kernels (csrc/cpu) that pick their vector instructions at run time.

Activations are (N, C, T) in NTC memory, fp32, fp16 or bf16, with fp32 arithmetic inside; channel vectors are (C,) fp32.
Results are bit-identical for any number of threads. For fp64 use the reference face.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.kernels import native
from jasper_fast.kernels.operands import Mask, Norm


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 (sum of squared deviations) per channel of y (N, C, T) over all N*T rows, fp32."""
    mean, m2 = _channels(y), _channels(y)
    native.cpu().bn_stats(y, mean, m2)
    return mean, m2


def forward(y: Tensor, norm: Norm, residual: Tensor | None, mask: Mask) -> Tensor:
    """z = mask(dropout(relu((y - mean)*rstd*gamma + beta [+ residual]))), of y's dtype; frames t >= length are 0."""
    z = torch.empty_like(y)
    native.cpu().bn_forward(y, *norm, residual, *mask, z)
    return z


def backward_reduce(dz: Tensor, y: Tensor, z: Tensor | None, norm: Norm, mask: Mask) -> tuple[Tensor, Tensor]:
    """(dbeta, dgamma) = (sum g, sum g*yhat) per channel; g is dz where the gradient passes ReLU, dropout and mask."""
    dbeta, dgamma = _channels(y), _channels(y)
    native.cpu().bn_backward_reduce(dz, y, z, *norm, *mask, dbeta, dgamma)
    return dbeta, dgamma


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
    """dy = gamma*rstd*(g - mean_g - yhat*mean_gy), and dres = g with a residual, else None.

    means: None drops mean_g and mean_gy. halo: y is zero at t >= length + halo; this face reads those zeros anyway.
    """
    dy = torch.empty_like(y)
    dres = torch.empty_like(y) if has_residual else None
    native.cpu().bn_backward_apply(dz, y, z, *norm, *(means or (None, None)), *mask, dy, dres)
    return dy, dres


def _channels(y: Tensor) -> Tensor:
    return torch.empty(y.shape[1], dtype=torch.float32, device=y.device)
