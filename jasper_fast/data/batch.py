"""A batch of utterances. This file imports no audio library, because benchmarks run without one.

Shapes: N utterances, S samples, U target symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jasper_fast.data.manifest import Skipped


@dataclass
class Batch:
    """Utterances that the model reads together: audio (N, S) fp32, zero beyond audio_lengths (N,) in samples; targets
    (N, U) int64, 0 beyond target_lengths (N,); texts, names, indices in the dataset, and ``starts``, the seconds
    trimmed from the beginning of each utterance. N is 0 if no utterance could be read.

    ``skipped`` lists utterances that were left out, and ``warned`` utterances that are used although something is wrong
    with them. ``step`` is the number of the batch in its ``epoch``, from 0 on.
    """

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

    def pin_memory(self) -> Batch:
        """Moves the tensors to pinned memory, in place. PyTorch's DataLoader calls this."""
        self.audio, self.audio_lengths = self.audio.pin_memory(), self.audio_lengths.pin_memory()
        self.targets, self.target_lengths = self.targets.pin_memory(), self.target_lengths.pin_memory()
        return self
