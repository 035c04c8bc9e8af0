"""conv1d through ATen: conv2d over a channels-last view of the same memory, which needs no transpose.

N batch, C channels, T frames, K taps. For every device and dtype that has no faster kernel of ours. ATen's own conv1d
makes its input contiguous in NCT order; a (N, C, 1, T) view with C innermost takes cuDNN's and oneDNN's NHWC kernels.
Those want the weight channels-last too: a pack is one, in the dtype of the activations, for forward and dgrad alike.
Without it ATen casts and turns the weight in every call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.kernels.layout import empty_ntc, ntc
from jasper_fast.kernels.operands import Geometry


def packs(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether packing `weight` for `dtype` saves a copy. oneDNN reorders fp32 weights itself."""
    return weight.is_cuda or weight.dtype != dtype


def packed_shape(weight: Tensor) -> tuple[int, int, int]:
    """Shape of what `pack` writes for `weight` (C_out, C_in, K)."""
    c_out, c_in, taps = weight.shape
    return c_out, taps, c_in


def pack(weight: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """`weight` (C_out, C_in, K) in channels-last memory, (C_out, K, C_in), in `dtype` (default: its own); or in `out`.

    Cast and turned by one copy.
    """
    if out is None:
        out = torch.empty(packed_shape(weight), dtype=dtype or weight.dtype, device=weight.device)
    return out.copy_(weight.detach().transpose(1, 2))


def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> Tensor:
    """y (N, C_out, T') of `x` (N, C_in, T) and `weight` (C_out, C_in, K); `x` is zero at t >= `lengths` (N,)."""
    return ntc(F.conv2d(x.unsqueeze(2), _in(x, weight, packed).unsqueeze(2), None, *_in_2d(geometry)).squeeze(2))


def dgrad(
    dy: Tensor,
    weight: Tensor,
    t: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """dx (N, C_in, T) of `dy` (N, C_out, T')."""
    # Only its shape and memory format are used. A tensor expanded from a scalar would make ATen copy dy to NCHW.
    x = empty_ntc(dy.shape[0], weight.shape[1], t, like=dy)
    return _backward(dy, x, _in(dy, weight, packed), geometry, (True, False))[0]


def wgrad(
    x: Tensor,
    dy: Tensor,
    k: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
) -> Tensor:
    """dweight (C_out, C_in, K) in `dtype` (default: that of `x`)."""
    weight = dy.new_empty(()).expand(dy.shape[1], x.shape[1], k)
    return _backward(dy, x, weight, geometry, (False, True))[1].to(dtype or x.dtype)


def _in(x: Tensor, weight: Tensor, packed: Tensor | None) -> Tensor:
    """The weight (C_out, C_in, K) in the dtype of `x`: a view of the pack, if there is one."""
    return weight.to(x.dtype) if packed is None else packed.transpose(1, 2)


def _in_2d(geometry: Geometry) -> list[tuple[int, int]]:
    return [(1, geometry.stride), (0, geometry.padding), (1, geometry.dilation)]


def _backward(dy, x, weight, geometry, which):
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy.unsqueeze(2), x.unsqueeze(2), weight.unsqueeze(2), None,
        *_in_2d(geometry), False, (0, 0), 1, (*which, False),
    )  # fmt: skip
    return (None if dx is None else ntc(dx.squeeze(2))), (None if dw is None else dw.squeeze(2).contiguous())
