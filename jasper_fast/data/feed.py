"""Copies batches to the device on a separate stream, and measures how long training waits for them."""

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
        """Returns the seconds and resets them to 0."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def feed(batches: Iterable[Batch], device: torch.device, wait: Wait) -> Iterator[Batch]:
    """Yields the batches with audio and targets on the device. Lengths stay on the host, where PyTorch's CTC
    loss reads them.

    Batches are copied to a GPU on a separate stream. A batch in pinned memory is copied while the GPU still computes
    the step before. The seconds that the host waits for batches are added to ``wait``.
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
                x.record_stream(current)  # the next copy must not reuse this memory while the step still reads it
        yield batch
