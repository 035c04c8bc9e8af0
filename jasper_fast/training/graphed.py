"""The training step in CUDA graphs, one for each shape of a step: the host launches one graph in place of thousands of
kernels.

A graph holds all of `train_step`: features, augmentation, forward, loss, backward, unscaling, the optimiser and the
average. Its inputs (audio, transcripts, lengths, the settings of the optimiser) lie where they lay at the capture and
are filled before each replay. Random numbers are drawn on the device, so each replay has new ones.
"""

from __future__ import annotations

import contextlib
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jasper_fast.data.batch import Batch
from jasper_fast.kernels import capture
from jasper_fast.nn.packs import Packs
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.training.ema import EMA
from jasper_fast.training.optim import NovoGrad
from jasper_fast.training.step import BufferGuard, Frontend, StepResult, reads_no_lengths, train_step

Shapes = tuple[tuple[tuple[int, ...], int], ...]  # of each micro-batch: of the audio, and labels of a transcript
LABELS = 32  # transcripts are padded to a multiple of this


class Recorder(Protocol):
    """Captures a step: `CudaRecorder`, or a stand-in without a GPU."""

    def capture(self, step: Callable[[], StepResult], alone: bool) -> tuple[StepResult, Callable[[], None]]:
        """The step's result, and what runs the step again into its memory; nothing runs yet. `alone`: no other capture
        is alive."""


class CudaRecorder:
    """Captures on a side stream, all graphs in one pool of memory, so that they take what the largest needs."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), None

    def capture(self, step: Callable[[], StepResult], alone: bool) -> tuple[StepResult, Callable[[], None]]:
        """See `Recorder`. Raises RuntimeError for a step that cannot be captured."""
        current, graph = torch.cuda.current_stream(self._stream.device), torch.cuda.CUDAGraph()
        gc.collect()  # a cycle that holds an earlier step's graph of gradients would break the capture
        torch.cuda.empty_cache()  # what other steps have left: the pool takes memory of its own
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = capture.record(graph, step, None if alone else self._pool)  # a pool goes with its last graph
        current.wait_stream(self._stream)
        self._pool = graph.pool()
        return result, graph.replay


@dataclass
class Captured:
    """A graph, with all memory that it reads and writes and that somebody else could free."""

    inputs: list[Batch]
    result: StepResult
    replay: Callable[[], None]
    held: dict[Any, Any]  # NovoGrad's
    alive: list[Tensor]


@dataclass
class GraphedStep:
    """Makes training steps as `train_step` does, from the second of a shape on by a CUDA graph.

        step = GraphedStep(model, frontend, optimizer, scaler, guard, device=device, amp_dtype=torch.bfloat16, ema=ema)
        result = step(batches)

    Arguments and results are those of `train_step`. Audio is padded with silence to a multiple of `bucket` frames of
    features; the input of another frontend is not padded. The first step of a shape (utterances, frames and labels of
    each micro-batch) is a plain one over the same padded batch. The `limit` most recently used graphs are kept.
    Learning rates are read from the optimiser's groups. Where plain steps repeat bit by bit, graphed steps equal them,
    except that PyTorch's optimisers then read their rate in fp32. Gradients are not kept.

    Call `forget()` after a `load_state_dict` of the model, optimiser, scaler or average, and whenever one of their
    tensors is replaced. Other changes outside the step (modes, requires_grad, betas of PyTorch's optimisers) have no
    effect on existing graphs without it.

    If a step cannot be captured, all steps are plain ones, and `say` gets the reason once. That is so on a CPU, in
    several processes, with an optimiser that decides on the host (all but NovoGrad and PyTorch's fused Adam and AdamW),
    without the CTC loss in Triton, and after a capture has failed. Graphs need the memory of the largest step, beside
    that of plain steps and validation. `recorder` stands in for CUDA graphs in tests.
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
    recorder: Recorder | None = None
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
        """One step over `batches`, by a graph where there is one."""
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
        """Drops all graphs; shapes are met anew."""
        self._finish()
        self.graphs.clear(), self._met.clear(), self._room.clear(), self._rates.clear()

    def _hindrance(self) -> str | None:
        """Why no step can be captured; None where one can."""
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return "the gradients of several processes are not reduced in a graph"
        if self.recorder is None and self.device.type != "cuda":
            return f"CUDA graphs need a GPU, and the model is on {self.device}"
        if not isinstance(self.optimizer, NovoGrad) and not (fused and "capturable" in self.optimizer.defaults):
            return f"{type(self.optimizer).__name__} decides on the host: take NovoGrad, or AdamW(..., fused=True)"
        if isinstance(self.optimizer, NovoGrad) and self.device.type == "cuda" and not self.optimizer.in_triton():
            return "NovoGrad's step is not Triton's here (it takes dense fp32 parameters), and PyTorch's reads the host"
        if any(isinstance(g["lr"], Tensor) and g["lr"].device != self.device for g in self.optimizer.param_groups):
            return "the learning rate is a tensor on another device: give a number, or move it"
        if not reads_no_lengths(self.device):
            return "PyTorch's CTC loss reads lengths on the host, and Triton's is not to be had here"
        return None

    def _plain_from_now(self, why: str | None) -> None:
        self.possible = why is None
        if why is not None:
            self.forget()
            self.say(f"no CUDA graphs: {why}; steps run kernel by kernel")

    def _step(self, batches: Sequence[Batch], ema: EMA | None) -> StepResult:
        return train_step(
            self.model, self.frontend, batches, self.optimizer, self.scaler, self.guard,
            device=self.device, amp_dtype=self.amp_dtype, clip_norm=self.clip_norm, ema=ema,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- inputs

    def _shape(self, batch: Batch) -> tuple[tuple[int, ...], int]:
        """What audio and transcripts are padded to: to samples that make a multiple of `bucket` frames, where the
        frontend says how many that is."""
        *rest, samples = batch.audio.shape
        features = getattr(self.frontend, "features", None)
        if isinstance(features, LogMelFeatures):
            frames = -(-(1 + -(-samples // features.hop_length)) // self.bucket) * self.bucket
            samples = (frames - 1) * features.hop_length
        return (*rest, samples), max(1, -(-batch.targets.shape[1] // LABELS)) * LABELS

    def _inputs(self, shapes: Shapes) -> list[Batch]:
        """Memory for the micro-batches, the same for all shapes as long as it is large enough."""
        found = []
        for i, (audio, labels) in enumerate(shapes):
            n = audio[0]
            how = {"audio": audio, "audio_lengths": (n,), "targets": (n, labels), "target_lengths": (n,)}
            made = {name: self._view(i, name, shape) for name, shape in how.items()}
            found.append(Batch(**made, texts=[], names=[], indices=[]))
        return found

    def _view(self, i: int, name: str, shape: tuple[int, ...]) -> Tensor:
        count, room = torch.Size(shape).numel(), self._room.get((i, name))
        if room is None or room.numel() < count:  # graphs keep the smaller one
            dtype = torch.float32 if name == "audio" else torch.int64
            room = self._room[i, name] = torch.empty(count, dtype=dtype, device=self.device)
        return room[:count].view(shape)

    # ------------------------------------------------------------------------------------------------------- graphs

    def _capture(self, shapes: Shapes, inputs: list[Batch]) -> Captured:
        """Nothing of what the step changes is changed, but for gradients, which are none afterwards."""
        while len(self.graphs) >= self.limit:
            self._finish()  # a graph must not go while it runs
            self.graphs.popitem(last=False)
        held: dict[Any, Any] = {}
        averages = [ema for ema in (self.ema, getattr(self.optimizer, "ema", None)) if ema is not None]
        updates = [ema.updates for ema in averages]
        mine = self.optimizer.holding(held) if isinstance(self.optimizer, NovoGrad) else self._capturable()
        try:
            with capture.put_off(self.device), mine:
                step = lambda: self._step(inputs, self.ema if self._carried else None)  # noqa: E731
                result, replay = self.recorder.capture(step, alone=not self.graphs)
        except RuntimeError:
            if self.scaler.is_enabled():
                self.scaler._per_optimizer_states.clear()  # the step was broken off
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)  # frees the gradients' memory for the next graph
            for ema, count in zip(averages, updates, strict=True):
                ema.updates = count
        packs = [m.packs for m in self.model.modules() if isinstance(getattr(m, "packs", None), Packs)]
        alive = [tensor for pack in packs for tensor in pack.tensors()]
        self.graphs[shapes] = Captured(inputs, result, replay, held, alive)
        return self.graphs[shapes]

    @contextlib.contextmanager
    def _capturable(self) -> Iterator[None]:
        """Inside, PyTorch's optimiser reads its rates from the device."""
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
        copies = {name: getattr(result, name).clone() for name in ("grad_norm", "log_probs", "lengths")}
        lists = {name: [x.clone() for x in getattr(result, name)] for name in ("losses", "heard")}
        return StepResult(**copies, **lists, names=[], texts=[])

    def _finish(self) -> None:
        if self.graphs and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _fill(batch: Batch, to: Batch) -> None:
    """Copies a micro-batch where a graph reads it; zeros beyond its own samples and labels."""
    for name in ("audio", "targets"):
        source, into = getattr(batch, name), getattr(to, name)
        into[..., : source.shape[-1]].copy_(source, non_blocking=True)
        into[..., source.shape[-1] :].zero_()
    to.audio_lengths.copy_(batch.audio_lengths, non_blocking=True)
    to.target_lengths.copy_(batch.target_lengths, non_blocking=True)


def _named(result: StepResult, batches: Sequence[Batch]) -> StepResult:
    """`result` with the names of `batches`, which the padded ones have not."""
    result.names, result.texts = [name for batch in batches for name in batch.names], batches[-1].texts
    return result
