"""Conv layers for the tests of the Triton and CUDA kernels, their inputs, and the results of plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.kernels.operands import Geometry

# (N, C_in, C_out, T, K, stride, dilation, lengths)
Layer = tuple[int, int, int, int, int, int, int, list[int] | None]

LAYERS: dict[str, Layer] = {
    "prologue": (2, 64, 32, 45, 11, 2, 1, [45, 20]),
    "k11": (2, 32, 32, 37, 11, 1, 1, [37, 9]),
    "k13": (2, 32, 48, 33, 13, 1, 1, [33, 1]),
    "k17": (1, 48, 64, 40, 17, 1, 1, [26]),
    "k21": (2, 64, 48, 21, 21, 1, 1, [0, 21]),
    "k25": (1, 64, 64, 50, 25, 1, 1, [50]),
    "dilated": (2, 64, 56, 41, 29, 1, 2, [41, 30]),
    "pane": (3, 24, 40, 35, 1, 1, 1, [35, 11, 0]),
    "decoder": (2, 64, 29, 19, 1, 1, 1, None),
    "one frame": (2, 40, 56, 1, 11, 1, 1, [1, 1]),
    "odd channels": (2, 33, 30, 70, 5, 1, 2, [70, 33]),
}


def make(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple:
    """Returns x (N, C_in, T) in NTC memory with zeros in its padding, the weight, the geometry and the lengths."""
    n, c_in, c_out, t, k, stride, dilation, lengths = layer
    x = torch.randn(n, c_in, t)
    if lengths is not None:
        lengths = torch.tensor(lengths)
        x, lengths = mask(x, lengths), lengths.to(device)
    weight = (torch.randn(c_out, c_in, k) / (c_in * k) ** 0.5).to(device, dtype)
    return ntc(x.to(device, dtype)), weight, Geometry(stride, dilation * (k - 1) // 2, dilation), lengths


def pytorch(
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    geometry: Geometry,
    dtype: torch.dtype,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns y, dx and dw of F.conv1d and autograd in `dtype`. x and dx are zero at t >= `before`, y and dy at
    t >= `after`."""
    x = mask(x, before).to(dtype).clone(memory_format=torch.contiguous_format).requires_grad_()
    weight = weight.to(dtype).clone().requires_grad_()
    y = mask(F.conv1d(x, weight, None, *geometry, x.shape[1] // weight.shape[1]), after)
    y.backward(mask(dy, after).to(dtype))
    return {"y": y.detach(), "dx": mask(x.grad, before), "dw": weight.grad}
