"""Processes that load batches: begun, and what befalls them.

A signal to the whole group of a run (Ctrl-C, torchrun, SLURM before a time limit) must not end them before the run: it
saves first, and then ends them itself.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

# The second: what a dead one had made is fetched from it, by the thread that pins memory where there is one.
_DEATH = re.compile(r"DataLoader worker \(pid|Caught (Connection|EOF|FileNotFound)\w* in pin memory thread")


class WorkerDied(RuntimeError):
    """A process that loads batches was killed, or has crashed."""


def begin(
    dataset: Dataset, keys: Iterable[list[Any]], collate: Callable, workers: int, pin_memory: bool
) -> Iterator[Any]:
    """The batches of items by ``keys``, in their order, loaded by ``workers`` processes (0: by this one).

    Raises WorkerDied where the next batch cannot come. The processes end with the iterator.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_outlive_signals,
    )
    before = signal.getsignal(signal.SIGCHLD)
    source = iter(loader)
    if workers and threading.current_thread() is threading.main_thread():
        # PyTorch's handler raises wherever this process is, as in the middle of a step, when a worker dies
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return _named(source) if workers else source


def _named(source: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from source
    except (RuntimeError, OSError, EOFError) as error:
        told = str(error)
        if not _DEATH.match(told) and (isinstance(error, RuntimeError) or told.startswith("Caught ")):
            raise
        advice = "a worker process died; was it killed for lack of memory? Fewer --num-workers take less"
        raise WorkerDied(f"{advice} ({told.splitlines()[0].strip() if told else 'end of file'})") from None


def _outlive_signals(worker: int) -> None:
    """In a worker: of two SIGTERM, one to the group and one from the process that began it, only the latter ends it."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent and os.getppid() == parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
