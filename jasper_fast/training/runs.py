"""What a training run has besides its model: processes, signals that stop it, messages, a log and checkpoints."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jasper_fast.extras import need
from jasper_fast.nn.checkpoint import FORMAT, CheckpointError, load, replacing, save


class RunError(RuntimeError):
    """Raised when a run cannot start or continue. The message says why and what to do."""


def launched() -> tuple[int, int, int]:
    """Returns the rank, the number of processes and the rank on this machine: those that `torchrun` set, or 0, 1, 0."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


@dataclass(frozen=True)
class Ranks:
    """This process's place in its group: rank `rank` of `world` processes. Without `torchrun`, rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto") -> Ranks:
        """Joins the process group if torchrun started this process: nccl on GPUs, gloo on CPUs.

        `device`: "auto", "cpu", "cuda" or a GPU such as "cuda:1". Raises RunError for any other text and for a GPU that
        does not exist.
        """
        rank, world, local = launched()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise RunError(f"--device {device!r} is not a device to train on: use auto, cpu, cuda or cuda:1")
        place = torch.device(f"cuda:{local}" if device == "cuda" else device)
        if place.type == "cuda":
            if not torch.cuda.is_available():
                raise RunError(f"--device {device}: PyTorch sees no GPU; check nvidia-smi, or use --device cpu")
            if place.index >= (count := torch.cuda.device_count()):
                raise RunError(f"PyTorch sees {count} GPUs, so there is no {place}: use another, or fewer processes")
            torch.cuda.set_device(place)
        if "RANK" in os.environ:
            # `highest` reduces tensors on the CPU with gloo, so that no process waits for its GPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
        return cls(rank, world, place)

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def place(self) -> str:
        """The device in words: the GPU's name, or the number of CPU threads."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else f"{torch.get_num_threads()} CPU threads"

    def vote(self, *flags: bool) -> tuple[bool, ...]:
        """Returns for each flag whether it is true on any rank. All ranks must call this. Does not wait for a GPU."""
        return tuple(map(bool, self.highest(*flags)))

    def highest(self, *numbers: int) -> tuple[int, ...]:
        """Returns for each number the highest of all ranks. All ranks must call this. Does not wait for a GPU."""
        if self.world == 1:
            return numbers
        votes = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return tuple(votes.tolist())

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context at whose end all ranks meet. If one of them raises an error inside, the others raise RunError."""
        try:
            yield
        except Exception:
            self.vote(True)
            raise
        if self.vote(False)[0]:
            raise RunError("another process failed: see its message")

    def gather(self, value: Any) -> list[Any]:
        """Returns, on every rank, the list of all ranks' `value`."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def same_buffers(self, *modules_or_tensors: Any) -> None:
        """Copies the given tensors, or the buffers of the given modules, from rank 0 to all ranks.

        Without this, running statistics differ between ranks.
        """
        if self.world > 1:
            for item in modules_or_tensors:
                for tensor in item.buffers() if isinstance(item, nn.Module) else item:
                    dist.broadcast(tensor, 0)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, read by the loop between steps. A second one ends the process."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        """Restores the earlier signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def talker(quiet: bool = False) -> Any:
    """Returns a rich Console that prints plain text to the standard error. Raises MissingExtra without rich."""
    return need("rich.console", "train").Console(
        stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True
    )


@contextmanager
def training_bar(console: Any, done: int, total: int, what: str = "training") -> Iterator[Any]:
    """A context that shows a progress bar. Yields `update(steps_done, text=None)`; the text is shown before the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task(what, total=total, completed=done)
        yield lambda step, text=None: progress.update(bar, completed=step, description=text)


class RunLog:
    """Writes `log.jsonl` (one record per line, flushed) and TensorBoard files in `folder`.

    With `enabled=False`, as on ranks > 0, it writes nothing. With `step` > 0 it continues an existing log after this
    step, and removes the records of later steps, which a killed run may have written.
    """

    def __init__(self, folder: str | Path, step: int = 0, enabled: bool = True):
        self._file = self._board = None
        if not enabled:
            return
        writer = need("torch.utils.tensorboard", "train").SummaryWriter
        path = Path(folder, "log.jsonl")
        kept = [r for r in read_log(path) if r["step"] <= step] if step else []
        with replacing(path) as file:
            file.writelines(f"{json.dumps(r)}\n".encode() for r in kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = writer(str(path.with_name("tensorboard")), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Appends a record, and writes its numbers to TensorBoard as `kind/name`. NaN and infinity become null."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind} | finite) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON-lines log. Ignores an incomplete last line, which a killed run may have written.

    Raises RunError for any other line that is not JSON.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise RunError(f"{path}, line {i + 1} is not JSON: remove the line or the file") from None
    return records


class Folder:
    """The checkpoints of one training run: the last `keep`, `best.pt`, and one for each epoch in `milestones`."""

    def __init__(self, path: str | Path, keep: int = 2, milestones: Sequence[int] = ()):
        self.path, self.keep, self.milestones = Path(path), keep, frozenset(milestones)

    def save(self, state: dict[str, Any], name: str | None = None) -> None:
        """Writes `state` as `name`.pt, or without a name as step_NUMBER.pt.

        Of all step_NUMBER.pt up to the step of `state`, deletes all but the last `keep`. Those of later steps stay:
        they could not be read when the run was resumed. Raises CheckpointError if the file cannot be written.
        """
        save(self.path / f"{name or 'step_{:08d}'.format(state['step'])}.pt", state)
        for old in self.steps(state["step"])[: -self.keep]:
            old.unlink()

    def steps(self, last: float = math.inf) -> list[Path]:
        """Returns the checkpoints that are named by their step, up to step `last`, oldest first."""
        found = {int(p.stem[5:]): p for p in self.path.glob("step_*.pt") if p.stem[5:].isdecimal()}
        return [found[step] for step in sorted(found) if step <= last]

    def candidates(self) -> list[Path]:
        """Returns the checkpoints in the order in which `latest` tries them."""
        milestones = sorted(self.path.glob("milestone_*.pt"), reverse=True)
        return [*reversed(self.steps()), *milestones, *self.path.glob("best.pt")]

    def clean(self) -> None:
        """Removes the incomplete files of a process that was killed while it wrote them."""
        for leftover in self.path.glob(".*.pt.tmp"):
            leftover.unlink(missing_ok=True)  # another rank may have removed it

    def latest(self, warn: Callable[[str], None] = warnings.warn) -> tuple[Path, dict[str, Any]] | None:
        """Returns the path and contents of the newest checkpoint that can be read, or None if there is no checkpoint.

        Calls `warn` with the reason for each newer file that cannot be read. Raises CheckpointError if there are
        checkpoints, but none can be read.
        """
        candidates = self.candidates()
        for path in candidates:
            try:
                state = load(path)
                if state.get("format") != FORMAT:
                    raise CheckpointError(f"{path} was not written by a training run of jasper_fast")
                return path, state
            except CheckpointError as error:
                warn(f"{error}; trying the next checkpoint")
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.path} can be read: empty the folder to start again"
            )
        return None
