"""Supervises the self-check: runs the kernels in a child process, and finds the check that crashes or hangs it.

A kernel that crashes or never ends must not break the user's process or its CUDA context. So `supervise` starts `python
-m jasper_fast.selfcheck.child`, which writes one line when a check begins and one when it ends. If the child dies, or
writes nothing for too long, the check that had begun is at fault, unless memory ran out or a signal came from outside.
A new child then does the remaining checks. If `supervise` is interrupted, its `Report` has the results so far.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from jasper_fast.dispatch import children, verdict
from jasper_fast.dispatch.verdict import FAULTS, UNCHECKED, Verdict, group_of, judge

COMMAND = (sys.executable, "-W", "ignore", "-m", "jasper_fast.selfcheck.child")
CHECK_SECONDS = 180.0  # time limit of one check, including compilation


class CannotCheck(RuntimeError):
    """Nothing could be checked, because the child process ended outside any check. The message says why."""


@dataclass
class Report:
    """The results of a self-check so far: the `planned` checks, and `found`, the rows of finished checks by id."""

    planned: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in the order of the plan."""
        return [self.found[check["id"]] for check in self.planned if check["id"] in self.found]

    def decided(self) -> list[dict[str, Any]]:
        """Returns the rows of each op, face and dtype whose verdict is certain, because all its checks are finished or
        one of them has failed."""
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
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """Performs all checks for `device` in child processes, and returns their rows. The status of a row is one of those
    of `perform.perform`, or "died", "hung" or "skipped".

    `ops`, `faces`, `dtypes` ("float16", ...): what to check, as in `checks.plan`. If a check ends or hangs its process,
    the other checks of the same op, face and dtype are skipped. If the process ends between two checks, all remaining
    checks are skipped. `seconds` limits each check. `on_row(row, total)` is called for each new row. If an exception
    such as KeyboardInterrupt ends this function, the child is killed, and `report` has the results so far. Raises
    CannotCheck if the child ends before it has listed its checks.
    """
    report = report or Report()
    wanted = {"device": str(device), "quick": quick, "ops": list(ops), "faces": list(faces), "dtypes": list(dtypes)}
    while True:
        try:
            fault = _watch(wanted | {"done": list(report.found)}, seconds, report, on_row)
            after = "the process ended or hung in an earlier check of this op, face and dtype"
            skipped = fault and group_of(fault)
            if fault is not None:
                _note(report, fault, on_row)
        except CannotCheck as error:
            if not report.planned:
                raise
            after, skipped = str(error), None  # the remaining checks cannot be made
        for check in report.planned:
            if check["id"] not in report.found and skipped in (None, group_of(check)):
                _note(report, check | {"status": "skipped", "detail": after}, on_row)
        if len(report.found) == len(report.planned):
            return report.rows


def _note(report: Report, row: dict, on_row: Callable) -> None:
    report.found[row["id"]] = {"ours": None, "theirs": None, "share": None, "seconds": None} | row
    on_row(report.found[row["id"]], len(report.planned))


def _watch(wanted, seconds, report, on_row) -> dict | None:
    """Runs one child process until it ends. Returns the row of the check that ended it, or None if all checks ran."""
    current = fault = None

    def hear(kind: str, value: Any) -> bool:
        nonlocal current, fault
        if kind == "plan":
            report.planned = value
        elif kind == "begin":
            current = value
        elif kind == "result":
            _note(report, value, on_row)
            current = None
        elif kind == "fatal":
            fault = value
        return kind in ("fatal", "end")

    ended = children.talk(COMMAND, wanted, hear, seconds)
    if ended.told:
        return fault
    if current is None:
        raise CannotCheck(f"the process that checks the kernels {ended.how} outside any check{ended.last}")
    check, detail = next(c for c in report.planned if c["id"] == current), f"the process {ended.how}{ended.last}"
    if not ended.hung and any(said in ended.last.lower() for said in verdict.NO_MEMORY):
        return check | {"status": "no memory", "detail": f"{detail} ({verdict.FREE_MEMORY})"}
    if ended.from_outside:
        return check | {"status": "environment", "detail": f"{detail} (from outside, or because host memory ran out)"}
    return check | {"status": "hung" if ended.hung else "died", "detail": detail}


def quick_verdict(device: torch.device, op: str, face: str, dtype: str) -> Verdict:
    """Checks one op on one face in one dtype quickly, in a child process, and returns the verdict."""
    none = Verdict(op, face, dtype, UNCHECKED, True, 0)
    try:
        rows = supervise(device, quick=True, ops=(op,), faces=(face,), dtypes=(dtype,))
    except (CannotCheck, OSError) as error:
        hint = f" ({verdict.FREE_MEMORY})" if verdict.blame(error)["status"] == "no memory" else ""
        return replace(none, failure=f"{error}{hint}")
    found = judge(rows, quick=True)
    return found[0] if found else replace(none, failure=f"there is no check of it for {device}")
