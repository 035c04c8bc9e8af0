"""The exponential moving average of a model's weights and of its batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jasper_fast.kernels.novograd.reference import average


class EMA:
    """Moving average of everything in `model.state_dict()`: `average = decay * average + (1 - decay) * live`.

    Floating-point entries (parameters, running statistics) are averaged with foreach operations on their own device.
    Integer entries (`num_batches_tracked`) are copied. Nothing waits for the device. The average starts as a copy of
    the model. With `warmup` the decay of update t (from 1) is `min(decay, (1 + t) / (10 + t))`, so that a short run
    forgets its initial weights. Raises ValueError for a decay outside [0, 1).

    `NovoGrad(params, ..., ema=ema)` updates the average in the optimiser's step. With other optimisers, call `update`.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the moving average must lie in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates, self.model = decay, warmup, 0, model
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @property
    def decay_now(self) -> float:
        """The decay of the latest update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    def update(self, model: nn.Module) -> None:
        """Adds the model's current state to the average. Call it after each optimiser step."""
        live = model.state_dict()
        self.updates += 1
        self.take([([live[name] for name in self.average], list(self.average.values()))])

    def begin(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Begins an update that an optimiser completes. Yields all pairs of a tensor of the model and its average."""
        self.updates += 1
        live = self.model.state_dict(keep_vars=True)
        return ((live[name], average) for name, average in self.average.items())

    @torch.no_grad()
    def take(self, pairs: Iterable[tuple[list[Tensor], list[Tensor]]]) -> None:
        """Updates the averages in `pairs` (lists of live tensors, lists of averages) with the decay of this update."""
        for lives, averages in pairs:
            average(lives, averages, 1 - self.decay_now)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the averaged weights. At its end, even after an error, it has its own again.

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
            # Copy in place, so that autograd's version counters change, which marks packed copies of a weight as stale.
            live = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(live)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged state dict, under the model's own names."""
        return dict(self.average)

    def load_state_dict(self, state_dict: dict[str, Tensor], updates: int = 0) -> None:
        """Loads a saved average. `updates` is the number of its updates so far, which the warm-up needs.

        Raises KeyError, which names the first missing entry.
        """
        missing = sorted(self.average.keys() - state_dict.keys())
        if missing:
            raise KeyError(f"the saved average lacks {len(missing)} entries of this model, such as {missing[0]}")
        self.updates = updates
        for name, tensor in self.average.items():
            tensor.copy_(state_dict[name])
