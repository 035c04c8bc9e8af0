"""`jasper-fast selfcheck`: the checks of checks.py, run in a process of their own, and what they say of each kernel.

A kernel that crashes, or that never ends, must not take the user's process or its CUDA context with it, and must be
named. So `supervise` starts `python -m jasper_fast.selfcheck`, which says what it begins and what it found, a line
each; when that process dies or falls silent, the check it was in is at fault, and another process does the rest. Who
ends the watching process early has what was found until then, in a `Report`.
"""

from __future__ import annotations

import contextlib
import datetime
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

from jasper_fast import checks, trust
from jasper_fast.trust import BAD, GOOD, UNCHECKED, Verdict

MARK = "jasper-fast-selfcheck "  # begins a line of the protocol: a kernel may print what it likes
CHECK_SECONDS = 180.0  # for one check, its compilation included
START_SECONDS = 120.0  # for the interpreter, torch and the device
FAULTS = ("wrong", "failed", "died", "hung")  # of the kernel
OPEN = ("no memory", "environment", "skipped")  # of no kernel: it was not checked
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # no kernel of ours sends these


class CannotCheck(RuntimeError):
    """The check could not be made: its process did not reach the first kernel. The message says why."""


# ---- the process that runs kernels ----


def child(source: IO[str] = sys.stdin) -> int:
    """Reads what to check as JSON from `source`, checks it, and reports on the standard output."""
    wanted = json.loads(source.read())
    device = torch.device(wanted["device"])
    which = {name: tuple(wanted[name]) for name in ("ops", "faces", "dtypes")}
    todo = checks.plan(device, quick=wanted["quick"], **which)
    # what a kernel forgets to write is NaN, not what the last call left there
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    probe = torch.ones(64, 64, device=device)
    if not torch.equal(probe @ probe, torch.full_like(probe, 64.0)):
        raise SystemExit(f"PyTorch itself multiplies matrices wrongly on {device}")
    _tell("plan", [check.plain() for check in todo])
    done = set(wanted["done"])
    for check in todo:
        if check.id in done:
            continue
        _tell("begin", check.id)
        row = checks.perform(check, device)
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as error:  # the context is gone with this kernel, and everything after it would fail too
            blamed = checks.blame(error)
            died = {"status": "died", "detail": str(error).splitlines()[0]}
            _tell("fatal", row | (died if blamed["status"] == "failed" else blamed))
            return 1
        _tell("result", row)
    _tell("end", None)
    return 0


def _tell(kind: str, value: object) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps([kind, value])}\n")
    sys.stdout.flush()


def command() -> list[str]:
    """The command line of the process that runs kernels."""
    return [sys.executable, "-W", "ignore", "-m", "jasper_fast.selfcheck"]


# ---- the process that watches ----


@dataclass
class Report:
    """What a self-check has found so far: `planned` checks, and rows of those that were made by their ids."""

    planned: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in the order of the plan."""
        return [self.found[check["id"]] for check in self.planned if check["id"] in self.found]

    def decided(self) -> list[dict[str, Any]]:
        """The rows that a verdict can be made of: all checks of their op, face and dtype were made, or one failed."""
        rows, open_ = self.rows, {_group(check) for check in self.planned if check["id"] not in self.found}
        open_ -= {_group(row) for row in rows if row["status"] in FAULTS}
        return [row for row in rows if _group(row) not in open_]


def _group(row: dict[str, Any]) -> tuple[str, str, str]:
    """What has one verdict."""
    return row["op"], row["face"], row["dtype"]


def supervise(
    device: torch.device,
    *,
    quick: bool = False,
    ops: Sequence[str] = checks.OPS,
    faces: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    seconds: float = CHECK_SECONDS,
    on_row: Callable[[dict, int], None] = lambda row, total: None,
    argv: Sequence[str] | None = None,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """The rows of all checks for `device`: statuses of `checks.perform`, and "died", "hung" and "skipped".

    `ops`, `faces`, `dtypes` ("float16", ...): what to check, as `checks.plan` takes them. After a kernel that died or
    hung, the other checks of its op, face and dtype are skipped: their verdict is given. `seconds` limits each check;
    `on_row(row, total)` is called as rows come in; `argv` replaces the process' command line. Whatever is raised in
    here ends the checking process at once, and `report` then holds what was found.
    Raises CannotCheck where the process does not reach the first check.
    """
    report = report or Report()
    which = {"ops": list(ops), "faces": list(faces), "dtypes": list(dtypes)}
    while True:
        wanted = {"device": str(device), "quick": quick, **which, "done": list(report.found)}
        try:
            fault = _watch(argv or command(), wanted, seconds, report, on_row)
            after, skipped = "after the one that ended the process", fault and _group(fault)
        except CannotCheck as error:
            if not report.planned:
                raise
            fault, after, skipped = None, str(error), None  # the rest cannot be checked any more
        if fault is not None:
            _note(report, fault, on_row)
        for check in report.planned:
            if check["id"] not in report.found and skipped in (None, _group(check)):
                _note(report, check | {"status": "skipped", "detail": after}, on_row)
        if len(report.found) == len(report.planned):
            return report.rows


def _note(report: Report, row: dict, on_row: Callable) -> None:
    report.found[row["id"]] = {"ours": None, "theirs": None, "share": None, "seconds": None} | row
    on_row(report.found[row["id"]], len(report.planned))


def _watch(argv, wanted, seconds, report, on_row) -> dict | None:
    """Runs one process to its end or fault: the row of the check that ended it, if one did."""
    env = dict(os.environ)
    home = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [home, env.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=env,
            start_new_session=True,
        )  # fmt: skip
        current, last_word, hung, ended = None, "", False, False
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: what follows says so
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
        finally:  # where something else was raised, its receiver has no time to lose
            code = _end(process, before=10.0 if ended else 0.0, after=30.0 if ended or hung else 5.0)
        last = _last_line(errors)
    if hung:
        how = f"gave no sign for {seconds if last_word else START_SECONDS:.0f} s"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    if current is None:
        raise CannotCheck(f"the process that checks {how}, in no check{last}")
    check, detail = next(c for c in report.planned if c["id"] == current), f"the process {how}{last}"
    if not hung and any(told in last.lower() for told in checks.NO_MEMORY):
        return check | {"status": "no memory", "detail": f"{detail} ({checks.FREE_MEMORY})"}
    if not hung and -code in FROM_OUTSIDE:
        return check | {"status": "environment", "detail": f"{detail} (from outside, or for want of host memory)"}
    return check | {"status": "hung" if hung else "died", "detail": detail}


def _lines(stream: IO[str], start: float, each: float) -> Iterator[tuple[str, Any]]:
    """What a process tells; raises TimeoutError when it is silent for too long, and stops where it ends."""
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
    """Waits `before` seconds for the end of a process, then makes it, and waits `after` seconds; its exit status."""
    try:
        return process.wait(timeout=before)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(timeout=after)
        except subprocess.TimeoutExpired:  # stuck in the driver: nothing kills it, and nobody waits for it
            return -signal.SIGKILL


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


# ---- verdicts ----


def verdicts(rows: Sequence[dict[str, Any]], quick: bool) -> list[Verdict]:
    """One verdict for each op, face and dtype among `rows`."""
    found: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        found.setdefault(_group(row), []).append(row)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = []
    for group, of in found.items():
        faults = [row for row in of if row["status"] in FAULTS]
        open_ = [row for row in of if row["status"] in OPEN]
        status = BAD if faults else UNCHECKED if open_ else GOOD
        checked = sum(row["status"] == "ok" for row in of)
        failure = failure_of(([*faults, *open_] or [None])[0])
        made.append(Verdict(*group, status, quick, checked, failure, now))
    return made


def failure_of(row: dict[str, Any] | None) -> str:
    """A failed row in words: which kernel, with what, and what happened."""
    if row is None:
        return ""
    what = " ".join(filter(None, (row["function"], row["variant"], row["configuration"], row["shape"], row["dtype"])))
    return f"{row['op']} {what} {row['status']}: {row['detail']}"


def quick_verdict(device: torch.device, op: str, face: str, dtype: str) -> Verdict:
    """The verdict of a quick check of one op on one face in one dtype, in a process of its own."""
    none = Verdict(op, face, dtype, UNCHECKED, True, 0)
    try:
        rows = supervise(device, quick=True, ops=(op,), faces=(face,), dtypes=(dtype,))
    except (CannotCheck, OSError) as error:
        no_memory = checks.blame(error)["status"] == "no memory"
        return replace(none, failure=f"{error} ({checks.FREE_MEMORY})" if no_memory else str(error))
    found = verdicts(rows, quick=True)
    return found[0] if found else replace(none, failure=f"there is no check of it for {device}")


# ---- for people ----


def show(rows: Sequence[dict[str, Any]], found: Sequence[Verdict], device: torch.device, console: Any) -> None:
    """Prints every check that failed, a line for each configuration, and the verdicts, on a rich console."""
    from rich.markup import escape
    from rich.table import Table

    described = ", ".join(f"{k} {v}" for k, v in trust.key(device).items() if v and k not in ("device", "interpreted"))
    console.print(f"[bold]{escape(trust.key(device)['device'])}[/bold]  {escape(described)}")
    table = Table(box=None, pad_edge=False)
    for column in ("op", "face", "configuration", "shape", "dtype", "error", "PyTorch's", "of limit", "verdict"):
        table.add_column(column, justify="right" if column in ("error", "PyTorch's", "of limit") else "left")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        function = row["function"] if row["op"] != "conv1d.fused" else ""
        label = f"{row['op']} {function}".strip()
        groups.setdefault((label, row["face"], row["configuration"], row["shape"], row["dtype"]), []).append(row)
    for (op, face, configuration, shape, dtype), of in groups.items():
        bad = next((row for row in of if row["status"] != "ok"), None)
        row = bad or max(of, key=lambda r: r["share"])
        errors = ["" if row[k] is None else f"{row[k]:.1e}" for k in ("ours", "theirs")]
        share = "" if row["share"] is None else f"{100 * row['share']:.0f} %"
        said = "[green]ok[/green]" if bad is None else f"[bold red]{bad['status']}[/bold red]"
        said += "" if bad is None else escape(f" ({bad['variant']})" if bad["variant"] else "")
        table.add_row(op, face, escape(configuration), escape(shape), dtype, *errors, share, said)
    console.print(table)
    for row in rows:
        if row["status"] in FAULTS or row["status"] in ("no memory", "environment"):
            console.print(f"[red]{escape(failure_of(row))}[/red]")
    for verdict in found:
        colour = {GOOD: "green", BAD: "red"}.get(verdict.status, "yellow")
        console.print(
            f"{verdict.op} ({verdict.face}, {verdict.dtype}): [bold {colour}]{verdict.status}[/bold {colour}], "
            f"{verdict.checked} checks passed{', quick' if verdict.quick else ''}"
        )


def main(device: torch.device, *, quick: bool, as_json: bool, cache: bool, dtypes: Sequence[str] = (),
         seconds: float = CHECK_SECONDS, argv: Sequence[str] | None = None) -> int:  # fmt: skip
    """Checks `device`, prints what was found, keeps the verdicts; returns 0 if every check passed, else 1.

    Ended early, by Ctrl-C for one, it prints and keeps what was found until then.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    errors = Console(stderr=True)
    report, finished = Report(), False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("starting", total=None)

            def on_row(row: dict, total: int) -> None:
                what = f"{row['op']} {row['face']} {row['function']}"
                progress.update(task, total=total, advance=1, description=what)

            more = {"seconds": seconds, "on_row": on_row, "argv": argv, "report": report}
            supervise(device, quick=quick, dtypes=dtypes, **more)
        finished = True
    finally:
        rows = report.rows
        found = verdicts(report.decided(), quick)
        if cache and found:
            with trust.locked(trust.LOCK_SECONDS if finished else 2.0):
                trust.keep(device, found)
        if finished or rows:
            _print(rows, found, device, as_json, finished)
    return int(any(row["status"] != "ok" for row in rows))


def _print(rows: list[dict], found: list[Verdict], device: torch.device, as_json: bool, finished: bool) -> None:
    from rich.console import Console

    if as_json:
        report = {"key": trust.key(device), "finished": finished, "verdicts": [vars(v) for v in found], "rows": rows}
        print(json.dumps(report, indent=1))
        return
    show(rows, found, device, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    if not finished:
        print(f"ended early: {len(rows)} checks were made; an op without a verdict above was not checked to its end")
    elif not rows:
        print(f"no kernel of this package runs on {device} here; `jasper-fast info` says how to get them")


if __name__ == "__main__":
    sys.exit(child())
