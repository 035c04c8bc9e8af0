"""Processes that load batches: they work for many epochs, survive signals to their group, and are replaced when
killed."""

import multiprocessing
import os
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import corpora
import pytest
import torch
from conftest import raising
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from jasper_fast.data.batches import BatchSampler, load_batches
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.data.perturb import SPEED, Perturb
from jasper_fast.data.settings import AudioSettings
from jasper_fast.speech.text import Vocabulary


class Watched(SpeechDataset):
    """Sets an item's `start` to the id of the process that reads the item. Reading the item with index `deadly` kills
    the process. If `unblocks` is true, reading an item unblocks SIGTERM."""

    deadly = -1
    unblocks = False

    def __getitem__(self, key):
        if self.unblocks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if key[1] == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        item = super().__getitem__(key)
        item.start = float(os.getpid())
        return item


@pytest.fixture
def data(tmp_path: Path) -> SpeechDataset:
    return Watched(corpora.written(tmp_path, 8), Vocabulary(), AudioSettings(perturb=Perturb(speed=SPEED)))


def take(loader, count: int) -> list:
    return [next(loader) for _ in range(count)]


@pytest.fixture
def begun():
    """Gives the test a function that returns the processes that the test has started. Fails the test if any is left at
    the end."""
    before, deadline = set(multiprocessing.active_children()), time.monotonic() + 60
    yield lambda: set(multiprocessing.active_children()) - before
    while (left := set(multiprocessing.active_children()) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


@pytest.fixture
def often(monkeypatch) -> None:
    """Makes the loader notice a dead process after 0.2 s instead of 5 s."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def same(one, other) -> bool:
    return one.names == other.names and torch.equal(one.audio, other.audio)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_one_another_in_the_same_processes(data, begun, workers: int) -> None:
    sampler = BatchSampler(data.durations, 3)
    wanted = [b for epoch in (4, 5, 6) for b in load_batches(data, sampler, epoch)][1:]
    loader = load_batches(data, sampler, 4, 1, workers, endless=True)
    found = take(loader, len(wanted))
    assert [(b.epoch, b.step) for b in found] == [(4, 1), (4, 2), *((e, s) for e in (5, 6) for s in range(3))]
    assert all(map(same, found, wanted))
    assert len({start for b in found for start in b.starts}) == max(workers, 1)
    loader.close()


def test_a_killed_process_is_replaced_and_no_batch_is_lost(data, often, begun) -> None:
    handler, sampler = signal.getsignal(signal.SIGCHLD), BatchSampler(data.durations, 1)
    wanted = [b for epoch in (0, 1) for b in load_batches(data, sampler, epoch)]
    loader = load_batches(data, sampler, workers=2, endless=True)
    found = take(loader, 3)
    for process in begun():
        process.kill()
    found += take(loader, 13)
    assert all(map(same, found, wanted)) and [b.step for b in found] == [*range(8)] * 2
    assert not data.skipped.items and signal.getsignal(signal.SIGCHLD) == handler
    loader.close()


def test_a_batch_that_always_kills_comes_empty_and_is_named(data, often, begun) -> None:
    """While a batch that killed its process is read again, no other process loads batches, which would take memory."""
    data.deadly = 5
    loader = load_batches(data, BatchSampler(data.durations, 2, bucketing=False, shuffle=False), workers=2)
    found, running = zip(*((batch, len(begun())) for batch in loader), strict=True)
    assert [len(b) for b in found] == [2, 2, 0, 2] and [b.step for b in found] == [0, 1, 2, 3] and running[2] == 0
    assert data.skipped.counts == {"worker_died": 2}
    assert "5.flac: its batch could not be read: a worker process died" in data.skipped.items[1].detail


def test_an_error_of_the_program_is_no_death(data, monkeypatch) -> None:
    monkeypatch.setattr(Watched, "__getitem__", raising(OSError("of the test")))
    for workers in (0, 1):
        with pytest.raises(OSError, match="of the test"):
            next(load_batches(data, BatchSampler(data.durations, 2), workers=workers))


@pytest.mark.parametrize("unblocks", [False, True])
def test_sigterm_ends_them_from_their_parent_only(data, begun, unblocks: bool) -> None:
    """torchrun and SLURM send SIGTERM to all processes of a run. Workers ignore it, because the training process ends
    them when it has saved its state. If other code unblocks SIGTERM, the signal still does not end them."""
    data.unblocks = unblocks
    loader = load_batches(data, BatchSampler(data.durations, 1), workers=1, endless=True)
    take(loader, 1)
    [process] = begun()
    for _ in range(20):
        subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
        take(loader, 1)
    assert process.is_alive()
    if not unblocks:
        for _ in range(20):  # a SIGTERM is lost if it comes while an earlier one is still pending
            process.terminate()
            process.join(1)
        assert process.exitcode == 0
    loader.close()


def killed_training(data: SpeechDataset, out: Connection) -> None:
    """Sends the ids of its loading processes to `out`, and then kills its own process."""
    loader = load_batches(data, BatchSampler(data.durations, 1), workers=2, endless=True)
    out.send({int(batch.starts[0]) for batch in take(loader, 4)})
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_none_outlives_a_killed_training(data) -> None:
    said, out = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=killed_training, args=(data, out))
    process.start()
    left = said.recv()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and len(left) == 2
    deadline = time.monotonic() + 60
    while (left := [pid for pid in left if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def running(pid: int) -> bool:
    """Returns whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
