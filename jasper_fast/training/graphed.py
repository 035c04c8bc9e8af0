"""Training steps by CUDA graphs, one graph for each shape: the host launches a graph instead of thousands of kernels.

A graph contains all of `train_step`: features, augmentation, forward, loss, backward, unscaling and the optimiser's
step. It contains the update of the moving average only if the optimiser's step makes it. The graph's inputs (audio,
transcripts, lengths and the optimiser's settings) have fixed addresses and are filled before each replay. Random
numbers are drawn on the device, so each replay draws new ones.
"""

import contextlib
import functools
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jasper_fast.data.batch import Batch
from jasper_fast.kernels import capture
from jasper_fast.nn.packs import Packs
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.training.optim import EMA, NovoGrad
from jasper_fast.training.step import BufferGuard, Frontend, StepResult, loss_is_capturable, train_step

Shapes = tuple[tuple[tuple[int, ...], int], ...]  # for each micro-batch: the audio's shape, and labels per transcript
LABELS = 32  # transcripts are padded to a multiple of this


class CudaRecorder:
    """Captures CUDA graphs on a side stream. All graphs share one memory pool, as large as the largest graph needs."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), None

    def capture(self, step: Callable[[], StepResult], alone: bool) -> tuple[StepResult, Callable[[], None]]:
        """Captures `step` without running it. Returns its result and a function that replays it.

        Each replay writes into the memory of that result. `alone`: whether no earlier graph exists. Raises RuntimeError
        for a step that cannot be captured.
        """
        current, graph = torch.cuda.current_stream(self._stream.device), torch.cuda.CUDAGraph()
        gc.collect()  # an autograd graph of an earlier step, kept by a reference cycle, would break the capture
        torch.cuda.empty_cache()  # frees the memory cached by plain steps, which the pool cannot use
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # without other graphs the old pool no longer exists: a pool is freed together with its last graph
            result = capture.record(graph, step, None if alone else self._pool)
        current.wait_stream(self._stream)
        self._pool = graph.pool()
        return result, graph.replay


@dataclass
class Captured:
    """A graph, with references that keep all memory alive that its replays use."""

    inputs: list[Batch]
    result: StepResult
    replay: Callable[[], None]
    held: dict[Any, Any]  # NovoGrad's tables, see `NovoGrad.holding`
    alive: list[Tensor]  # packed weights


@dataclass
class GraphedStep:
    """Makes training steps like `train_step`. From the second step of a shape on, it replays a CUDA graph.

        step = GraphedStep(model, frontend, optimizer, scaler, guard, device=device, amp_dtype=torch.bfloat16, ema=ema)
        result = step(batches)

    Arguments and results are those of `train_step`. If the frontend computes `LogMelFeatures`, audio is padded with
    silence to a multiple of `bucket` frames. A shape consists of the numbers of utterances, frames and labels of each
    micro-batch. The first step of a shape is a plain step over the padded batch. The `limit` most recently used graphs
    are kept. Learning rates are read from the optimiser's groups. If plain steps are reproducible bit by bit, graphed
    steps give the same bits, except with PyTorch's optimisers: in a graph they read the learning rate in fp32. After a
    replay the parameters have no gradients.

    A graph keeps the addresses of tensors, and most settings, from its capture. So call `forget()` after a tensor of
    the model, optimiser, scaler or average was replaced (as by `load_state_dict` of an optimiser), and after a change
    of modes, of requires_grad, of the scaler's factors, or of settings of PyTorch's optimisers other than the learning
    rate.

    If steps cannot be captured, they are all plain steps, and `say` is called once with the reason. This is the case on
    a CPU, in several processes, with an optimiser that skips bad steps on the host (all except NovoGrad and
    PyTorch's fused Adam and AdamW), with parameters that NovoGrad's kernels do not take, with a learning rate that is a
    tensor on another device, without the CTC loss in Triton, and after a capture has failed. Graphs need as much
    memory as the largest step, in addition to the memory of plain steps and validation. `recorder` is for tests: an
    object with the method `capture`, used instead of CUDA graphs.
    """

    model: nn.Module
    frontend: Frontend
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: BufferGuard
    device: torch.device
    amp_dtype: torch.dtype | None = None
    clip_norm: float = 0.0
    ema: EMA | None = None
    bucket: int = 64
    limit: int = 32
    say: Callable[[str], None] = print
    recorder: CudaRecorder | None = None
    graphs: OrderedDict[Shapes, Captured] = field(default_factory=OrderedDict, init=False)

    def __post_init__(self) -> None:
        if self.bucket < 1 or self.limit < 1:
            raise ValueError(f"bucket and limit must be at least 1, not {self.bucket} and {self.limit}")
        self._met: set[Shapes] = set()
        self._room: dict[tuple[int, str], Tensor] = {}
        self._rates: list[Tensor] = []
        self._carried = self.ema is not None and getattr(self.optimizer, "ema", None) is self.ema
        why = self._hindrance()
        if why is None and self.recorder is None:
            self.recorder = CudaRecorder(self.device)
        self._plain_from_now(why)

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        """Makes one step over `batches`: a plain one if their shape is new, else a graph's."""
        if not self.possible:
            return self._step(batches, self.ema)
        shapes = tuple(self._shape(batch) for batch in batches)
        graph = self.graphs.get(shapes)
        inputs = self._inputs(shapes) if graph is None else graph.inputs
        for batch, to in zip(batches, inputs, strict=True):
            _fill(batch, to)
        if shapes not in self._met:
            self._met.add(shapes)
            return _named(self._step(inputs, self.ema), batches)
        if graph is None:
            try:
                graph = self._capture(shapes, inputs)
            except RuntimeError as error:
                self._plain_from_now(f"the step could not be captured ({str(error).splitlines()[0]})")
                return _named(self._step(inputs, self.ema), batches)
        self.graphs.move_to_end(shapes)
        return _named(self._replay(graph), batches)

    def forget(self) -> None:
        """Drops all graphs. The next step of each shape is a plain step again."""
        self._finish()
        self.graphs.clear(), self._met.clear(), self._room.clear(), self._rates.clear()

    def _hindrance(self) -> str | None:
        """Returns why no step can be captured, or None if steps can be captured."""
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return "graphs do not support the gradients of several processes"
        if self.recorder is None and self.device.type != "cuda":
            return f"CUDA graphs need a GPU, but the model is on {self.device}"
        if not isinstance(self.optimizer, NovoGrad) and not (fused and "capturable" in self.optimizer.defaults):
            return f"{type(self.optimizer).__name__} skips steps on the host: use NovoGrad, or AdamW(..., fused=True)"
        if isinstance(self.optimizer, NovoGrad) and self.device.type == "cuda" and not self.optimizer.in_kernels():
            return "NovoGrad's kernels cannot run (they need dense fp32 parameters); no other face can be captured"
        if any(isinstance(g["lr"], Tensor) and g["lr"].device != self.device for g in self.optimizer.param_groups):
            return f"the learning rate is a tensor on another device: use a number, or move it to {self.device}"
        if not loss_is_capturable(self.device):
            return "PyTorch's CTC loss reads lengths on the host, and Triton's is not available"
        return None

    def _plain_from_now(self, why: str | None) -> None:
        self.possible = why is None
        if why is not None:
            self.forget()
            self.say(f"no CUDA graphs: {why}; each kernel is launched by itself")

    def _step(self, batches: Sequence[Batch], ema: EMA | None) -> StepResult:
        return train_step(
            self.model, self.frontend, batches, self.optimizer, self.scaler, self.guard,
            device=self.device, amp_dtype=self.amp_dtype, clip_norm=self.clip_norm, ema=ema,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- inputs

    def _shape(self, batch: Batch) -> tuple[tuple[int, ...], int]:
        """Returns the shape that the audio is padded to and the number of labels that transcripts are padded to.

        Audio is padded to a multiple of `bucket` frames if the frontend computes `LogMelFeatures`.
        """
        *rest, samples = batch.audio.shape
        features = getattr(self.frontend, "features", None)
        if isinstance(features, LogMelFeatures):
            frames = -(-(1 + -(-samples // features.hop_length)) // self.bucket) * self.bucket
            samples = (frames - 1) * features.hop_length
        return (*rest, samples), max(1, -(-batch.targets.shape[1] // LABELS)) * LABELS

    def _inputs(self, shapes: Shapes) -> list[Batch]:
        """Returns the memory that micro-batches are copied to. It is shared by all shapes that fit into it."""
        return [
            Batch(
                audio=self._view(i, "audio", audio), audio_lengths=self._view(i, "audio_lengths", audio[:1]),
                targets=self._view(i, "targets", (audio[0], labels)),
                target_lengths=self._view(i, "target_lengths", audio[:1]), texts=[], names=[], indices=[],
            )
            for i, (audio, labels) in enumerate(shapes)
        ]  # fmt: skip

    def _view(self, i: int, name: str, shape: tuple[int, ...]) -> Tensor:
        count, room = torch.Size(shape).numel(), self._room.get((i, name))
        if room is None or room.numel() < count:  # existing graphs keep the smaller memory alive
            dtype = torch.float32 if name == "audio" else torch.int64
            room = self._room[i, name] = torch.empty(count, dtype=dtype, device=self.device)
        return room[:count].view(shape)

    # ------------------------------------------------------------------------------------------------------- graphs

    def _capture(self, shapes: Shapes, inputs: list[Batch]) -> Captured:
        """Captures a step on `inputs` and keeps the graph. The capture changes only the gradients: they become None."""
        while len(self.graphs) >= self.limit:
            self._finish()  # a graph must not be freed while it runs
            self.graphs.popitem(last=False)
        held: dict[Any, Any] = {}
        averages = [ema for ema in (self.ema, getattr(self.optimizer, "ema", None)) if ema is not None]
        updates = [ema.updates for ema in averages]
        mine = self.optimizer.holding(held) if isinstance(self.optimizer, NovoGrad) else self._capturable()
        try:
            with capture.put_off(self.device), mine:
                step = functools.partial(self._step, inputs, self.ema if self._carried else None)
                result, replay = self.recorder.capture(step, alone=not self.graphs)
        except RuntimeError:
            if self.scaler.is_enabled():
                self.scaler._per_optimizer_states.clear()  # forgets that gradients were unscaled
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)  # frees the gradients' memory for the next graph
            for ema, count in zip(averages, updates, strict=True):
                ema.updates = count
        packs = (getattr(module, "packs", None) for module in self.model.modules())
        alive = [tensor for pack in packs if isinstance(pack, Packs) for tensor in pack.tensors()]
        self.graphs[shapes] = Captured(inputs, result, replay, held, alive)
        return self.graphs[shapes]

    @contextlib.contextmanager
    def _capturable(self) -> Iterator[None]:
        """A context in which PyTorch's optimiser reads its learning rates from the device."""
        groups = self.optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        if not self._rates:
            self._rates += [torch.zeros((), device=self.device) for _ in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group.update(lr=rate, capturable=True)
            yield
        finally:
            for group, (lr, capturable) in zip(groups, before, strict=True):
                group.update(lr=lr, capturable=capturable)

    def _replay(self, graph: Captured) -> StepResult:
        if isinstance(self.optimizer, NovoGrad):
            self.optimizer.renew(graph.held)
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=False):
            rate.fill_(group["lr"])
        graph.replay()
        if self.ema is not None and not self._carried:
            self.ema.update(getattr(self.model, "module", self.model))
        result = graph.result  # the next replay of any graph may overwrite it
        return StepResult(
            losses=[x.clone() for x in result.losses], heard=[x.clone() for x in result.heard], names=[],
            grad_norm=result.grad_norm.clone(), log_probs=result.log_probs.clone(), lengths=result.lengths.clone(),
            texts=[],
        )  # fmt: skip

    def _finish(self) -> None:
        if self.graphs and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _fill(batch: Batch, to: Batch) -> None:
    """Copies a micro-batch to the memory that a graph reads, and fills the rest of this memory with zeros."""
    for name in ("audio", "audio_lengths", "targets", "target_lengths"):
        source, into = getattr(batch, name), getattr(to, name)
        into[..., : source.shape[-1]].copy_(source, non_blocking=True)
        into[..., source.shape[-1] :].zero_()


def _named(result: StepResult, batches: Sequence[Batch]) -> StepResult:
    """Returns `result` with the names and texts of `batches`, which padded batches do not have."""
    result.names, result.texts = [name for batch in batches for name in batch.names], batches[-1].texts
    return result
