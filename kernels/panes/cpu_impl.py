"""The CPU face of the panes: threaded C++ kernels (csrc/cpu), whose matrix products skip the padding.

Activations are fp32, or bf16 on a CPU that multiplies pairs of bf16 (`takes`). Shapes are those of reference.py. All
tensors except the xs and the weights must be contiguous. Results are bit-identical for any number of threads.
"""

import torch
from torch import Tensor

from jasper_fast.kernels import native
from jasper_fast.kernels.layout import ntc


def takes(*tensors: Tensor) -> bool:
    """Returns whether this face takes activations like `tensors`; it takes no mixture of dtypes."""
    dtypes = {t.dtype for t in tensors}
    return dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and native.cpu().conv1d_has_bf16())


def outputs(xs: list[Tensor], weights: list[Tensor], lengths: Tensor | None, y: Tensor) -> None:
    """Fills `y` with x W^T of each pane."""
    native.cpu().panes_outputs(*_operands(xs, weights), lengths, y)


def forward(y: Tensor, mean: Tensor, scale: Tensor, start: Tensor) -> Tensor:
    """Returns `start` + sum over panes of (y - mean)*scale, (N*T, C_out).

    `start` is (C_out,), or (N*T, C_out); the latter is overwritten with the result.
    """
    out = start.new_empty(y.shape[1:]) if start.dim() == 1 else start
    native.cpu().panes_forward(y, mean, scale, start, out)
    return out


def backward_reduce(g: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    """Returns the sum of g*(y - mean) over rows, (P, C_out)."""
    sums = torch.empty_like(mean)
    native.cpu().panes_reduce(g, y, mean, sums)
    return sums


def gradients(
    g: Tensor,
    mean_g: Tensor,
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    xs: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns lists of dx and of dW, in the shapes of x and the weight. dx is undefined at t >= `lengths`."""
    operands = _operands(xs, weights)
    dxs, dweights = ([torch.empty_like(t) for t in tensors] for tensors in operands)
    native.cpu().panes_gradients(g, mean_g, y, mean, scale, slope, *operands, lengths, dxs, dweights)
    return [dx.transpose(1, 2) for dx in dxs], [dw.to(w.dtype) for dw, w in zip(dweights, weights, strict=True)]


def _operands(xs: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the xs as (N, T, C) and the weights in fp32, all contiguous, as the kernels read them."""
    return [ntc(x).transpose(1, 2) for x in xs], [w.float().contiguous() for w in weights]
