"""The state of a training run that its checkpoints contain, and the meter that collects the figures of its steps."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jasper_fast.training.optim import EMA
from jasper_fast.training.runs import RunError
from jasper_fast.training.step import StepResult

_COUNTS = ("bad_in_a_row", "bad_losses", "overflows", "unread")
ADVICE = (  # first for NaN or infinity, then for files that cannot be read
    "Check the audio of these files, lower the learning rate, lengthen the warm-up, or use bf16 or fp32",
    "Check the paths in the manifests and that their drive is mounted; --data-dir is the folder of relative paths",
)


class Diverged(RunError):
    """Raised if too many steps in a row were skipped, the last because of a NaN or an infinity."""


class Meter:
    """Collects the figures of steps on the device. It reads those of many steps together, so that no step waits.

    It counts skipped steps by their cause: `bad_losses` (a loss of this process was NaN or infinite), `overflows` (its
    losses were finite, but the gradient was not) and `unread` (a rank could read no file). After `max_bad` skipped
    steps in a row `read` raises an error. `advice`: see `ADVICE`.
    """

    def __init__(self, max_bad: int = 20, advice: tuple[str, str] = ADVICE):
        self.advice = advice
        self.max_bad, self.bad_in_a_row, self.bad_losses, self.overflows, self.unread = max_bad, 0, 0, 0, 0
        self._pending: list[StepResult] = []
        self.restart()

    def restart(self) -> None:
        """Starts a new interval for `figures`."""
        self._sum, self._good, self._seen, self._norm = 0.0, 0, 0, math.nan
        self._start = time.perf_counter()

    def add(self, step: StepResult) -> None:
        """Adds a step. Reads nothing from the device."""
        self._pending.append(step)

    def read(self) -> list[str]:
        """Waits for the device and returns lines about the steps that were skipped since the last call.

        A step in which a rank could read no file gives one line, and an overflow gives none. For a bad loss, the lines
        name the utterances whose features are not finite. The losses do not show which utterance is bad, because batch
        norm spreads a NaN over the whole batch. If all features are finite, the lines name the utterances whose loss is
        not finite. After `max_bad` skipped steps in a row, raises an error that names the last cause: RunError if files
        could not be read, else Diverged.
        """
        if not self._pending:
            return []
        losses = torch.cat([loss for step in self._pending for loss in step.losses]).tolist()
        heard = torch.cat([flag for step in self._pending for flag in step.heard]).tolist()
        norms = torch.stack([step.grad_norm for step in self._pending]).tolist()
        bad: list[str] = []
        for step, norm in zip(self._pending, norms, strict=True):
            count = len(step.names)
            mine, losses, finite, heard = losses[:count], losses[count:], heard[:count], heard[count:]
            wrong = [f"{n}: its loss is {v}" for n, v in zip(step.names, mine, strict=True) if not math.isfinite(v)]
            deaf = [f"{n}: its features are not finite" for n, f in zip(step.names, finite, strict=True) if not f]
            bad += (deaf or wrong) if wrong else [step.unread] if step.unread else []
            self.bad_losses += bool(wrong)
            self.unread += bool(step.unread)
            self.overflows += not wrong and not step.unread and not math.isfinite(norm)
            self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
            self._seen += len(mine)
            if math.isfinite(norm):
                self._sum, self._good, self._norm = self._sum + sum(mine), self._good + len(mine), norm
        last, self._pending = self._pending[-1], []
        if self.bad_in_a_row >= self.max_bad:
            culprit = bad[-1] if bad else "the gradient has no finite norm"
            what = f"{self.bad_in_a_row} steps in a row were skipped; the last: {culprit}."
            raise RunError(f"{what} {self.advice[1]}") if last.unread else Diverged(f"{what} {self.advice[0]}")
        return bad

    def figures(self) -> dict[str, float]:
        """Returns the figures of the interval and starts a new one. Call it after `read`.

        `loss` is the mean over this process's utterances of good steps. `grad_norm` is the norm of the last good step.
        The numbers of skipped steps are those of the whole run.
        """
        seconds = time.perf_counter() - self._start
        loss = self._sum / self._good if self._good else math.nan
        result = {"loss": loss, "grad_norm": self._norm, "utterances_per_s": self._seen / seconds}
        self.restart()
        return result | {name: getattr(self, name) for name in _COUNTS[1:]}

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _COUNTS}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


@dataclass
class TrainingState:
    """Everything that a run must save so that it continues exactly, except the random generators."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    ema: EMA | None = None
    epoch: int = 0  # the current epoch, counted from 0
    position: int = 0  # steps done in this epoch since the sizes of batches changed last
    taken: list[int] = field(default_factory=list)  # items that this epoch used before that change
    step: int = 0  # steps done in all epochs
    stale: int = 0  # validations since the best one, or since the last return to the best weights
    extra: int = 0  # `step` is this much more than it would be if all epochs had had batches of the present sizes
    unjudged: bool = False  # whether a signal interrupted the validation of this step
    best_wer: float = math.inf
    earlier: float = 0.0  # minutes spent in earlier parts of the run, before it was resumed
    clock: float = field(default_factory=time.monotonic)

    _PARTS = ("meter",)
    _PLACES = ("epoch", "position", "taken", "step", "stale", "extra", "unjudged", "best_wer")

    def next_epoch(self) -> None:
        self.epoch, self.position, self.taken = self.epoch + 1, 0, []

    @property
    def minutes(self) -> float:
        """The minutes spent in all parts of the run."""
        return self.earlier + (time.monotonic() - self.clock) / 60

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as a dict. Model and moving average have the keys that NVIDIA's checkpoints use."""
        return {
            **{name: getattr(self, name).state_dict() for name in ("optimizer", "scaler", *self._PARTS)},
            **{name: getattr(self, name) for name in (*self._PLACES, "minutes")},
            "state_dict": self.model.state_dict(),
            "ema_state_dict": self.ema.state_dict() if self.ema else None,
            "ema_updates": self.ema.updates if self.ema else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores everything except the optimiser's settings, such as its learning rate.

        If the saved run had no moving average, the average starts from the loaded weights. If the saved run had no loss
        scale, the present scale does not change.
        """
        self.go_back(state)
        for name in self._PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self._PLACES:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.earlier, self.clock = state["minutes"], time.monotonic()

    def go_back(self, state: dict[str, Any]) -> None:
        """Restores weights, moments, loss scale and moving average, by copying values into the existing tensors.

        The position in the data, the figures and the optimiser's settings do not change.
        """
        self.model.load_state_dict(state["state_dict"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        before = {parameter: dict(moments) for parameter, moments in self.optimizer.state.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        for group, now in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(now)
        for parameter, moments in before.items():  # keep the old tensors, because CUDA graphs use their addresses
            loaded = self.optimizer.state[parameter]
            for name, tensor in moments.items():
                if isinstance(tensor, Tensor) and name in loaded:
                    loaded[name] = tensor.copy_(loaded[name])
        if state["scaler"]:  # empty for a run without loss scaling
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema_state_dict"] or state["state_dict"], state["ema_updates"])
