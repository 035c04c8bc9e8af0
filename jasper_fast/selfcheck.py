"""`jasper-fast selfcheck`: the checks of checks.py, run in a process of their own, and what they say of each kernel.

A kernel that crashes, or that never ends, must not take the user's process or its CUDA context with it, and must be
named. So `supervise` starts `python -m jasper_fast.selfcheck`, which says what it begins and what it found, a line
each; when that process dies or falls silent, the check it was in is at fault, and another process does the rest.
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
from pathlib import Path
from typing import IO, Any

import torch

from jasper_fast import checks, trust
from jasper_fast.trust import BAD, GOOD, UNCHECKED, Verdict

MARK = "jasper-fast-selfcheck "  # begins a line of the protocol: a kernel may print what it likes
CHECK_SECONDS = 180.0  # for one check, its compilation included
START_SECONDS = 120.0  # for the interpreter, torch and the device
FAULTS = ("wrong", "failed", "died", "hung")


class CannotCheck(RuntimeError):
    """The check could not be made: its process did not reach the first kernel. The message says why."""


# ---- the process that runs kernels ----


def child(source: IO[str] = sys.stdin) -> int:
    """Reads what to check as JSON from `source`, checks it, and reports on the standard output."""
    wanted = json.loads(source.read())
    device = torch.device(wanted["device"])
    todo = checks.plan(device, quick=wanted["quick"], ops=tuple(wanted["ops"]), faces=tuple(wanted["faces"]))
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
            _tell("fatal", row | {"status": "died", "detail": str(error).splitlines()[0]})
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


def supervise(
    device: torch.device,
    *,
    quick: bool = False,
    ops: Sequence[str] = checks.OPS,
    faces: Sequence[str] = (),
    seconds: float = CHECK_SECONDS,
    on_row: Callable[[dict, int], None] = lambda row, total: None,
    argv: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The rows of all checks for `device`: statuses of `checks.perform`, and "died", "hung" and "skipped".

    After a kernel that died or hung, the other checks of its op and face are skipped: their verdict is given. `seconds`
    limits each check; `on_row(row, total)` is called as rows come in; `argv` replaces the process' command line.
    Raises CannotCheck where the process does not reach the first check.
    """
    rows: dict[str, dict[str, Any]] = {}
    planned: list[dict] = []
    while True:
        wanted = {"device": str(device), "quick": quick, "ops": list(ops), "faces": list(faces), "done": list(rows)}
        try:
            planned, fault = _watch(argv or command(), wanted, seconds, rows, on_row)
            after, skipped = "after the one that ended the process", fault and (fault["op"], fault["face"])
        except CannotCheck as error:
            if not planned:
                raise
            fault, after, skipped = None, str(error), None  # the rest cannot be checked any more
        if fault is not None:
            _note(rows, fault, on_row, len(planned))
        for check in planned:
            if check["id"] not in rows and skipped in (None, (check["op"], check["face"])):
                _note(rows, check | {"status": "skipped", "detail": after}, on_row, len(planned))
        if len(rows) == len(planned):
            return [rows[check["id"]] for check in planned]


def _note(rows: dict, row: dict, on_row: Callable, total: int) -> None:
    rows[row["id"]] = {"ours": None, "theirs": None, "share": None, "seconds": None} | row
    on_row(rows[row["id"]], total)


def _watch(argv, wanted, seconds, rows, on_row) -> tuple[list[dict], dict | None]:
    """Runs one process to its end or fault: (the plan, the row of the check that ended it, if one did)."""
    env = dict(os.environ)
    home = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [home, env.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=env,
            start_new_session=True,
        )  # fmt: skip
        planned, current, last_word, hung = [], None, "", False
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: what follows says so
                process.stdin.write(json.dumps(wanted))
                process.stdin.close()
            for kind, value in _lines(process.stdout, START_SECONDS, seconds):
                last_word = kind
                if kind == "plan":
                    planned = value
                elif kind == "begin":
                    current = value
                elif kind == "result":
                    _note(rows, value, on_row, len(planned))
                    current = None
                elif kind == "fatal":
                    return planned, value
                else:
                    return planned, None
        except TimeoutError:
            hung = True
        finally:
            code = _end(process, patient=not hung)
        last = _last_line(errors)
    if hung:
        how = f"gave no sign for {seconds if last_word else START_SECONDS:.0f} s"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    if current is None:
        raise CannotCheck(f"the process that checks {how}, in no check{last}")
    check = next(c for c in planned if c["id"] == current)
    if not hung and "out of memory" in last:
        return planned, check | {"status": "no memory", "detail": f"the process {how}{last}"}
    return planned, check | {"status": "hung" if hung else "died", "detail": f"the process {how}{last}"}


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


def _end(process: subprocess.Popen, patient: bool) -> int:
    """Waits for the end of a process that has said all, or makes it; its exit status."""
    try:
        return process.wait(timeout=10 if patient else 0)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # stuck in the driver: nothing kills it, and nobody waits for it
            return -signal.SIGKILL


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


# ---- verdicts ----


def verdicts(rows: Sequence[dict[str, Any]], quick: bool) -> list[Verdict]:
    """One verdict for each op and face among `rows`."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["op"], row["face"]), []).append(row)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = []
    for (op, face), of in found.items():
        faults = [row for row in of if row["status"] in FAULTS]
        open_ = [row for row in of if row["status"] in ("no memory", "skipped")]
        status = BAD if faults else UNCHECKED if open_ else GOOD
        checked = sum(row["status"] == "ok" for row in of)
        failure = failure_of(([*faults, *open_] or [None])[0])
        made.append(Verdict(op, face, status, quick, checked, failure, now))
    return made


def failure_of(row: dict[str, Any] | None) -> str:
    """A failed row in words: which kernel, with what, and what happened."""
    if row is None:
        return ""
    what = " ".join(filter(None, (row["function"], row["variant"], row["configuration"], row["shape"], row["dtype"])))
    return f"{row['op']} {what} {row['status']}: {row['detail']}"


def quick_verdict(device: torch.device, op: str, face: str) -> Verdict:
    """The verdict of a quick check of one op on one face, in a process of its own."""
    try:
        rows = supervise(device, quick=True, ops=(op,), faces=(face,))
    except (CannotCheck, OSError) as error:
        return Verdict(op, face, UNCHECKED, True, 0, str(error))
    found = verdicts(rows, quick=True)
    return found[0] if found else Verdict(op, face, UNCHECKED, True, 0, f"there is no check of it for {device}")


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
        if row["status"] in FAULTS or row["status"] == "no memory":
            console.print(f"[red]{escape(failure_of(row))}[/red]")
    for verdict in found:
        colour = {GOOD: "green", BAD: "red"}.get(verdict.status, "yellow")
        console.print(
            f"{verdict.op} ({verdict.face}): [bold {colour}]{verdict.status}[/bold {colour}], "
            f"{verdict.checked} checks passed{', quick' if verdict.quick else ''}"
        )


def main(device: torch.device, *, quick: bool, as_json: bool, cache: bool, seconds: float = CHECK_SECONDS,
         argv: Sequence[str] | None = None) -> int:  # fmt: skip
    """Checks `device`, prints what was found, keeps the verdicts; returns 0 if every check passed, else 1."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def on_row(row: dict, total: int) -> None:
            progress.update(task, total=total, advance=1, description=f"{row['op']} {row['face']} {row['function']}")

        rows = supervise(device, quick=quick, seconds=seconds, on_row=on_row, argv=argv)
    found = verdicts(rows, quick)
    if cache:
        with trust.locked():
            trust.keep(device, found)
    if as_json:
        report = {"key": trust.key(device), "verdicts": [vars(v) for v in found], "rows": rows}
        print(json.dumps(report, indent=1))
    else:
        show(rows, found, device, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
        if not rows:
            print(f"no kernel of this package runs on {device} here; `jasper-fast info` says how to get them")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(child())
