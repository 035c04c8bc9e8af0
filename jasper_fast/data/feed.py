"""Copies batches to the device on a stream of their own, and measures how long the training waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from jasper_fast.data.batch import Batch


@dataclass
class Wait:
    """Host seconds spent waiting for batches since the last call of ``take``."""

    seconds: float = 0.0

    def take(self) -> float:
        """Returns the seconds, and starts again from 0."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def feed(batches: Iterable[Batch], device: torch.device, wait: Wait) -> Iterator[Batch]:
    """The batches with audio and targets on the device; lengths stay on the host, where CTC wants them.

    On a GPU the copy of a batch runs on a stream of its own, beside the step before it, which the host has launched
    but the device not finished; the memory must be pinned for that. ``wait`` adds up what the host waits.
    """
    source = iter(batches)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    while True:
        started = time.perf_counter()
        batch = next(source, None)
        wait.seconds += time.perf_counter() - started
        if batch is None:
            return
        if stream is not None:
            with torch.cuda.stream(stream):
                batch.audio, batch.targets = (x.to(device, non_blocking=True) for x in (batch.audio, batch.targets))
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for x in (batch.audio, batch.targets):
                x.record_stream(current)  # its memory is not given to the next copy while the step still reads it
        yield batch
