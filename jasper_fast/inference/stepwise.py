"""The plan step by step through ATen (any device and dtype) or the CPU kernels (fp32 with fast FIR, or bf16)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.inference.plan import Buffers, Folded, KernelConv, make_plan
from jasper_fast.kernels.layout import mask
from jasper_fast.kernels.operands import FULL, Lengths
from jasper_fast.nn.model import Jasper


class Stepwise:
    """Features (N, C, T) and lengths (N,) to (log_probs (N, T', V) fp32, lengths), on the "aten" or the "cpu" face."""

    def __init__(self, model: Jasper, dtype: torch.dtype, face: str):
        conv = partial(KernelConv, face=face) if face == "cpu" else AtenConv
        self._plan = make_plan(model, lambda folded: conv(folded, dtype))
        held = torch.float32 if face == "cpu" else dtype
        self.buffers = Buffers(held, model.decoder.layers[0].weight.device)

    def run(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        plan, buffers = self._plan, self.buffers
        if features.numel() == 0:
            return plan.nothing(features, lengths)
        n, _, t = features.shape
        if lengths.is_cuda:  # on a CPU they were checked before
            lengths = lengths.clamp(0, t)
        buffers.reserve(plan.sizes(n, t))
        x, lens = buffers.view(plan.source, n, t), lengths
        x.copy_((mask(features, lens) if plan.masks else features).transpose(1, 2))
        for step in plan.steps:
            lens_in = lens
            if step.resizes:
                t, lens = step.b.out_length(t), step.b.out_length(lens)
            out = buffers.view(step.out, n, t)
            panes = buffers.view(step.panes, n, t) if step.panes else None
            step.conv(x, out, panes, Lengths(lens_in, lens) if plan.masks else FULL)
            x = out
        logits = x.new_empty((n, t, plan.n_classes))
        plan.head(x, logits)
        return logits.float().log_softmax(dim=2), lens.clone() if lens is lengths else lens


class AtenConv:
    """A FoldedConv through ATen, on any device and in any dtype."""

    def __init__(self, folded: Folded, dtype: torch.dtype):
        self.weight = folded.weight.to(dtype).unsqueeze(2).clone(memory_format=torch.channels_last)
        self.bias = folded.bias.to(dtype, copy=True)
        self.panes = None if folded.panes is None else folded.panes.to(dtype)
        self.b, self.relu = folded.b, folded.relu

    def __call__(self, x: Tensor, out: Tensor, panes: Tensor | None = None, lengths: Lengths = FULL) -> None:
        b = self.b
        x = x.transpose(1, 2).unsqueeze(2)
        y = F.conv2d(x, self.weight, self.bias, (1, b.s), (0, b.padding), (1, b.d)).squeeze(2).transpose(1, 2)
        if panes is not None:
            y = y + F.linear(panes, self.panes)
        if self.relu:
            y = y.relu_()
        out.copy_(mask(y.transpose(1, 2), lengths.after).transpose(1, 2))
