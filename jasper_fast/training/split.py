"""A split of the data: the utterances and batches for training, or those for validation."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from jasper_fast.data.batch import Batch
from jasper_fast.data.batches import BatchSampler, load_batches
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.data.feed import Wait, feed
from jasper_fast.nn.config import JasperConfig
from jasper_fast.speech import augment
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.speech.text import Vocabulary
from jasper_fast.training.runs import RunError
from jasper_fast.training.state import TrainingState
from jasper_fast.training.step import Frontend


@dataclass
class Split:
    """Utterances, their batches, and the front end that makes their features."""

    name: str
    dataset: SpeechDataset
    sampler: BatchSampler
    frontend: Frontend
    workers: int = 0
    told: int = 0  # number of skipped utterances at the last call of `newly_skipped`
    wait: Wait = field(default_factory=Wait)  # the time that `micro_batches` spent waiting for batches
    changed: bool = False  # whether a resumed run makes different batches than the stopped run

    @classmethod
    def load(
        cls,
        name: str,
        manifests: Sequence[str],
        config: JasperConfig,
        *,
        data_dir: str | None = None,
        training: bool = True,
        seed: int = 0,
        workers: int = 0,
        **sampling: Any,
    ) -> Split:
        """Reads `manifests` with the settings in `config`: `input_train`, or for validation `input_val` (unless empty).

        `sampling`: arguments of BatchSampler. Raises RunError, which names the setting or file that cannot be used.
        """
        settings = config.input_train if training else config.input_val or config.input_train
        try:
            features = LogMelFeatures.from_config(settings.get("filterbank_features", {}))
            if features.n_mels != (wanted := config.encoder.in_feats):
                kind = "input_train" if training else "input_val"
                raise ValueError(f"{kind} makes {features.n_mels} features, but the encoder takes {wanted}")
            dataset = SpeechDataset.from_manifests(
                manifests, Vocabulary(config.labels), settings.get("audio_dataset"), data_dir,
                training=training, seed=seed, frame_samples=features.hop_length * config.encoder.stride,
            )  # fmt: skip
            sampler = BatchSampler(dataset.durations, shuffle=training, seed=seed, shards=dataset.shards, **sampling)
            frontend = Frontend(features, augment.from_config(settings) if training else None)
        except ValueError as error:
            raise RunError(f"{name} data: {error}") from error
        return cls(name, dataset, sampler, frontend, workers)

    def __str__(self) -> str:
        data = self.dataset
        return f"{self.name}: {len(data)} utterances, {sum(data.durations(0)) / 3600:.2f} hours, {data.skipped}"

    def newly_skipped(self) -> list[str]:
        """Returns one line for each utterance skipped since the last call, but at most five lines."""
        items = self.dataset.skipped.items[self.told :]
        self.told += len(items)
        return [f"  skipped: {item.detail}" for item in items[:5]]

    def batches(self) -> Iterator[Batch]:
        """Loads all batches of this rank, each once."""
        return load_batches(self.dataset, self.sampler, workers=self.workers)

    def steps(self, epoch: int, accumulation: int) -> int:
        """Returns the number of steps in an epoch if a step has `accumulation` micro-batches."""
        return math.ceil(self.sampler.steps(epoch) / accumulation)

    def print_of_data(self) -> str:
        """Returns a hash of everything that the items of an epoch depend on: utterances, perturbation and seed."""
        what = [(u.name, u.duration) for u in self.dataset.utterances]
        return hashlib.sha256(repr((what, self.dataset.settings, self.dataset.seed)).encode()).hexdigest()

    def go_on(self, state: TrainingState, saved: dict[str, Any], accumulation: int) -> str:
        """Continues the epoch of a stopped run, whose batches may have had other sizes. `saved` is its checkpoint.

        The rest of the epoch uses exactly the items that the stopped run has not used. If the data have changed, the
        epoch begins anew. Returns one line about what has changed, or "".
        """
        then, now = saved["arguments"], self.sampler
        sizes = (then["batch_size"], then["batch_seconds"], not then["no_bucketing"], len(saved["rng"]))
        same = sizes == (now.batch_size, now.max_seconds, now.bucketing, now.world_size)
        if saved.get("data", self.print_of_data()) != self.print_of_data():
            self.changed, state.position, state.taken = True, 0, []
            return f"the training data, their perturbation or --seed have changed: epoch {state.epoch + 1} begins anew"
        if same and then["grad_accumulation"] == accumulation:
            now.leave_out(state.epoch, state.taken)
            return ""
        self.changed = True
        taken, steps = set(state.taken), state.position * then["grad_accumulation"]
        for rank in range(sizes[-1]):
            how = {"shuffle": True, "rank": rank, "world_size": sizes[-1], "shards": now.shards}
            past = BatchSampler(self.dataset.durations, *sizes[:3], then["seed"], **how)
            past.leave_out(state.epoch, state.taken)
            taken |= {item for batch in past.batches(state.epoch)[:steps] for item in batch}
        state.position, state.taken = 0, sorted(taken)
        now.leave_out(state.epoch, taken)
        left = len(self.dataset) - len(taken)
        if not left:
            state.next_epoch()
        return f"the batches have changed: {left} of {len(self.dataset)} utterances are left in this epoch"

    def micro_batches(
        self, state: TrainingState, accumulation: int, device: torch.device, stopped: Callable[[], bool]
    ) -> Iterator[list[Batch]]:
        """Yields the micro-batches of each step, from the position of `state` on, epoch after epoch.

        On a GPU, audio and targets are already on `device`. The caller must advance `state` after each step. A batch is
        empty if none of its files could be read. When `stopped` returns True, no more batches are read. The loading
        processes are started once and serve all epochs.
        """
        first, pinned = state.position * accumulation, device.type == "cuda"
        read = load_batches(self.dataset, self.sampler, state.epoch, first, self.workers, pinned, endless=True)
        loader = feed(read, device, self.wait)
        while True:
            epoch, steps = state.epoch, self.steps(state.epoch, accumulation)
            if state.position >= steps:
                raise RunError(f"epoch {epoch + 1} has no step after step {state.position}")
            for step in range(state.position, steps):
                left = min(accumulation, self.sampler.steps(epoch) - step * accumulation)
                yield [next(loader) for _ in itertools.takewhile(lambda _: not stopped(), range(left))]
