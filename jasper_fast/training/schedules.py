"""Learning-rate schedules, as functions of the step: warm-up, hold, then decay to a minimum."""

import math
from dataclasses import dataclass

from jasper_fast.nn.config import refuse

POLICIES = ("exponential", "polynomial", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each training step: call `schedule(step)`, with steps counted from 0.

    In the first `warmup_steps` steps the rate is `lr * (step + 1) / (warmup_steps + 1)`, in the next `hold_steps` steps
    it is `lr`. Then it depends on the policy:
    - "exponential": `lr * gamma ** (epoch - warmup - hold)`. Epochs have `steps_per_epoch` steps and are counted from
      1. `warmup` and `hold` are the lengths in epochs, which may be fractions. As in NVIDIA's Jasper, the first epoch
      after the hold already has the rate `lr * gamma`.
    - "polynomial": `lr * (1 - progress) ** power`, where progress goes from 0 to 1 over the rest of `total_steps`. With
      power 2 it is the "legacy" policy of NVIDIA's Jasper.
    - "cosine": `lr * (1 + cos(pi * progress)) / 2`, with the same progress.
    The rate never falls below `min_lr` (or `lr`, if that is less). Raises ValueError, which names an invalid setting.

    Warm-up and hold are counted from step `warmup_from`, and the epochs or the progress of the decay from step
    `decay_from`. Both are 0 unless earlier epochs had batches of other sizes.
    """

    lr: float
    policy: str = "exponential"
    warmup_steps: int = 0
    hold_steps: int = 0
    steps_per_epoch: int = 1
    total_steps: int = 1
    gamma: float = 0.99
    power: float = 2.0
    min_lr: float = 1e-5
    warmup_from: int = 0
    decay_from: int = 0

    def __post_init__(self) -> None:
        few = min(self.warmup_steps, self.hold_steps) < 0 or min(self.steps_per_epoch, self.total_steps) < 1
        refuse(
            ValueError,
            (self.policy not in POLICIES, f"lr policy {self.policy!r} is not one of {', '.join(POLICIES)}"),
            (not min(self.lr, self.min_lr, self.power) >= 0,
             f"lr, min_lr and power must not be negative, got {self.lr}, {self.min_lr} and {self.power}"),
            (few, "warmup_steps and hold_steps must be at least 0, steps_per_epoch and total_steps at least 1"),
            (not 0 < self.gamma <= 1, f"gamma must lie in (0, 1], got {self.gamma}"),
        )  # fmt: skip

    def __call__(self, step: int) -> float:
        """Returns the learning rate of step number `step`, counted from 0."""
        warming, done, peak = step - self.warmup_from, step - self.decay_from, self.warmup_steps + self.hold_steps
        if warming < self.warmup_steps:
            return max(self.lr * (warming + 1) / (self.warmup_steps + 1), min(self.min_lr, self.lr))
        if warming < peak:
            factor = 1.0
        elif self.policy == "exponential":
            factor = self.gamma ** max(0.0, done // self.steps_per_epoch + 1 - peak / self.steps_per_epoch)
        else:
            progress = (done - peak) / max(1, self.total_steps - self.decay_from - peak)
            progress = min(1.0, max(0.0, progress))
            factor = (1 + math.cos(math.pi * progress)) / 2 if self.policy == "cosine" else (1 - progress) ** self.power
        return max(self.lr * factor, min(self.min_lr, self.lr))
