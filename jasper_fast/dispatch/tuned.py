"""First-use tuning: what `backend="auto"` finds unmeasured on this GPU is measured once, and remembered on disk.

As `torch.backends.cudnn.benchmark` does it, but kept: the rows lie in the user's cache (`verdicts.folder()`), one file
for each GPU, driver, versions and sources, over the tables that come with the package. The contenders run in a process
of their own, `python -m jasper_fast.tuning.child`, which checks each before it times it. A cell (an op at a shape, see
`tables.Cell`) is on disk as soon as it is done, so that whoever is killed loses the cell that was being measured.

Nothing is tuned while a graph is captured or traced, or inside `not_now()`: what is wanted then takes the defaults, and
is tuned when something is next asked for outside. `JASPER_FAST_TUNE=0` turns it off, as `off()` does for a body. Of
several processes one tunes; the others wait for it and read.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jasper_fast.dispatch import backends, children, verdicts
from jasper_fast.kernels import likeness, tables
from jasper_fast.kernels.tables import Cell, Row

SWITCH = "JASPER_FAST_TUNE"
FIRST_USE = 120.0  # seconds that a first use may take; what is left over is tuned by the next process
PATIENCE = 300.0  # seconds that a process waits for another one's tuning
CONTENDER = 90.0  # seconds without a sign of the child, compilation included
GRACE = 5.0  # seconds beyond the budget for the measurement that was begun
LOCK = "tuning.lock"


class CannotTune(RuntimeError):
    """The process that tunes did not come to measure anything; the message says why."""


def command() -> list[str]:
    """The command line of the process that tunes."""
    return [sys.executable, "-W", "ignore", "-m", "jasper_fast.tuning.child"]


# ------------------------------------------------------------------------------------------------ what is kept on disk


def path(device: torch.device) -> Path:
    """The file of the rows that were tuned for `device`."""
    key = verdicts.key(device)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return verdicts.folder() / "tuned" / f"{tables.slug(key['device'])}-{digest}.json"


def read(device: torch.device) -> tuple[Row, ...]:
    """The rows that are kept for `device`; none, with a message, where the file cannot be used."""
    file = path(device)
    if not file.is_file():
        return ()
    try:
        return tables.load(file).rows
    except (OSError, tables.TableError) as error:
        _say(f"cannot use the tuned choices ({error}): tuning again")
        return ()


def keep(device: torch.device, rows: Sequence[Row]) -> None:
    """Puts the rows of measured cells into the file for `device`; a cell's earlier rows go."""
    if not rows:
        return
    cells, file = {row.cell for row in rows}, path(device)
    with verdicts.locked(10.0, "tuned.lock"):  # for as long as the file is written: a session's lock is LOCK
        kept = [row for row in read(device) if row.cell not in cells]
        try:
            tables.write(file, _header(device), [*kept, *rows])
        except OSError as error:
            _say(
                f"cannot keep what was tuned in {file} ({error}); set JASPER_FAST_CACHE to a folder that can be written"
            )


def _header(device: torch.device) -> dict[str, str]:
    key, traits = verdicts.key(device), likeness.traits(device.index or 0)
    return {
        "gpu": key["device"],
        "capability": traits.capability if traits else "sm_00",
        **likeness.header(traits),
        **{name: key.get(name) or "unknown" for name in ("driver", "torch", "triton")},
        "commit": key.get("sources") or "unknown",
        "command": "first use",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _faults(device: torch.device) -> dict[str, list[str]]:
    """Contenders that ended their process, by cell."""
    try:
        return json.loads(path(device).with_suffix(".faults").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or nothing that helps: they are tried again
        return {}


def _keep_fault(device: torch.device, cell: Cell, contender: str) -> None:
    found = _faults(device)
    found.setdefault(_name(cell), []).append(contender)
    file = path(device).with_suffix(".faults")
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with contextlib.suppress(OSError):  # keep() has said that the folder cannot be written
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        os.replace(part, file)


def _name(cell: Cell) -> str:
    return " ".join(map(str, cell))


def _there() -> bool:
    return torch.cuda.is_available()


def rows(index: int) -> Sequence[Row]:
    """What was tuned for the CUDA device `index`, as tables lay it over their files."""
    return read(torch.device("cuda", index)) if _there() else ()


tables.lay_over(rows)


# ------------------------------------------------------------------------------------------------------- a tuning


@dataclass
class Session:
    """Cells that one call tunes: those that are done, with what was refused in each and why, and whether time was
    enough."""

    cells: Sequence[Cell]
    done: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    out_of_time: bool = False


def tune(
    device: torch.device,
    cells: Iterable[Cell],
    budget: float,
    *,
    on_cell: Callable[[Session, str], None] = lambda session, doing: None,
    keeps: bool = True,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Session:
    """Measures `cells` in a process of its own for at most `budget` seconds; what each gives is kept at once, but where
    `keeps` is False. `seconds`: to time a cell in (None: the tuner's own).

    A contender that ends the process, or hangs, is remembered and not tried again, and another process goes on.
    `on_cell(session, what is being done)` is called as things happen. Raises CannotTune where no process comes to its
    first cell, or something outside ends one.
    """
    session, end = Session(list(dict.fromkeys(cells))), clock() + budget
    while True:
        todo = [cell for cell in session.cells if cell not in session.done]
        left = end - clock()
        if not todo or left <= 0:
            session.out_of_time = bool(todo)
            return session
        current: tuple[Cell, str] | None = None

        def hear(kind: str, value: Any) -> bool:
            nonlocal current
            if kind == "begin":
                current = Cell(*value[0]), value[1]
                on_cell(session, value[1])
            elif kind == "found":
                cell, current = Cell(*value["cell"]), None
                if keeps:
                    keep(device, [Row(**row) for row in value["rows"]])
                session.done[cell] = value
                on_cell(session, "")
            elif kind == "doing":
                on_cell(session, value)
            return kind == "end"

        wanted = {"device": str(device), "cells": todo, "budget": left, "without": _faults(device), "seconds": seconds}
        ended = children.talk(command(), wanted, hear, min(CONTENDER, left + GRACE))
        if ended.told or clock() >= end:
            session.out_of_time = len(session.done) < len(session.cells)
            return session
        if current is None or ended.from_outside:
            raise CannotTune(f"the process that tunes {ended.how}{ended.last}")
        _keep_fault(device, *current)


# ------------------------------------------------------------------------------------------------------- first use

changed: list[Callable[[], None]] = []  # called after tables have new rows: who keeps choices drops them
_waiting: dict[torch.device, dict[Cell, str]] = {}  # wanted when it was no good moment, and for what
_asked: set[tuple[torch.device, Cell]] = set()  # tried in this process, with or without a result
_local = threading.local()


def enabled() -> bool:
    """Whether first uses are tuned here."""
    return os.environ.get(SWITCH, "1") != "0" and not getattr(_local, "off", 0)


@contextlib.contextmanager
def _more(name: str) -> Iterator[None]:
    setattr(_local, name, getattr(_local, name, 0) + 1)
    try:
        yield
    finally:
        setattr(_local, name, getattr(_local, name) - 1)


off = functools.partial(_more, "off")  # in this thread nothing is tuned inside, now or later
not_now = functools.partial(_more, "not_now")  # in this thread what is wanted inside is tuned later


def good_moment(device: torch.device) -> bool:
    """Whether some seconds may pass now: nothing is being captured or traced, and no `not_now()` is open."""
    if getattr(_local, "not_now", 0) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return False
    capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)  # None: a PyTorch without CUDA
    return capturing is None or not torch.cuda.is_available() or not capturing()


def want(device: torch.device, cells: Iterable[Cell], what: str) -> None:
    """`cells` are about to be chosen for by "auto": those that this GPU was never measured at are tuned, now or at the
    next good moment. `what`: whose they are, in words ("Jasper")."""
    if not enabled():
        return
    device = indexed(device)
    new = {c: what for c in cells if (device, c) not in _asked and not tables.covered(device, c)}
    faces = {op: _has_choice(op, device) for op in {cell.op for cell in new}}
    new = {cell: what for cell in new if faces[cell.op]}
    if new:
        _waiting.setdefault(device, {}).update(new)
    catch_up(device)


def _has_choice(op: str, device: torch.device) -> bool:
    """Whether a face of ours can run `op` there, beside plain PyTorch: else there is nothing to choose from."""
    ours = ("triton", "cuda") if op in tables.NORM_OPS else ("triton",)
    return any(backends.why_missing(face, device) is None for face in ours)


def catch_up(device: torch.device) -> None:
    """Tunes what is waiting, if this is a good moment."""
    if not _waiting:  # every call of an op comes by here
        return
    device = indexed(device)
    if _waiting.get(device) and enabled() and good_moment(device):
        _first_use(device, _waiting.pop(device))


def waiting(device: torch.device) -> int:
    """Cells that are to be tuned at the next good moment."""
    return len(_waiting.get(indexed(device), ()))


def indexed(device: torch.device) -> torch.device:
    """`device` with the index of the current one where it names none."""
    if device.index is None and device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _first_use(device: torch.device, wanted: dict[Cell, str]) -> None:
    _asked.update((device, cell) for cell in wanted)
    with verdicts.locked(PATIENCE, LOCK) as mine:
        tables.forget()  # another process may have been quicker
        todo = [cell for cell in wanted if not tables.covered(device, cell)]
        if todo and mine:
            _tell_and_tune(device, todo, " and ".join(dict.fromkeys(wanted[cell] for cell in todo)))
    tables.forget()
    for drop in changed:
        drop()


def _tell_and_tune(device: torch.device, cells: Sequence[Cell], what: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)  # so that nothing of this process runs beside what is timed
    started = time.monotonic()
    print(f"tuning {what} for {verdicts.key(device)['device']}, once ...", end="", file=sys.stderr, flush=True)
    try:
        session = tune(device, cells, FIRST_USE)
    except (CannotTune, OSError, tables.TableError) as error:
        told = f" not possible ({error}): it runs as the tables and rules of its kind of GPU say"
    else:
        left = len(cells) - len(session.done)
        told = f": {time.monotonic() - started:.0f} s"
        told += (
            f" (time for {len(session.done)} of {len(cells)} shapes; `jasper-fast tune` does the rest)" if left else ""
        )
    print(told, file=sys.stderr, flush=True)


def forget() -> None:
    """Drops what this process wants and has tried."""
    _waiting.clear()
    _asked.clear()


def _say(text: str) -> None:
    print(f"jasper_fast: {text}", file=sys.stderr)
