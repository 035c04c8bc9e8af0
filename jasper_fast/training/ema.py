"""Exponential moving average of a model's weights and of its batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Moving average of everything in `model.state_dict()`: `average = decay * average + (1 - decay) * live`.

    Floating-point entries (parameters, running statistics) are averaged with foreach operations on their own device,
    integer entries (`num_batches_tracked`) are copied; nothing waits for the device. The average starts as a copy of
    the model. With `warmup` the decay of update t (from 1) is `min(decay, (1 + t) / (10 + t))`, so that a short run
    forgets its initial weights. Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the moving average must lie in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Updates the average with the present state of the model; call it after each optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        live = model.state_dict()
        names = [name for name, tensor in self.average.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.average[name] for name in names], [live[name] for name in names], 1 - decay)
        names = [name for name, tensor in self.average.items() if not tensor.is_floating_point()]
        if names:
            torch._foreach_copy_([self.average[name] for name in names], [live[name] for name in names])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the context the model has the averaged weights; afterwards, even after an error, exactly its own.

        The two are exchanged tensor by tensor, so the extra memory is one tensor. Do not call `update` inside.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            # In place, so that autograd's version counters change and packed copies of a weight are known to be stale.
            live = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(live)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged state dict, under the model's own names."""
        return dict(self.average)

    def load_state_dict(self, state_dict: dict[str, Tensor], updates: int = 0) -> None:
        """Loads a saved average; `updates` is the number of updates so far, for the warm-up. Raises KeyError naming a
        missing entry."""
        missing = sorted(self.average.keys() - state_dict.keys())
        if missing:
            raise KeyError(f"the saved average lacks {len(missing)} entries of this model, the first is {missing[0]}")
        self.updates = updates
        for name, tensor in self.average.items():
            tensor.copy_(state_dict[name])
