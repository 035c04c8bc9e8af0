"""The state of a training: everything that a checkpoint must hold to continue exactly."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jasper_fast.training.ema import EMA
from jasper_fast.training.meter import Meter


@dataclass
class TrainingState:
    """Everything that a run must save to continue exactly, except the random generators."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    ema: EMA | None = None
    epoch: int = 0  # the one under way, from 0
    position: int = 0  # steps done in this epoch, in batches as they are made now
    taken: list[int] = field(default_factory=list)  # items of this epoch that came in batches of other sizes
    step: int = 0  # steps done in all
    stale: int = 0  # validations since the best one, or since the last return to it
    unjudged: bool = False  # whether a signal broke off the validation of this step
    best_wer: float = math.inf
    earlier: float = 0.0  # minutes of earlier parts of the run
    clock: float = field(default_factory=time.monotonic)

    _PARTS = ("optimizer", "scaler", "meter")
    _PLACES = ("epoch", "position", "taken", "step", "stale", "unjudged", "best_wer")

    def next_epoch(self) -> None:
        self.epoch, self.position, self.taken = self.epoch + 1, 0, []

    @property
    def minutes(self) -> float:
        """Over all parts of the run."""
        return self.earlier + (time.monotonic() - self.clock) / 60

    def state_dict(self) -> dict[str, Any]:
        """Model and moving average under the reference's keys, the rest by name."""
        state = {name: getattr(self, name).state_dict() for name in self._PARTS}
        state |= {name: getattr(self, name) for name in (*self._PLACES, "minutes")}
        state["ema_state_dict"] = self.ema.state_dict() if self.ema else None
        state["ema_updates"] = self.ema.updates if self.ema else 0
        return state | {"state_dict": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores everything except the settings of the optimiser, which stay as they are.

        A moving average or a loss scale that the saved run did not have starts afresh.
        """
        self.go_back(state)
        for name in self._PARTS:
            if name not in ("optimizer", "scaler"):
                getattr(self, name).load_state_dict(state[name])
        for name in self._PLACES:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.earlier, self.clock = state["minutes"], time.monotonic()

    def go_back(self, state: dict[str, Any]) -> None:
        """Restores what has been learnt, in the memory where it lies now: weights, moments, loss scale, moving average.

        The place in the data, the figures and the settings of the optimiser stay.
        """
        self.model.load_state_dict(state["state_dict"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        before = {parameter: dict(moments) for parameter, moments in self.optimizer.state.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        for group, now in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(now)
        for parameter, moments in before.items():  # a CUDA graph knows their addresses
            loaded = self.optimizer.state[parameter]
            for name, tensor in moments.items():
                if isinstance(tensor, Tensor) and name in loaded:
                    loaded[name] = tensor.copy_(loaded[name])
        if state["scaler"]:  # empty for a run without loss scaling
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema_state_dict"] or state["state_dict"], state["ema_updates"])
