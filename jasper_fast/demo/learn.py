"""Training for so many steps or so much time: the learning rate follows whichever ends first."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jasper_fast import Jasper, JasperConfig, LogMelFeatures, NovoGrad
from jasper_fast.data import batches, dataset
from jasper_fast.speech import augment
from jasper_fast.speech.text import Vocabulary
from jasper_fast.training.ema import EMA
from jasper_fast.training.step import BufferGuard, Frontend, train_step
from jasper_fast.training.validate import Validation, validate

BATCH_SIZE = 8
LR, MIN_LR, WEIGHT_DECAY = 0.02, 1e-4, 1e-3
WARMUP = 0.03  # share of the training
EMA_DECAY = 0.99


class Threads:
    """Sets the number of CPU threads that trains fastest now: on busy cores one thread beats many that wait in turn.

    Up to `trial` steps are timed with each of the candidates, in their order: one that is clearly slower
    than an earlier one is dropped at its second step. The fastest then stays until the next `reset`.
    """

    def __init__(self, candidates: list[int], trial: int = 6):
        self.candidates, self.trial = candidates, trial
        self.reset()

    def reset(self) -> None:
        """Begins the trials anew."""
        self.medians: list[float] = []
        self.seconds: list[float] = []
        torch.set_num_threads(self.candidates[0])

    def took(self, seconds_per_utterance: float) -> None:
        """Takes the time of a step in, and moves on."""
        if len(self.medians) == len(self.candidates):
            return
        self.seconds.append(seconds_per_utterance)
        hopeless = self.medians and len(self.seconds) >= 2 and min(self.seconds) > 1.5 * min(self.medians)
        if len(self.seconds) < self.trial and not hopeless:
            return
        self.medians.append(statistics.median(self.seconds))
        self.seconds = []
        done = len(self.medians) == len(self.candidates)
        which = self.medians.index(min(self.medians)) if done else len(self.medians)
        torch.set_num_threads(self.candidates[which])


@dataclass
class Learned:
    """What training leaves: the model with averaged weights, its front end, and the curves over seconds."""

    model: Jasper
    frontend: Frontend
    vocabulary: Vocabulary
    last: Validation
    seconds: float
    steps: int = 0
    utterances: int = 0
    loss: list[dict[str, float]] = field(default_factory=list)
    wer: list[dict[str, float]] = field(default_factory=list)


def rate(progress: float) -> float:
    """The learning rate at `progress` (0 to 1) of the training: a short warm-up, then a straight line down."""
    if progress < WARMUP:
        return LR * progress / WARMUP + MIN_LR
    return max(LR * (1 - progress) / (1 - WARMUP), MIN_LR)


def datasets(
    config: JasperConfig, train: Path, test: Path, frame_samples: int, seed: int
) -> tuple[dataset.SpeechDataset, dataset.SpeechDataset, Vocabulary]:
    vocabulary = Vocabulary(config.labels)
    common = {"frame_samples": frame_samples, "seed": seed}
    settings = config.input_train["audio_dataset"]
    return (
        dataset.SpeechDataset.from_manifests(train, vocabulary, settings, **common),
        dataset.SpeechDataset.from_manifests(
            test, vocabulary, config.input_val["audio_dataset"], **common, training=False
        ),
        vocabulary,
    )


def learn(
    config: JasperConfig,
    train: Path,
    test: Path,
    steps: int,
    minutes: float,
    device: torch.device,
    seed: int = 0,
    looks: int = 10,
) -> Learned:
    """Trains a Jasper of `config` on the manifest `train` for `steps`, or for `minutes` where a machine is too slow for
    them, and judges it on `test` about `looks` times.

    The test chooses nothing: the settings are fixed, the last averaged weights are the result. The steps are those of
    `train.py` (`jasper_fast.training.step.train_step`) with NovoGrad.
    """
    torch.manual_seed(seed)
    features = LogMelFeatures.from_config(config.input_train["filterbank_features"])
    frontend = Frontend(features, augment.from_config(config.input_train)).to(device)
    model = Jasper(config).to(device)
    train_set, test_set, vocabulary = datasets(config, train, test, 2 * features.hop_length, seed)
    plan = batches.BatchSampler(train_set.durations, BATCH_SIZE, seed=seed)
    test_plan = batches.BatchSampler(test_set.durations, 2 * BATCH_SIZE, shuffle=False)
    optimizer = NovoGrad(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    ema, guard = EMA(model, EMA_DECAY, warmup=True), BufferGuard(model)
    pending: list[torch.Tensor] = []
    threads = Threads(sorted({1, torch.get_num_threads()}))
    workers = 4 if device.type == "cuda" else 0

    budget, begin = 60 * minutes, time.perf_counter()
    result = Learned(model, frontend, vocabulary, Validation(0.0, 1.0, 1.0, 0), 0.0)
    next_look = 1 / looks

    def judge() -> None:
        with ema.applied_to(model):
            found = validate(model, frontend, batches.load_batches(test_set, test_plan), vocabulary, device=device)
        result.last, seconds = found, time.perf_counter() - begin
        result.wer.append({"seconds": seconds, "step": result.steps, "wer": found.wer, "loss": found.loss})

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=1.0, figures="")
        epoch = 0
        while True:
            for batch in batches.load_batches(train_set, plan, epoch, workers=workers):
                done = max((time.perf_counter() - begin) / budget, result.steps / steps)
                if done >= 1:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = rate(done)
                before = time.perf_counter()
                step = train_step(model, frontend, [batch], optimizer, scaler, guard, device=device)
                ema.update(model)
                pending += step.losses
                threads.took((time.perf_counter() - before) / len(batch))
                result.steps += 1
                result.utterances += len(batch)
                if result.steps % 10:
                    continue
                loss, pending = torch.cat(pending).mean().item(), []
                now = time.perf_counter() - begin
                result.loss.append({"seconds": now, "step": result.steps, "loss": loss})
                wer = f", WER {result.wer[-1]['wer']:.1%}" if result.wer else ""
                progress.update(bar, completed=min(done, 1.0), figures=f"loss {loss:.2f}{wer}")
                if next_look < done < 1 - 0.4 / looks:
                    judge()
                    threads.reset()
                    next_look = done + 1 / looks
            else:
                epoch += 1
                continue
            break
        progress.update(bar, completed=1.0)
    judge()
    ema_state = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    model.load_state_dict(ema_state)
    model.eval(), frontend.eval()
    result.seconds = time.perf_counter() - begin
    return result
