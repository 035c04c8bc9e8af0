"""The command `jasper-fast selfcheck`: runs the checks, prints the results and saves the verdicts."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jasper_fast.dispatch import verdicts
from jasper_fast.dispatch.probe import CHECK_SECONDS, Report, supervise
from jasper_fast.dispatch.verdict import BAD, GOOD, Verdict, failure_of, judge


def show(rows: Sequence[dict[str, Any]], found: Sequence[Verdict], device: torch.device, console: Console) -> None:
    """Prints to `console`, a rich console: the device; a table, in which the variants of a check share a row; the
    failed checks; and the verdicts."""
    described = ", ".join(
        f"{k} {v}" for k, v in verdicts.key(device).items() if v and k not in ("device", "interpreted")
    )
    console.print(f"[bold]{escape(verdicts.key(device)['device'])}[/bold]  {escape(described)}")
    table = Table(box=None, pad_edge=False)
    for column in ("op", "face", "configuration", "shape", "dtype", "error", "PyTorch's", "of limit", "verdict"):
        table.add_column(column, justify="right" if column in ("error", "PyTorch's", "of limit") else "left")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        op = row["op"] if row["op"] == "conv1d.fused" else f"{row['op']} {row['function']}"
        groups.setdefault((op, row["face"], row["configuration"], row["shape"], row["dtype"]), []).append(row)
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
        if row["status"] not in ("ok", "skipped"):
            console.print(f"[red]{escape(failure_of(row))}[/red]")
    for verdict in found:
        colour = {GOOD: "green", BAD: "red"}.get(verdict.status, "yellow")
        console.print(
            f"{verdict.op} ({verdict.face}, {verdict.dtype}): [bold {colour}]{verdict.status}[/bold {colour}], "
            f"{verdict.checked} checks passed{', quick' if verdict.quick else ''}"
        )


def main(device: torch.device, *, quick: bool, as_json: bool, cache: bool, dtypes: Sequence[str] = (),
         seconds: float = CHECK_SECONDS) -> int:  # fmt: skip
    """Checks `device`, prints the results and, with `cache`, saves the verdicts. Returns 0 if every check passed,
    else 1.

    If it is stopped early, for example by Ctrl-C, it prints and saves the results so far, if there are any, and the
    exception goes on to the caller.
    """
    errors = Console(stderr=True)
    report, finished = Report(), False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("starting", total=None)

            def on_row(row: dict, total: int) -> None:
                progress.update(
                    task, total=total, advance=1, description=f"{row['op']} {row['face']} {row['function']}"
                )

            supervise(device, quick=quick, dtypes=dtypes, seconds=seconds, on_row=on_row, report=report)
        finished = True
    finally:
        rows = report.rows
        found = judge(report.decided(), quick)
        if cache and found:
            with verdicts.locked(verdicts.LOCK_SECONDS if finished else 2.0):
                verdicts.keep(device, found)
        if finished or rows:
            _print(rows, found, device, as_json, finished)
    return int(any(row["status"] != "ok" for row in rows))


def _print(rows: list[dict], found: list[Verdict], device: torch.device, as_json: bool, finished: bool) -> None:
    if as_json:
        told = {"key": verdicts.key(device), "finished": finished, "verdicts": [vars(v) for v in found], "rows": rows}
        print(json.dumps(told, indent=1))
        return
    show(rows, found, device, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    if not finished:
        print(f"stopped early after {len(rows)} checks; an op without a verdict above was not checked completely")
    elif not rows:
        print(f"no kernel of this package runs on {device} here; `jasper-fast info` says how to get one")
