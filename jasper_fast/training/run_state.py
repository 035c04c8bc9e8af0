"""The state of a run: all that a checkpoint must hold for it to go on exactly where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from jasper_fast.training.ema import EMA
from jasper_fast.training.meter import Meter


@dataclass
class Run:
    """Everything that a run must save to go on exactly where it stands, but for the random generators."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    ema: EMA | None = None
    epoch: int = 0  # the one under way, from 0
    position: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    best_wer: float = math.inf
    minutes: float = 0.0  # of earlier parts of the run

    _PARTS = ("optimizer", "scaler", "meter")
    _PLACES = ("epoch", "position", "step", "best_wer", "minutes")

    def state_dict(self) -> dict[str, Any]:
        """Model and moving average under the reference's keys, the rest by name."""
        state = {name: getattr(self, name).state_dict() for name in self._PARTS}
        state |= {name: getattr(self, name) for name in self._PLACES}
        state["ema_state_dict"] = self.ema.state_dict() if self.ema else None
        state["ema_updates"] = self.ema.updates if self.ema else 0
        return state | {"state_dict": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes everything back. A moving average that starts only now starts from the saved weights."""
        self.model.load_state_dict(state["state_dict"])
        for name in self._PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self._PLACES:
            setattr(self, name, state[name])
        if self.ema:
            average = state["ema_state_dict"] or state["state_dict"]
            self.ema.load_state_dict(average, state["ema_updates"])
