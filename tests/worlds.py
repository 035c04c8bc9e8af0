"""Small groups of gloo processes that run train.py, a command or a function. The processes are forked from a server
that has imported torch already, so a group of three takes only a second."""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import corpora
import torch

from jasper_fast.data import batches
from jasper_fast.training import validate

HANG = 300  # seconds, far more than these runs take
_PRELOAD = [
    "torch", "torch.nn.parallel", "torch.distributed", "torch.utils.tensorboard", "torch.utils.data",
    "jasper_fast.train", "jasper_fast.inference.evaluation", "jasper_fast.inference.recognizer",
    "jasper_fast.lm.saved", "rich.progress", "soundfile", "worlds",
]  # fmt: skip


@dataclass
class Member:
    """What one process did: its standard error (`said`), its standard output (`printed`), and the (epoch, name) of the
    utterances of each training step."""

    said: str
    printed: str
    steps: list[list[tuple[int, str]]]


def world(
    size: int, arguments: list[str], folder: Path, prepare: Callable | None = None, *args, status: int = 0
) -> list[Member]:
    """Runs train.py with `arguments` in `size` processes. Each first calls `prepare(train, rank, *args)`, if given.
    Raises AssertionError if a process does not end with the exit status `status`."""
    return processes(size, folder, _train, arguments, folder, prepare, args, status=status)


def command(size: int, arguments: list[str], folder: Path) -> list[Member]:
    """Runs `jasper-fast` with `arguments` in `size` processes. Raises AssertionError if a process fails."""
    return processes(size, folder, _command, list(map(str, arguments)))


def torchrun(program: Path, arguments: list[str], *options: str) -> None:
    """Runs `program` with `arguments` in two processes that torchrun starts with `options`. Raises AssertionError if
    it fails."""
    argv = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options,
        str(program), *arguments,
    ]  # fmt: skip
    # Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE torchrun gives restarted processes old addresses (pytorch#135712).
    more = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(corpora.ROOT)}
    done = subprocess.run(argv, cwd=corpora.ROOT, env=os.environ | more, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def processes(size: int, folder: Path, run: Callable, *args, status: int = 0) -> list[Member]:
    """Calls `run(rank, *args)`, which returns the exit status, in `size` processes.

    Their standard error and output go to files in `folder`. Raises AssertionError if a process does not end, or ends
    with another exit status than `status`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun does
    folder.mkdir(parents=True, exist_ok=True)
    begun = [context.Process(target=_member, args=(rank, size, store.port, folder, run, args)) for rank in range(size)]
    for process in begun:
        process.start()
    deadline = time.monotonic() + HANG
    for process in begun:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(begun) if process.is_alive()]
    for rank in hung:
        begun[rank].kill()
    said, printed = ([(folder / f"{rank}.{kind}").read_text() for rank in range(size)] for kind in ("err", "out"))
    assert not hung, f"ranks {hung} did not end: {said}"
    steps = [json.loads(path.read_text()) if (path := folder / f"{r}.json").exists() else [] for r in range(size)]
    assert [process.exitcode for process in begun] == [status] * size, said
    return list(map(Member, said, printed, steps))


def _member(rank: int, size: int, port: int, folder: Path, run: Callable, args: tuple) -> None:
    multiprocessing.set_start_method("fork", force=True)  # so that no data loader imports torch again
    with open(folder / f"{rank}.err", "w", buffering=1) as said, open(folder / f"{rank}.out", "w") as printed:
        os.dup2(said.fileno(), 2)
        if size > 1:
            places = {
                "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0,
            }  # fmt: skip
            os.environ |= {k: str(v) for k, v in places.items()}
        torch.set_num_threads(1)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            sys.exit(run(rank, *args))


def _command(rank: int, arguments: list[str]) -> int:
    from jasper_fast.cli import command

    return command.main(arguments)


def _train(rank: int, arguments: list[str], folder: Path, prepare: Callable | None, args: tuple) -> int:
    from jasper_fast import train

    heard: list[list[tuple[int, str]]] = []

    def recorded(step, model, frontend, batches, *more, **how):
        heard.append([(batch.epoch, name) for batch in batches for name in batch.names])
        return step(model, frontend, batches, *more, **how)

    wrap(train, "train_step", recorded)
    if prepare:
        prepare(train, rank, *args)
    status = train.command(arguments)
    (folder / f"{rank}.json").write_text(json.dumps(heard))
    return status


def wrap(owner: object, name: str, around: Callable) -> None:
    """Replaces `owner.name`, for the rest of this process, by a function that calls `around` with the original function
    and the arguments."""
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **how: around(real, *args, **how))


def signal_at(train, rank: int, on_rank: int, step: int) -> None:
    """Sends SIGTERM to the process of rank `on_rank` after step `step`."""

    def watch(state):
        if state.step == step and rank == on_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    wrap(train, "main", lambda main, args, stop: main(args, stop, watch))


def signal_in(train, rank: int, on_rank: int, where: str) -> None:
    """Sends SIGTERM to the process of rank `on_rank` while it loads its fifth batch (`where` is "load") or decodes its
    first batch of validation ("validate")."""
    module, name, call = (batches, "_recorded", 5) if where == "load" else (validate, "heard", 1)
    calls = itertools.count(1)

    def struck(real, *args):
        if next(calls) == call and rank == on_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    wrap(module, name, struck)


def nan_in(train, rank: int, name: str) -> None:
    """Fills with NaN the audio of the file whose path ends with `name`."""

    def spoilt(collate, items):
        batch = collate(items)
        for i, each in enumerate(batch.names):
            if each.endswith(name):
                batch.audio[i] = float("nan")
        return batch

    wrap(batches, "collate", spoilt)


def other_manifest(train, rank: int, name: str) -> None:
    """Sets the argument `name` of rank 1 to a manifest that does not exist."""
    arguments = train.arguments
    if rank == 1:
        train.arguments = lambda *args: argparse.Namespace(**vars(arguments(*args)) | {name: ["gone.jsonl"]})
