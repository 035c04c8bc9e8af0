"""First-use tuning: if `backend="auto"` has no times of an op at a shape on this GPU, measures and saves them.

This is what `torch.backends.cudnn.benchmark` does, but the results are kept on disk. They are in the user's cache
(`files.cache()`), in one file per GPU, driver, versions and sources, and take precedence over the tables of the
package. The contenders (the candidate kernels for an op) run in a child process, `python -m jasper_fast.tuning.child`,
which checks each of ours before it times it. A cell (an op at a shape, see `tables.Cell`) is saved as soon as it is
measured, so a run that is killed loses at most one cell.

Nothing is tuned while a graph is captured or traced, or inside `not_now()`. Then "auto" chooses by tables or estimates,
and the cells are tuned when "auto" next chooses a face and tuning is allowed. `JASPER_FAST_TUNE=0` turns tuning off,
and `off()` turns it off for the code inside its block. If several processes need the same times, one tunes, and the
others wait and read its results.
"""

import contextlib
import datetime
import functools
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
from jasper_fast.kernels import files, likeness, tables
from jasper_fast.kernels.tables import Cell, Row

FIRST_USE = 120.0  # seconds that tuning may take at a first use; the next process tunes the cells that are left
PATIENCE = 300.0  # seconds that a process waits while another one tunes
CONTENDER = 90.0  # seconds that the child may be silent, including compilation
GRACE = 5.0  # seconds that the child may take beyond the budget to finish its current measurement
LOCK = "tuning.lock"
COMMAND = (sys.executable, "-W", "ignore", "-m", "jasper_fast.tuning.child")


class CannotTune(RuntimeError):
    """The child process that tunes failed outside any measurement, or was ended by a signal from outside. The message
    says why."""


# ------------------------------------------------------------------------------------------------ what is kept on disk


def path(device: torch.device) -> Path:
    """Returns the path of the file with the rows that were tuned for `device`."""
    gpu = tables.slug(verdicts.key(device)["device"])
    return files.cache() / "tuned" / f"{gpu}-{verdicts.key_hash(device, 16)}.json"


def read(device: torch.device) -> tuple[Row, ...]:
    """Reads the saved rows for `device`. If the file cannot be used, prints why and returns no rows."""
    file = path(device)
    try:
        return tables.load(file).rows if file.is_file() else ()
    except (OSError, tables.TableError) as error:
        verdicts.say(f"cannot use the saved times ({error}): tuning again")
        return ()


def keep(device: torch.device, rows: Sequence[Row]) -> None:
    """Saves the rows of measured cells in the file for `device`. They replace earlier rows of the same cells."""
    if not rows:
        return
    cells, file = {row.cell for row in rows}, path(device)
    with verdicts.locked(10.0, "tuned.lock"):  # held during this write; LOCK is held during the whole tuning
        kept = [row for row in read(device) if row.cell not in cells]
        try:
            tables.write(file, _header(device), [*kept, *rows])
        except OSError as error:
            verdicts.say(
                f"cannot save times in {file} ({error}); set JASPER_FAST_CACHE to a folder that can be written"
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
    """Reads which contenders of each cell have crashed or hung their process."""
    try:
        return dict(json.loads(path(device).with_suffix(".faults").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # no file, or a damaged one: all contenders are tried again
        return {}


def rows(index: int) -> Sequence[Row]:
    """Returns the tuned rows for the CUDA device `index`. In `tables` they take precedence over the package's files."""
    return read(torch.device("cuda", index)) if torch.cuda.is_available() else ()


tables.lay_over(rows)


# ------------------------------------------------------------------------------------------------------- a tuning


@dataclass
class Session:
    """The cells that one call of `tune` measures, and the results so far, with the contenders that were refused and
    why."""

    cells: Sequence[Cell]
    done: dict[Cell, dict[str, Any]] = field(default_factory=dict)

    @property
    def out_of_time(self) -> bool:
        """Whether cells were left when `tune` returned. (It returns early only if its time runs out.)"""
        return len(self.done) < len(self.cells)


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
    """Measures `cells` in a child process for at most `budget` seconds. Saves each finished cell if `keeps`.

    `seconds`: the time for timing all contenders of one cell, after their checks (None: the tuner's default). If a
    contender crashes or hangs the child, the fault is saved, the contender is not tried again, and a new child
    continues. `on_cell(session, activity)` is called at each message of the child but the last. Raises CannotTune if a
    child ends outside any measurement, or by a signal from outside.
    """
    session, end, faults = Session(list(dict.fromkeys(cells))), clock() + budget, _faults(device)
    while True:
        todo = [cell for cell in session.cells if cell not in session.done]
        left = end - clock()
        if not todo or left <= 0:
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

        wanted = {"device": str(device), "cells": todo, "budget": left, "without": faults, "seconds": seconds}
        ended = children.talk(COMMAND, wanted, hear, min(CONTENDER, left + GRACE))
        if ended.told or clock() >= end:
            return session
        if current is None or ended.from_outside:
            raise CannotTune(f"the tuning process {ended.how}{ended.last}")
        cell, contender = current
        faults.setdefault(" ".join(map(str, cell)), []).append(contender)
        with contextlib.suppress(OSError):  # keep() reports a folder that cannot be written
            files.write(path(device).with_suffix(".faults"), json.dumps(faults, indent=1))


# ------------------------------------------------------------------------------------------------------- first use

changed: list[Callable[[], None]] = []  # called after tables have new rows, to drop cached choices
_waiting: dict[torch.device, dict[Cell, str]] = {}  # for each device: {cell to tune when allowed: `what`, see `want`}
_asked: set[tuple[torch.device, Cell]] = set()  # cells already tried in this process, with or without a result
_local = threading.local()


def enabled() -> bool:
    """Returns whether first-use tuning is on in this thread."""
    return os.environ.get("JASPER_FAST_TUNE", "1") != "0" and not is_off()


def is_off() -> bool:
    """Returns whether this thread runs inside `off()`."""
    return getattr(_local, "off", 0) > 0


@contextlib.contextmanager
def _more(name: str) -> Iterator[None]:
    setattr(_local, name, getattr(_local, name, 0) + 1)
    try:
        yield
    finally:
        setattr(_local, name, getattr(_local, name) - 1)


# Context managers for the current thread. Inside `off()` nothing is tuned; inside `not_now()` tuning is put off.
off = functools.partial(_more, "off")
not_now = functools.partial(_more, "not_now")


def good_moment(device: torch.device) -> bool:
    """Returns whether tuning may run now: nothing is being captured or traced, and no `not_now()` is open."""
    busy = (
        getattr(_local, "not_now", 0),
        torch.compiler.is_compiling(),
        torch.jit.is_tracing(),
        torch._guards.TracingContext.try_get() is not None,  # in torch 2.11 is_compiling() is False here while tracing
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None,
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing(),
    )
    return not any(busy)


def want(device: torch.device, cells: Iterable[Cell], what: str) -> None:
    """Tunes those of `cells` that have no times on this GPU and were not tried in this process, now or at the next good
    moment. "auto" calls this before it chooses. `what` is printed as the thing that is tuned ("Jasper's inference")."""
    if not enabled():
        return
    device = indexed(device)
    new = [
        c for c in cells if (device, c) not in _asked and not tables.covered(device, c) and _has_choice(c.op, device)
    ]
    if new:
        _waiting.setdefault(device, {}).update(dict.fromkeys(new, what))
    catch_up(device)


def _has_choice(op: str, device: torch.device) -> bool:
    """Returns whether "auto" compares times for `op` on `device`. For convs it does so only if Triton can run."""
    ours = ("triton", "cuda") if op in tables.NORM_OPS else ("triton",)
    return any(backends.why_missing(face, device) is None for face in ours)


def catch_up(device: torch.device) -> None:
    """Tunes the waiting cells, if this is a good moment."""
    if not _waiting:  # the cheapest test comes first, because this runs at each choice of "auto"
        return
    device = indexed(device)
    # `pop` itself decides which of several threads tunes.
    if device in _waiting and enabled() and good_moment(device) and (wanted := _waiting.pop(device, None)):
        _first_use(device, wanted)


def indexed(device: torch.device) -> torch.device:
    """Returns `device`, with the index of the current CUDA device if it has none."""
    if device.index is None and device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _first_use(device: torch.device, wanted: dict[Cell, str]) -> None:
    _asked.update((device, cell) for cell in wanted)
    with verdicts.locked(PATIENCE, LOCK) as mine:
        tables.forget()  # another process may have tuned them meanwhile
        todo = [cell for cell in wanted if not tables.covered(device, cell)]
        if todo and mine:
            _tell_and_tune(device, todo, " and ".join(dict.fromkeys(wanted[cell] for cell in todo)))
    tables.forget()
    for drop in changed:
        drop()


def _tell_and_tune(device: torch.device, cells: Sequence[Cell], what: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)  # this process must not run anything during the timing
    started = time.monotonic()
    print(f"tuning {what} for {verdicts.key(device)['device']}, once ...", end="", file=sys.stderr, flush=True)
    try:
        session = tune(device, cells, FIRST_USE)
    except (CannotTune, OSError, tables.TableError) as error:
        result = f" not possible ({error}); using times of similar GPUs, or estimates"
    else:
        done, of = len(session.done), len(cells)
        rest = f" (there was time for {done} of {of} shapes; `jasper-fast tune` does the rest)" if done < of else ""
        result = f": {time.monotonic() - started:.0f} s{rest}"
    print(result, file=sys.stderr, flush=True)


def forget() -> None:
    """Forgets which cells wait to be tuned, and which were already tried."""
    _waiting.clear()
    _asked.clear()
