"""The functions of faces whose kernels are C++. They allocate the results and call an op (`stats` calls `bn_stats`).

The ops are those of the CPU library, of the CUDA library, or of `cuda_nvrtc.Compiled`. Activations are (N, C, T) in NTC
memory, fp32, fp16 or bf16; channel vectors are (C,) fp32. Arithmetic is fp32, but sums over rows are fp64 on the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jasper_fast.kernels.layout import empty_fp32
from jasper_fast.kernels.operands import Mask, Norm


class NativeFace:
    """A face that calls the ops of `ops()`. Loading a library may fail, so `ops` is not called before use."""

    def __init__(self, ops: Callable[[], Any]) -> None:
        self._ops = ops

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and M2 (sum of squared deviations) per channel of y (N, C, T) over all N*T rows, fp32."""
        mean, m2 = empty_fp32(2, y.shape[1], like=y)
        self._ops().bn_stats(y, mean, m2)
        return mean, m2

    def forward(self, y: Tensor, norm: Norm, residual: Tensor | None, mask: Mask) -> Tensor:
        """Returns z = mask(dropout(relu((y - mean)*rstd*gamma + beta [+ residual]))) in the dtype of y."""
        z = torch.empty_like(y)
        self._ops().bn_forward(y, *norm, residual, *mask, z)
        return z

    def backward_reduce(self, dz: Tensor, y: Tensor, z: Tensor | None, norm: Norm, mask: Mask) -> tuple[Tensor, Tensor]:
        """Returns dbeta = sum g and dgamma = sum g*yhat. g is dz/(1-p) where the gradient flows, else 0."""
        dbeta, dgamma = empty_fp32(2, y.shape[1], like=y)
        self._ops().bn_backward_reduce(dz, y, z, *norm, *mask, dbeta, dgamma)
        return dbeta, dgamma

    def backward_apply(
        self,
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

        means: (mean_g, mean_gy), or None to leave both terms out. halo: not used.
        """
        dy = torch.empty_like(y)
        dres = torch.empty_like(y) if has_residual else None
        self._ops().bn_backward_apply(dz, y, z, *norm, *(means or (None, None)), *mask, dy, dres)
        return dy, dres
