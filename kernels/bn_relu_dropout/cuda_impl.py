"""The CUDA face of bn_relu_dropout: C++ kernels (csrc/cuda) for sm_75 and later, on the current stream of y's device.

Activations are (N, C, T) in NTC memory, fp32, fp16 or bf16, with fp32 arithmetic inside; channel vectors are (C,) fp32.
Reductions merge partial results in a fixed order, so runs on one GPU are bit-identical. For fp64 use the reference
face.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from jasper_fast.kernels import native, nvrtc
from jasper_fast.kernels.bn_relu_dropout import cuda_nvrtc
from jasper_fast.kernels.operands import Mask, Norm


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 (sum of squared deviations) per channel of y (N, C, T) over all N*T rows, fp32."""
    mean, m2 = _channels(y), _channels(y)
    _ops().bn_stats(y, mean, m2)
    return mean, m2


def forward(y: Tensor, norm: Norm, residual: Tensor | None, mask: Mask) -> Tensor:
    """z = mask(dropout(relu((y - mean)*rstd*gamma + beta [+ residual]))). At t >= length z is 0 and y is not read."""
    z = torch.empty_like(y)
    _ops().bn_forward(y, *norm, residual, *mask, z)
    return z


def backward_reduce(dz: Tensor, y: Tensor, z: Tensor | None, norm: Norm, mask: Mask) -> tuple[Tensor, Tensor]:
    """(dbeta, dgamma) = (sum g, sum g*yhat) per channel; g = dz/(1-p) where ReLU, dropout and mask pass it, else 0."""
    dbeta, dgamma = _channels(y), _channels(y)
    _ops().bn_backward_reduce(dz, y, z, *norm, *mask, dbeta, dgamma)
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
    """Returns dy = gamma*rstd*(g - mean_g - yhat*mean_gy), and dres, which is g with a residual, else None.

    means: (mean_g, mean_gy), or None to leave both terms out. halo: not used, because this face reads all rows of y.
    """
    dy = torch.empty_like(y)
    dres = torch.empty_like(y) if has_residual else None
    _ops().bn_backward_apply(dz, y, z, *norm, *(means or (None, None)), *mask, dy, dres)
    return dy, dres


def _channels(y: Tensor) -> Tensor:
    return torch.empty(y.shape[1], dtype=torch.float32, device=y.device)


@functools.cache
def _ops() -> Any:
    """Returns the ops of the CUDA library, or if it cannot be used, the same ops compiled by NVRTC.

    Raises `native.Missing` if neither can be used.
    """
    try:
        return native.cuda()
    except native.Missing as error:
        nvrtc.instead_of(error)
        return cuda_nvrtc.Compiled()
