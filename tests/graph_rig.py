"""For tests of the graphed step: a small model with everything else that a training step needs, from one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from graph_recorder import TapeRecorder, tensors
from speech import CONFIG
from torch import Tensor

from jasper_fast import Jasper, JasperConfig, NovoGrad
from jasper_fast.data.batch import Batch
from jasper_fast.speech import augment
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.training import step
from jasper_fast.training.graphed import GraphedStep
from jasper_fast.training.optim import EMA
from jasper_fast.training.step import BufferGuard, Frontend, train_step

BLOCK = {"kernel_size": [5], "stride": [1], "dilation": [1], "dropout": 0.2, "residual": False, "repeat": 1}
BLOCKS = [
    BLOCK | {"filters": 16, "stride": [2]},
    BLOCK | {"filters": 16, "repeat": 2, "residual": True, "residual_dense": True},
]
SMALL = CONFIG | {"jasper": {"encoder": {"in_feats": 32, "blocks": BLOCKS}, "decoder": {"in_feats": 16}}}


def batch(n: int, seconds: float, labels: int, seed: int) -> Batch:
    """Returns a batch of noise with random transcripts. Its utterances differ in length."""
    draw = torch.Generator().manual_seed(seed)
    samples = int(16000 * seconds)
    lengths = torch.tensor([samples - i * samples // 4 for i in range(n)])
    audio = 0.1 * torch.randn(n, samples, generator=draw) * (torch.arange(samples) < lengths[:, None])
    counts = torch.tensor([max(0, labels - 2 * i) for i in range(n)])
    targets = torch.randint(0, 4, (n, labels), generator=draw) * (torch.arange(labels) < counts[:, None])
    names = [f"{seed} {i}" for i in range(n)]
    return Batch(audio, lengths, targets, counts, names, names, list(range(n)))


def padded(one: Batch, shape: tuple[tuple[int, ...], int]) -> Batch:
    """Returns the batch padded with zeros to `shape`, a result of `GraphedStep._shape`."""
    (_, samples), labels = shape
    audio, targets = (F.pad(x, (0, n - x.shape[1])) for x, n in ((one.audio, samples), (one.targets, labels)))
    return dataclasses.replace(one, audio=audio, targets=targets)


def moved(module: torch.nn.Module, device: str) -> None:
    """Replaces a module's parameters and buffers by uninitialised ones, unless `device` is the CPU."""
    for m in module.modules() if device != "cpu" else ():
        for name, p in m._parameters.items():
            m._parameters[name] = None if p is None else torch.nn.Parameter(torch.empty(p.shape, device=device))
        for name, buffer in m._buffers.items():
            m._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


class Rig:
    """A model, frontend, optimiser, average, scaler and guard from one seed."""

    def __init__(self, optimizer: str = "novograd", warmup: bool = True, device: str = "cpu", **how) -> None:
        torch.manual_seed(0)
        self.model = Jasper(
            JasperConfig.from_dict(SMALL), how.pop("backend", "reference"), how.pop("panes", "gram")
        ).train()
        moved(self.model, device)
        features = LogMelFeatures.from_config(CONFIG["input_train"]["filterbank_features"])
        warp = {"speaker_warp": {"max_warp": 1.1, "equalize": 0.1}, "cutout_augment": {"masks": 1}}
        self.frontend = Frontend(features, augment.from_config(CONFIG["input_train"] | warp)).train()
        moved(self.frontend, device)
        self.ema = EMA(self.model, 0.9, warmup=warmup)
        if optimizer == "novograd":
            self.optimizer = NovoGrad(
                self.model.parameters(), lr=0.01, weight_decay=1e-3, ema=self.ema, backend="triton"
            )
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        self.scaler = torch.amp.GradScaler(
            device.split(":")[0], enabled=how.pop("scale", False), init_scale=2.0**10, growth_interval=3
        )
        self.guard, self.how = BufferGuard(self.model), {"device": torch.device(device), "ema": self.ema} | how

    def plain(self, batches: list[Batch]) -> step.StepResult:
        return train_step(self.model, self.frontend, batches, self.optimizer, self.scaler, self.guard, **self.how)

    def equal(self, other: Rig) -> bool:
        """Returns whether both rigs have equal states. A NaN counts as equal to a NaN."""
        return same(list(self.state()), list(other.state()))

    def graphed(self, monkeypatch, **more) -> tuple[GraphedStep, TapeRecorder]:
        recorder = TapeRecorder(monkeypatch, lambda: self.state(), lambda: self.held(made))
        made = GraphedStep(
            self.model, self.frontend, self.optimizer, self.scaler, self.guard, **self.how, recorder=recorder, **more
        )
        return made, recorder

    def state(self) -> Iterator[Tensor]:
        yield from self.model.state_dict().values()
        yield from self.ema.average.values()
        yield from tensors(list(self.optimizer.state.values()))
        if self.scaler.is_enabled() and self.scaler._scale is not None:
            yield from (self.scaler._scale, self.scaler._growth_tracker)

    def held(self, made: GraphedStep) -> list[Tensor]:
        """Returns all tensors that must stay in memory: those of the state, the learning rates, the
        frontend and the graphs."""
        found = [*self.state(), *made._rates]
        found += self.frontend.buffers() if isinstance(self.frontend, torch.nn.Module) else []
        for graph in made.graphs.values():
            found += [*tensors([vars(one) for one in graph.inputs]), *tensors(list(graph.held.values())), *graph.alive]
        return found
