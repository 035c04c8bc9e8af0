"""The watcher of the self-check: starts the process that runs kernels, reads its messages, and finds the check that
ended it.

A kernel that crashes or never ends must not break the user's process or its CUDA context, and must be found. So
`supervise` starts `python -m jasper_fast.selfcheck.child`, which writes one line when it begins a check and one when it
ends it. If that process dies or falls silent, the check that it was in is at fault, and another process does the
remaining checks. If the watching process is ended early, a `Report` holds the results so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from jasper_fast.dispatch import verdict
from jasper_fast.dispatch.verdict import FAULTS, UNCHECKED, Verdict, group_of, judge

MARK = "jasper-fast-selfcheck "  # begins each message; a kernel may print other lines
CHECK_SECONDS = 180.0  # for one check, its compilation included
START_SECONDS = 120.0  # for the interpreter, torch and the device
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # never sent by a kernel


class CannotCheck(RuntimeError):
    """The check could not be made, because its process did not reach the first kernel. The message says why."""


def command() -> list[str]:
    """The command line of the process that runs kernels."""
    return [sys.executable, "-W", "ignore", "-m", "jasper_fast.selfcheck.child"]


@dataclass
class Report:
    """The results of a self-check so far: the `planned` checks, and the rows of finished checks by id."""

    planned: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in the order of the plan."""
        return [self.found[check["id"]] for check in self.planned if check["id"] in self.found]

    def decided(self) -> list[dict[str, Any]]:
        """The rows from which verdicts can be made: all checks of their op, face and dtype are finished, or one
        failed."""
        rows, open_ = self.rows, {group_of(check) for check in self.planned if check["id"] not in self.found}
        open_ -= {group_of(row) for row in rows if row["status"] in FAULTS}
        return [row for row in rows if group_of(row) not in open_]


def supervise(
    device: torch.device,
    *,
    quick: bool = False,
    ops: Sequence[str] = verdict.OPS,
    faces: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    seconds: float = CHECK_SECONDS,
    on_row: Callable[[dict, int], None] = lambda row, total: None,
    argv: Sequence[str] | None = None,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """The rows of all checks for `device`: statuses of `checks.perform`, and "died", "hung" and "skipped".

    `ops`, `faces`, `dtypes` ("float16", ...): what to check, as `checks.plan` takes them. After a kernel that died or
    hung, the other checks of its op, face and dtype are skipped, because their verdict is known. `seconds` limits each
    check. `on_row(row, total)` is called for each new row. `argv` replaces the command line of the process. Any
    exception ends the checking process at once, and `report` then holds the results so far. Raises CannotCheck if the
    process does not reach the first check.
    """
    report = report or Report()
    which = {"ops": list(ops), "faces": list(faces), "dtypes": list(dtypes)}
    while True:
        wanted = {"device": str(device), "quick": quick, **which, "done": list(report.found)}
        try:
            fault = _watch(argv or command(), wanted, seconds, report, on_row)
            after, skipped = "after the one that ended the process", fault and group_of(fault)
        except CannotCheck as error:
            if not report.planned:
                raise
            fault, after, skipped = None, str(error), None  # the remaining checks cannot be made
        if fault is not None:
            _note(report, fault, on_row)
        for check in report.planned:
            if check["id"] not in report.found and skipped in (None, group_of(check)):
                _note(report, check | {"status": "skipped", "detail": after}, on_row)
        if len(report.found) == len(report.planned):
            return report.rows


def _note(report: Report, row: dict, on_row: Callable) -> None:
    report.found[row["id"]] = {"ours": None, "theirs": None, "share": None, "seconds": None} | row
    on_row(report.found[row["id"]], len(report.planned))


def _watch(argv, wanted, seconds, report, on_row) -> dict | None:
    """Runs one process to its end; returns the row of the check that ended it, if one did."""
    env = dict(os.environ)
    home = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [home, env.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=env,
            start_new_session=True,
        )  # fmt: skip
        current, last_word, hung, ended = None, "", False, False
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: the code below reports that
                process.stdin.write(json.dumps(wanted))
                process.stdin.close()
            for kind, value in _lines(process.stdout, START_SECONDS, seconds):
                last_word = kind
                if kind == "plan":
                    report.planned = value
                elif kind == "begin":
                    current = value
                elif kind == "result":
                    _note(report, value, on_row)
                    current = None
                else:
                    ended = True
                    return value if kind == "fatal" else None
            ended = True
        except TimeoutError:
            hung = True
        finally:  # after another exception do not wait long
            code = _end(process, before=10.0 if ended else 0.0, after=30.0 if ended or hung else 5.0)
        last = _last_line(errors)
    if hung:
        how = f"gave no sign for {seconds if last_word else START_SECONDS:.0f} s"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    if current is None:
        raise CannotCheck(f"the process that checks {how}, in no check{last}")
    check, detail = next(c for c in report.planned if c["id"] == current), f"the process {how}{last}"
    if not hung and any(told in last.lower() for told in verdict.NO_MEMORY):
        return check | {"status": "no memory", "detail": f"{detail} ({verdict.FREE_MEMORY})"}
    if not hung and -code in FROM_OUTSIDE:
        return check | {"status": "environment", "detail": f"{detail} (from outside, or because host memory ran out)"}
    return check | {"status": "hung" if hung else "died", "detail": detail}


def _lines(stream: IO[str], start: float, each: float) -> Iterator[tuple[str, Any]]:
    """The lines that a process writes, until it ends; raises TimeoutError if it is silent for too long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    limit = start
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        if line.startswith(MARK):
            limit = each
            yield json.loads(line.removeprefix(MARK))


def _end(process: subprocess.Popen, before: float, after: float) -> int:
    """Waits `before` seconds for a process to end, then kills it and waits `after` seconds; returns its exit status."""
    try:
        return process.wait(timeout=before)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(timeout=after)
        except subprocess.TimeoutExpired:  # stuck in the driver: it cannot be killed, so do not wait
            return -signal.SIGKILL


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


def quick_verdict(device: torch.device, op: str, face: str, dtype: str) -> Verdict:
    """The verdict of a quick check of one op on one face in one dtype, in a process of its own."""
    none = Verdict(op, face, dtype, UNCHECKED, True, 0)
    try:
        rows = supervise(device, quick=True, ops=(op,), faces=(face,), dtypes=(dtype,))
    except (CannotCheck, OSError) as error:
        no_memory = verdict.blame(error)["status"] == "no memory"
        return replace(none, failure=f"{error} ({verdict.FREE_MEMORY})" if no_memory else str(error))
    found = judge(rows, quick=True)
    return found[0] if found else replace(none, failure=f"there is no check of it for {device}")
