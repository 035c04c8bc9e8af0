"""The state of a training run: everything that a checkpoint needs so that the run continues exactly."""

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
    """Everything that a run must save so that it continues exactly, except the random generators."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    ema: EMA | None = None
    epoch: int = 0  # the current epoch, from 0
    position: int = 0  # steps done in this epoch with batches of the current sizes
    taken: list[int] = field(default_factory=list)  # items already used in this epoch in batches of other sizes
    step: int = 0  # steps done in all epochs
    stale: int = 0  # validations since the best one, or since the last return to the best weights
    unjudged: bool = False  # whether a signal interrupted the validation of this step
    best_wer: float = math.inf
    earlier: float = 0.0  # minutes spent in earlier parts of the run, before it was resumed
    clock: float = field(default_factory=time.monotonic)

    _PARTS = ("optimizer", "scaler", "meter")
    _PLACES = ("epoch", "position", "taken", "step", "stale", "unjudged", "best_wer")

    def next_epoch(self) -> None:
        self.epoch, self.position, self.taken = self.epoch + 1, 0, []

    @property
    def minutes(self) -> float:
        """The minutes spent in all parts of the run."""
        return self.earlier + (time.monotonic() - self.clock) / 60

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as a dict, with model and moving average under the keys of NVIDIA's checkpoints."""
        state = {name: getattr(self, name).state_dict() for name in self._PARTS}
        state |= {name: getattr(self, name) for name in (*self._PLACES, "minutes")}
        state["ema_state_dict"] = self.ema.state_dict() if self.ema else None
        state["ema_updates"] = self.ema.updates if self.ema else 0
        return state | {"state_dict": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores everything except the optimiser's settings, such as its learning rate, which do not change.

        If the saved run had no moving average, it starts from the loaded weights. If it had no loss scale, that stays.
        """
        self.go_back(state)
        for name in self._PARTS:
            if name not in ("optimizer", "scaler"):
                getattr(self, name).load_state_dict(state[name])
        for name in self._PLACES:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.earlier, self.clock = state["minutes"], time.monotonic()

    def go_back(self, state: dict[str, Any]) -> None:
        """Restores what was learnt: weights, moments, loss scale and moving average.

        Values are copied into the existing tensors. The position in the data, the figures and the optimiser's settings
        do not change.
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
