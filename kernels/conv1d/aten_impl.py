"""conv1d through ATen: conv2d over a channels-last view of the same memory, which needs no transpose.

N batch, C channels, T frames, K taps. This face serves every device and dtype for which we have no faster kernel.
ATen's own conv1d would copy its input to NCT order. For a (N, C, 1, T) view with C innermost ATen copies nothing and
runs the NHWC kernels of cuDNN or oneDNN. These also need a channels-last weight. A pack is such a weight, in the dtype
of the activations; forward and dgrad read the same pack. Without a pack, each call casts and transposes the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.kernels.layout import empty_ntc, ntc
from jasper_fast.kernels.operands import Geometry


def packs(weight: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether packing `weight` in `dtype` saves a copy.

    On a CPU packing saves only the cast to `dtype`: oneDNN reorders the weight in every call.
    """
    return weight.is_cuda or weight.dtype != dtype


def packed_shape(weight: Tensor) -> tuple[int, int, int]:
    """Returns the shape of what `pack` writes for `weight` (C_out, C_in, K)."""
    return weight.transpose(1, 2).shape


def pack(weight: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """Returns `weight` (C_out, C_in, K) as (C_out, K, C_in) in `dtype` (default: its own), or writes it into `out`.

    Casting and transposing take a single copy.
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
    """Returns y (N, C_out, T'), the conv of `x` (N, C_in, T) with `weight` (C_out, C_in, K).

    The caller ensures that `x` is zero at t >= `lengths` (N,).
    """
    return ntc(conv2d(x, _in(x, weight, packed), geometry))


def dgrad(
    dy: Tensor,
    weight: Tensor,
    t: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of x, (N, C_in, T = `t`), from `dy` (N, C_out, T'). lengths: not used."""
    # ATen uses the shape of x and its memory format. If x were expanded from a scalar, ATen would copy dy to NCHW.
    x = empty_ntc(dy.shape[0], weight.shape[1], t, like=dy)
    return ntc(conv2d_backward(dy, x, _in(dy, weight, packed), geometry, (True, False))[0].squeeze(2))


def wgrad(
    x: Tensor,
    dy: Tensor,
    k: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns the gradient of the weight, (C_out, C_in, K), in `dtype` (default: that of `x`).

    As in `forward`, the caller ensures that `x` is zero at t >= `lengths`.
    """
    weight = dy.new_empty(()).expand(dy.shape[1], x.shape[1], k)  # only its shape is used
    dw = conv2d_backward(dy, x, weight, geometry, (False, True))[1]
    return dw.squeeze(2).contiguous().to(dtype or x.dtype)


def _in(x: Tensor, weight: Tensor, packed: Tensor | None) -> Tensor:
    """Returns the weight (C_out, C_in, K) in the dtype of `x`: a view of the pack, if there is one."""
    return weight.to(x.dtype) if packed is None else packed.transpose(1, 2)


def conv2d(x: Tensor, weight: Tensor, geometry: Geometry, groups: int = 1) -> Tensor:
    """Returns the conv of `x` (N, C_in, T) with `weight` (C_out, C_in / groups, K), as a conv2d of height 1."""
    return F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), None, *_in_2d(geometry), groups).squeeze(2)


def conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: tuple[bool, bool], groups: int = 1
) -> tuple[Tensor | None, Tensor | None, None]:
    """Returns the gradients of `x` and of `weight`, with a height of 1, or None where `which` (x, weight) is False.

    A third None stands for the gradient of a bias.
    """
    return torch.ops.aten.convolution_backward(
        dy.unsqueeze(2), x.unsqueeze(2), weight.unsqueeze(2), None,
        *_in_2d(geometry), False, (0, 0), groups, (*which, False),
    )  # fmt: skip


def _in_2d(geometry: Geometry) -> list[tuple[int, int]]:
    return [(1, geometry.stride), (0, geometry.padding), (1, geometry.dilation)]
