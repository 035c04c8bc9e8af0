"""Runs the self-check on this device and saves its verdicts, for dispatch and in the result."""

import time
from collections.abc import Sequence

from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.run import Run
from jasper_fast.dispatch import probe, verdict, verdicts
from jasper_fast.selfcheck import checks


def selfcheck(run: Run, *, quick: bool, **which: tuple[str, ...]) -> None:
    """Runs `jasper-fast selfcheck` for this device and saves its verdicts.

    `which`: the `ops`, `faces` and `dtypes` to check (default: all). If the time runs out, the verdicts so far are
    saved.
    """
    started, report = time.monotonic(), probe.Report()
    try:
        probe.supervise(run.device, quick=quick, report=report, **which)
    finally:
        keep_verdicts(run, report.decided(), quick, time.monotonic() - started)


def keep_verdicts(run: Run, rows: Sequence[dict], quick: bool, seconds: float) -> None:
    """Saves the verdicts from the rows of a self-check, for dispatch and in the result."""
    found = verdict.judge(rows, quick)
    with verdicts.locked():
        verdicts.keep(run.device, found)
    bad = [verdict.failure_of(row) for row in rows if row["status"] != "ok"]
    kept = run.results.data.setdefault("selfcheck", {"seconds": 0.0, "verdicts": [], "failures": []})
    kept["seconds"] = round(kept["seconds"] + seconds, 1)
    kept["verdicts"] = list({group(v): v for v in [*kept["verdicts"], *map(vars, found)]}.values())  # the latest ones
    kept["failures"] += [line for line in bad if line not in kept["failures"]]
    for line in bad[:5]:
        console.print(f"self-check: {line}", style="red")
    run.results.write()


def group(row: dict) -> tuple[str, str, str]:
    """Returns the op, the face (the op's implementation) and the dtype of a verdict."""
    return row["op"], row["face"], row["dtype"]


def selfcheck_in_full(run: Run) -> None:
    """Runs the full check of all kernels that have not had one yet, beginning with those in the run's dtype."""
    kept = run.results.data.get("selfcheck", {}).get("verdicts", ())
    done = {group(v) for v in kept if not v["quick"]}
    left = [c for c in checks.plan(run.device) if (c.op, c.face, c.dtype) not in done]
    for dtype in sorted({c.dtype for c in left}, key=lambda dtype: (dtype != run.dtype_name, dtype)):
        selfcheck(run, quick=False, ops=tuple(dict.fromkeys(c.op for c in left if c.dtype == dtype)), dtypes=(dtype,))
