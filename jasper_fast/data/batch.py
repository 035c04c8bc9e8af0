"""The utterances of one step, apart from what reads audio: a machine that only measures has no audio library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jasper_fast.data.manifest import Skipped


@dataclass
class Batch:
    """Utterances of one step: audio (N, S) fp32, zero beyond audio_lengths (N,) in samples; targets (N, U) int64,
    0 beyond target_lengths (N,); texts, names, indices in the dataset, and ``starts``, the seconds trimmed from their
    fronts. ``skipped`` lists utterances that were left out, ``warned`` those that are used although something is wrong
    with them; ``epoch`` and ``step`` (in the epoch) give the place of the batch. N is 0 if nothing could be read."""

    audio: Tensor
    audio_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    texts: list[str]
    names: list[str]
    indices: list[int]
    skipped: list[Skipped] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    warned: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        self.audio, self.audio_lengths = f(self.audio), f(self.audio_lengths)
        self.targets, self.target_lengths = f(self.targets), f(self.target_lengths)
        return self

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Moves the tensors to the device, in place."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))
