"""Starts the processes that load batches, and reports when one dies.

Ctrl-C, torchrun, and SLURM before a time limit send a signal to all processes of a run. The loading processes must
survive it, because the training process needs batches until it has saved its state. It then ends the loading processes.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

# The messages of PyTorch's errors when a worker process has died. The second comes from the thread that pins memory.
_DEATH = re.compile(r"DataLoader worker \(pid|Caught (Connection|EOF|FileNotFound)\w* in pin memory thread")


class WorkerDied(RuntimeError):
    """A process that loads batches was killed or crashed."""


def begin(
    dataset: Dataset, keys: Iterable[list[Any]], collate: Callable, workers: int, pin_memory: bool
) -> Iterator[Any]:
    """Returns an iterator over batches, which ``workers`` processes load (0: this process). ``keys`` yields for each
    batch the keys of its items in the dataset.

    The iterator raises WorkerDied if a process has died and the next batch does not arrive. When the iterator is
    deleted, the processes end.
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
    # Libraries such as OpenBLAS start threads in a new process before `_outlive_signals` runs there. A thread that does
    # not block SIGTERM would take the signal away from `wait`.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        source = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if workers and threading.current_thread() is threading.main_thread():
        # PyTorch's handler for the death of a worker would raise at any point of this process, even within a step.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return _named(source) if workers else source


def _named(source: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from source
    except (RuntimeError, OSError, EOFError) as error:
        message = str(error)
        if not _DEATH.match(message) and (isinstance(error, RuntimeError) or message.startswith("Caught ")):
            raise
        advice = "a worker process died; if it was killed for lack of memory, use fewer worker processes"
        raise WorkerDied(f"{advice} ({message.splitlines()[0].strip() if message else 'end of file'})") from None


def _outlive_signals(worker: int) -> None:
    """Makes this worker process ignore SIGTERM, unless its parent process sends it or has ended."""
    parent = os.getppid()
    # Other code may unblock SIGTERM, as the resource tracker of multiprocessing does. The signal then does nothing.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent and os.getppid() == parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
