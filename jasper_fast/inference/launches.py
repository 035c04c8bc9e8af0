"""Runs the plan on the Triton or CUDA kernels.

A sub-block is one launch, a separable one is two. The decoder is one launch, which includes the log-softmax if the
vocabulary is small enough.

The first launch reads the caller's features and lengths, and the last one writes the results. The launches between them
use only the engine's buffers, so on a GPU they are captured in one CUDA graph per batch size and bucket of lengths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from jasper_fast.dispatch import backends
from jasper_fast.inference.graphs import Bound, Shapes
from jasper_fast.inference.plan import Buffers, KernelConv, Network, make_plan, weight_of
from jasper_fast.kernels.conv1d.gpu_shared import SOFTMAX_MAX, Chain
from jasper_fast.kernels.operands import FULL, Lengths


@dataclass
class Kernels(Bound):
    """The launches for one (N, T), bound to the buffers: `first`, which still needs the features and lengths, and the
    launches `between` it and the decoder's. `last` is the output of the last block."""

    source: Tensor | None  # (N, T, C_in), if the features are copied to a buffer
    first: Callable[..., None]
    between: list[Callable[[], None]]
    last: Tensor
    lengths: Tensor

    def launch(self) -> None:
        """Runs the launches in `between`."""
        for call in self.between:
            call()


class Launches:
    """Computes (log_probs (N, T', V) fp32, lengths) from features (N, C, T) and lengths (N,) int64, on `face`, "triton"
    or "cuda". Without a decoder it computes (output of the last block (N, T', C), lengths).

    With conv masks T is rounded up, so that T' is a multiple of `bucket`. The added rows lie past all lengths, so the
    kernels skip their products and write zeros. `shapes` captures the launches between the first and the last.
    """

    def __init__(self, model: Network, dtype: torch.dtype, face: str, shapes: Shapes, *, bucket: int):
        device = weight_of(model).device
        impl = backends.face("conv1d", face)
        self._workspace = impl.Workspace(device)
        self.plan = make_plan(model, lambda folded: KernelConv(folded, dtype, face, workspace=self._workspace), dtype)
        self._dtype, self._turns, self.shapes = dtype, shapes.turns, shapes
        self._takes_tf32 = impl.takes_tf32
        self._softmax = self.plan.channels <= SOFTMAX_MAX  # whether the last launch does the log-softmax
        self._span = self.plan.span(bucket)
        # for each step, whether it writes its lengths into a new buffer
        self._changes = [True, *(step.b.resizes for step in self.plan.steps[1:])]
        self.buffers = Buffers(dtype, device)
        self.lengths = Buffers(torch.int64, device)

    def run(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.plan
        n, _, t = features.shape
        bound = self._bound(n, -(-t // self._span) * self._span)
        before = self._scratch()
        if bound.source is None:
            x = self._readable(features).transpose(1, 2)
        else:  # rows past T have values of other calls, so no length may be greater than T
            x, lengths = bound.source, lengths.clamp(0, t)
            x[:, :t].copy_(features.transpose(1, 2))
        bound.first(x, lengths=Lengths(lengths, None, self.lengths.held["lengths0"][:n], plan.masks))
        if bound.between:
            self.shapes.play(bound, self._dependences)
        last = bound.last[:, : plan.out_frames(t)]
        found = (last.clone(), bound.lengths.clone()) if plan.head is None else self._head(last, bound.lengths)
        self._turns.drop(old for old, new in zip(before, self._scratch(), strict=True) if old is not new)
        return found

    def _head(self, last: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities of the last block's output, and a copy of the lengths."""
        n, t, _ = last.shape
        out_lengths = torch.empty((n,), dtype=torch.int64, device=last.device)
        dtype = torch.float32 if self._softmax else self._dtype
        out = torch.empty((n, t, self.plan.channels), dtype=dtype, device=last.device)
        self.plan.head(
            last, out, lengths=Lengths(lengths, None, out_lengths, masked=False), clean=True, log_softmax=self._softmax
        )
        return out if self._softmax else out.float().log_softmax(dim=2), out_lengths

    def _readable(self, features: Tensor) -> Tensor:
        """Returns `features` in a form that the first launch can read: fp32 with unit stride over frames, or the dtype
        of the weights with unit stride over channels."""
        _, c, t = features.shape
        frames, channels = t == 1 or features.stride(2) == 1, c == 1 or features.stride(1) == 1
        if not frames and not channels:
            features, frames = features.contiguous(), True
        return features.to(torch.float32 if frames and not channels else self._dtype)

    def _dependences(self) -> tuple[object, ...]:
        return *self._scratch(), self._dtype == torch.float32 and self._takes_tf32()

    def _scratch(self) -> tuple[Tensor, ...]:
        return self._workspace.part, self._workspace.arrived

    def _bound(self, n: int, t: int) -> Kernels:
        """Returns the launches for a shape, bound to the buffers, which grow if they are too small."""
        return self.shapes.bound(
            (n, t),
            lambda: {
                self.buffers: self.plan.sizes(n, t, source=self.plan.reads_source),
                self.lengths: {f"lengths{i}": n for i in range(sum(self._changes))},
            },
            lambda: self._bind(n, self.plan.frames(t)),
        )

    def _bind(self, n: int, frames: list[int]) -> Kernels:
        plan, buffers = self.plan, self.buffers
        source = buffers.view(plan.source, n, frames[0]) if plan.reads_source else None
        # A launch may prefetch the weights of the next launch, and may begin before the previous launch ends (`Chain`).
        # Launch 0 runs outside the CUDA graph, after work of the caller. Launch 1 is the first of the graph, and the
        # start of a graph waits for all earlier work. So neither of these two launches begins early.
        convs = [*(step.conv for step in plan.steps), plan.head]
        packs = [conv.packs if isinstance(conv, KernelConv) else () for conv in convs]
        calls, x, lens = [], source, None
        for i, (step, t) in enumerate(zip(plan.steps, frames[1:], strict=True)):
            out = buffers.view(step.out, n, t)
            panes = buffers.view(step.panes, n, t) if step.panes else None
            masks = Lengths(lens, lens) if plan.masks else FULL
            if self._changes[i]:
                before, lens = lens, self.lengths.held[f"lengths{sum(self._changes[:i])}"][:n]
                masks = Lengths(before, None, lens, plan.masks)
            # `clean`: the padding of all inputs is zero. This is true of tensors that kernels have written, but not of
            # the caller's features, which are read by the first step and by some panes.
            chain = Chain(early=i > 1 and bool(packs[i - 1]), ahead=packs[i + 1])
            call = partial(step.conv, out=out, panes=panes, clean=i > 0 and not plan.panes_read_source, chain=chain)
            calls.append(call if i == 0 else partial(call, x, lengths=masks))
            x = out
        return Kernels(source, calls[0], calls[1:], x, lens)
