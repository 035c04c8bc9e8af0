"""Trains the demo's model with train.py for a number of steps or minutes, and finds the best number of threads."""

import shutil
import statistics
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from jasper_fast import Jasper, train
from jasper_fast.nn.loading import load_model
from jasper_fast.training.runs import Folder, StopRequest, read_log
from jasper_fast.training.state import TrainingState

CONFIG = Path(str(files("jasper_fast.configs") / "demo.yaml"))
BATCH_SIZE = 8
LOOKS = 6  # number of validations in a run


class Threads:
    """Finds the fastest number of CPU threads: on busy cores one thread is faster than many that wait for each other.

    It is called after each training step. It times `trial` steps with each of the candidates in turn, but only two
    steps with a candidate that is clearly slower than an earlier one. The fastest candidate is then used. At each step
    number that is a multiple of `period`, the trials begin again.
    """

    def __init__(self, candidates: list[int], trial: int = 6, period: int = 250):
        self.candidates, self.trial, self.period = candidates, trial, period
        self.reset()

    def __call__(self, state: TrainingState) -> None:
        if state.step % self.period == 0:
            self.reset()
        else:
            self.took(time.perf_counter() - self.before)
        self.before = time.perf_counter()

    def reset(self) -> None:
        """Begins the trials again."""
        self.medians: list[float] = []
        self.seconds: list[float] = []
        self.before = time.perf_counter()
        torch.set_num_threads(self.candidates[0])

    def took(self, seconds: float) -> None:
        """Records the time of a step, and sets the number of threads for the next step."""
        if len(self.medians) == len(self.candidates):
            return
        self.seconds.append(seconds)
        hopeless = self.medians and len(self.seconds) >= 2 and min(self.seconds) > 1.5 * min(self.medians)
        if len(self.seconds) < self.trial and not hopeless:
            return
        self.medians.append(statistics.median(self.seconds))
        self.seconds = []
        done = len(self.medians) == len(self.candidates)
        which = self.medians.index(min(self.medians)) if done else len(self.medians)
        torch.set_num_threads(self.candidates[which])


def learn(
    config: Path,
    manifests: tuple[Path, Path],
    folder: Path,
    steps: int,
    minutes: float,
    device: str,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> tuple[Jasper, list[dict[str, Any]], list[dict[str, Any]]]:
    """Trains a Jasper of `config` on the first of `manifests` for `steps` steps or `minutes`, whichever comes first,
    and tests it on the second. The learning-rate schedule ends with the run. Deletes an existing `folder` first.
    Returns the model with the averaged weights, and the log's records of training and of validation.

    The tests do not influence the result: the settings are fixed, and the last averaged weights are returned. Raises
    KeyboardInterrupt if a signal stopped the run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    options = {
        "config": config, "train-manifests": manifests[0], "val-manifests": manifests[1], "output-dir": folder,
        "steps": steps, "max-minutes": minutes, "batch-size": batch_size, "device": device, "seed": seed, "keep": 1,
        "num-workers": 4 if device.startswith("cuda") else 0, "lr": 0.02, "min-lr": 1e-4, "lr-policy": "polynomial",
        "lr-power": 1, "warmup-steps": round(0.03 * steps), "ema": 0.99, "log-every": max(1, min(50, steps // 20)),
        "val-every": max(1, steps // LOOKS), "save-every": steps,
    }  # fmt: skip
    argv = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    stop, had = StopRequest(), torch.get_num_threads()
    try:
        train.main(train.arguments([*argv, "--ema-warmup", "--lr-by-clock"]), stop, Threads(sorted({1, had})))
    finally:
        stop.restore()
        torch.set_num_threads(had)
    if stop.signal:
        raise KeyboardInterrupt(stop.signal)
    records = read_log(folder / "log.jsonl")
    loss, wer = ([r for r in records if r["kind"] == kind] for kind in ("train", "val_ema"))
    return load_model(Folder(folder).steps()[-1], ema=True), loss, wer
