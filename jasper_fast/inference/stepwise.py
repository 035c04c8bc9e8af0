"""Runs the plan on ATen (any device and dtype) or on the CPU kernels (fp32 with fast FIR, or bf16).

A step on ATen is a conv (cuDNN's on a GPU), a matrix product if there are panes, the bias, and one clamp for ReLU and
mask. On a GPU all steps of a call are captured in one CUDA graph per shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.inference.graphs import Bound, Shapes
from jasper_fast.inference.plan import Buffers, Folded, KernelConv, Network, make_plan, weight_of
from jasper_fast.kernels import layout
from jasper_fast.kernels.operands import FULL, Lengths


@dataclass
class Steps(Bound):
    """The steps for one (N, T): `body` runs them, `source` and `lengths` are the buffers that they read, and `results`
    are the log-probabilities and lengths."""

    source: Tensor  # (N, T, C_in)
    lengths: Tensor
    body: Callable[[Steps], tuple[Tensor, Tensor]]
    results: tuple[Tensor, Tensor] | None = None

    def launch(self) -> None:
        """Runs all steps. The replay of a graph writes to the tensors that were the results of its capture."""
        self.results = self.body(self)


class Stepwise:
    """Computes (log_probs (N, T', V) fp32, lengths) from features (N, C, T) and lengths (N,), on the "aten" or "cpu"
    face. Without a decoder it computes (output of the last block (N, T', C), lengths)."""

    def __init__(self, model: Network, dtype: torch.dtype, face: str, shapes: Shapes, *, bucket: int):
        conv = partial(KernelConv, face=face) if face == "cpu" else AtenConv
        held, self._device = torch.float32 if face == "cpu" else dtype, weight_of(model).device
        self.plan = make_plan(model, lambda folded: conv(folded, dtype), held)
        self._face, self._dtype, self.shapes = face, dtype, shapes
        self._span = 1 if shapes.graphs is None else self.plan.span(bucket)
        self.buffers, self.lengths = Buffers(held, self._device), Buffers(torch.int64, self._device)

    def run(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.plan
        n, _, t = features.shape
        bound = self._bound(n, -(-t // self._span) * self._span)
        bound.source[:, :t].copy_(features.transpose(1, 2))  # rows past T are past all lengths
        # On a CPU the engine has already checked or clamped the lengths.
        bound.lengths.copy_(lengths.clamp(0, t) if lengths.is_cuda else lengths)
        self.shapes.play(bound, self._dependences)
        log_probs, out_lengths = bound.results[0][:, : plan.out_frames(t)], bound.results[1]
        if bound.replay is None and plan.head is not None:
            bound.results = None
            return log_probs, out_lengths
        # The next call overwrites the results of a graph, and an encoder's output, which lies in a buffer.
        return log_probs.clone(), out_lengths.clone()

    def _dependences(self) -> tuple[object, ...]:
        precise = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        return tuple(self._dtype == torch.float32 and of == "tf32" for of in precise)

    def _bound(self, n: int, t: int) -> Steps:
        return self.shapes.bound(
            (n, t),
            lambda: {self.buffers: self.plan.sizes(n, t), self.lengths: {"lengths": n}},
            lambda: Steps(self.buffers.view(self.plan.source, n, t), self.lengths.held["lengths"][:n], self._steps),
        )

    def _steps(self, bound: Steps) -> tuple[Tensor, Tensor]:
        """Runs every step on the input in the buffers. Returns the results, which without a decoder lie in a buffer."""
        plan, x, lens = self.plan, bound.source, bound.lengths
        n, t, _ = x.shape
        mask = Padding(lens, t, x.dtype) if plan.masks else None
        if mask is not None:
            x.masked_fill_(mask.beyond, 0.0)
        for step in plan.steps:
            lens_in = lens
            if step.b.resizes:
                t, lens = step.b.out_length(t), step.b.out_length(lens)
                mask = Padding(lens, t, x.dtype) if plan.masks else None
            out = self.buffers.view(step.out, n, t)
            panes = self.buffers.view(step.panes, n, t) if step.panes else None
            how = {"top": mask and mask.top} if self._face == "aten" else {}
            step.conv(x, out, panes, Lengths(lens_in, lens) if plan.masks else FULL, **how)
            x = out
        if plan.head is None:
            return x, lens
        logits = x.new_empty((n, t, plan.channels))
        plan.head(x, logits)
        return logits.log_softmax(2, dtype=torch.float32), lens.clone() if lens is bound.lengths else lens


class Padding:
    """The padding of a batch: `beyond` (N, T, 1) is True beyond the lengths. `top`, an upper bound for the output, is 0
    beyond the lengths and infinity within them."""

    def __init__(self, lengths: Tensor, t: int, dtype: torch.dtype):
        self.beyond = layout.padding(lengths, t).transpose(1, 2)
        self._dtype = dtype

    @cached_property
    def top(self) -> Tensor:
        # made on the device, because a CUDA graph cannot capture the copy of a scalar from the host
        return self.beyond.new_full(self.beyond.shape, math.inf, dtype=self._dtype).masked_fill_(self.beyond, 0.0)


class AtenConv:
    """A FoldedConv that runs on ATen, on any device and in any dtype. It does not read `lengths`: its inputs must be
    zero in the padding, and `top` (see `Padding`) makes its output zero there."""

    def __init__(self, folded: Folded, dtype: torch.dtype):
        self.weight = folded.weight.to(dtype).unsqueeze(2).clone(memory_format=torch.channels_last)
        self.bias = folded.bias.to(dtype, copy=True)
        self.panes = None if folded.panes is None else folded.panes.to(dtype).t()
        self.b, self.relu = folded.b, folded.relu
        self._zero = self.bias.new_zeros(())

    def __call__(
        self, x: Tensor, out: Tensor, panes: Tensor | None = None, lengths: Lengths = FULL, top: Tensor | None = None
    ) -> None:
        b = self.b
        # The bias is added below, because conv2d too would add it in a separate kernel.
        y = F.conv2d(x.transpose(1, 2).unsqueeze(2), self.weight, None, (1, b.s), (0, b.padding), (1, b.d))
        y = y.squeeze(2).transpose(1, 2).contiguous()
        if panes is not None:
            y.flatten(0, 1).addmm_(panes.flatten(0, 1), self.panes)
        if not self.relu:
            torch.add(y, self.bias, out=out)
        elif top is None:
            torch.clamp(y.add_(self.bias), min=0.0, out=out)
        else:
            torch.clamp(y.add_(self.bias), min=self._zero, max=top, out=out)
