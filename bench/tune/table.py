"""The table in a result of `python -m bench tune`: its rows, its header, its installation, and a summary."""

import json
from pathlib import Path

from jasper_fast.bench.cases.cells import work
from jasper_fast.bench.harness.console import say
from jasper_fast.bench.harness.ratios import summary as summary_of
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.report import terminal, words
from jasper_fast.kernels import tables
from jasper_fast.kernels.tables import Cell

PLAIN = ("aten library", "reference library")  # contenders that are plain PyTorch


def case_id(cell: Cell) -> str:
    """Returns the name of the cell in the rows of a result."""
    return "tune " + " ".join(map(str, cell))


def shape_of(cell: Cell) -> str:
    """Returns the shape on which a cell is timed, for messages."""
    n, frames = cell.batch
    if cell.op in tables.NORM_OPS:
        return f"({n}, {cell.c_in}, {frames})"
    more = "".join(f" {k[0]} {getattr(cell, k)}" for k in ("stride", "dilation") if getattr(cell, k) > 1)
    return f"({n}, {cell.c_in}->{cell.c_out}, {frames}) K {cell.taps}{more}"


def rows_of(cell: Cell, found: dict) -> list[dict]:
    """Returns the rows of a tuned cell, one per contender. Rows without a number have the reason."""
    flops, nbytes = work(cell)
    key = {"op": cell.op, "shape": shape_of(cell), "dtype": cell.dtype}
    row = {"bench": "tune", "key": key, "dtype": cell.dtype}
    row |= {"flops": flops, "bytes": nbytes, "clock": "events"}
    best = next((name for name in found["timed"] if name not in PLAIN), None)
    made = []
    for name, of in found["timed"].items():
        spent = summary_of(found["samples"][name], 1)
        rates = {f"{kind}_per_s": row[kind] / spent["median"] for kind in ("flops", "bytes") if row[kind]}
        told = {k: v for k, v in of.items() if k != "time_s"}
        made.append({"contender": name, "ours": name == best, "status": "ok", "time_s": spent, "tune": told} | rates)
    for name, why in found["refused"].items():
        status = "wrong" if why.startswith("wrong") else "failed"
        made.append({"contender": name, "ours": False, "status": status, "why": why})
    return [row | {"id": f"{case_id(cell)} / {of['contender']}"} | of for of in made]


def put_table(run: Run) -> None:
    """Makes the table from the rows of the result, checks it, adds it to the result, and writes the result file."""
    found = {
        "header": table_header(run.results.data),
        "rows": [row.plain() for row in winners(run.results.data["rows"])],
    }
    tables.parse(found, "the table of this run")
    run.results.data["table"] = found
    run.results.write()


def winners(rows: list[dict]) -> list[tables.Row]:
    """Returns the fastest correct configuration for each key of the table."""
    best: dict[tuple, tables.Row] = {}
    for row in rows:
        if row["status"] == "ok":
            made = tables.Row(**row["tune"], time_s=row["time_s"]["median"])
            if made.key not in best or made.time_s < best[made.key].time_s:
                best[made.key] = made
    return list(best.values())


def table_header(data: dict) -> dict[str, str]:
    """Returns the header of a table, which says where its numbers come from."""
    of, gpu = data["machine"], data["machine"]["gpu"]
    return {
        "gpu": gpu["name"] if gpu else of["name"],
        "capability": gpu["capability"] if gpu else "sm_00",
        "multiprocessors": str((gpu or {}).get("sm_count", "unknown")),
        "bandwidth": (gpu or {}).get("bandwidth", "unknown"),
        "driver": (gpu["driver"] or "unknown") if gpu else "none",
        "torch": of["packages"]["torch"],
        "triton": of["packages"]["triton"],
        "commit": (of["commit"] or "unknown") + ("-dirty" if of["dirty"] else ""),
        "command": of["command"],
        "date": of["date"],
    }


def install(path: Path) -> int:
    """Merges the table of a result into the committed table of its GPU; returns the exit status.

    If the committed rows are from other versions of driver, torch or Triton, they are dropped.
    """
    try:
        new = _table_of(path)
        old = tables.for_gpu(new.header["gpu"])
    except tables.TableError as error:
        say(str(error))
        return 1
    rows = {row.key: row for row in new.rows}
    if old is not None:
        same = all(old.header[k] == new.header[k] for k in ("driver", "torch", "triton"))
        rows = ({row.key: row for row in old.rows} if same else {}) | rows
        if not same:
            say(f"dropped {len(old.rows)} rows that were measured with another driver, torch or Triton")
    target = tables.folder() / f"{tables.slug(new.header['gpu'])}.json"
    tables.write(target, new.header, rows.values())
    say(f"wrote {len(rows)} rows, {len(new.rows)} of them new, to {target}; now run `jasper-fast selfcheck`")
    return 0


def _table_of(path: Path) -> tables.Table:
    """Returns the table of a result. Raises TableError if the file has no table that was measured on a GPU."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise tables.TableError(f"{path}: cannot be read: {error}") from None
    if data.get("command") != "tune" or not data.get("table"):
        raise tables.TableError(f"{path}: not a result of `python -m bench tune`; run that first")
    if data["machine"]["gpu"] is None:
        why = "this was measured on a CPU, in Triton's interpreter; install the result of a GPU"
        raise tables.TableError(f"{path}: {why}")
    return tables.parse(data["table"], f"{path}: table")


def summary(run: Run, done: int, of: int) -> None:
    """Prints the fastest configurations compared with plain PyTorch, and the contenders without a number."""
    rows = run.results.data["rows"]
    headings = ("op", "shape", "fastest of ours", "time", "rate", "PyTorch / ours")
    shown = terminal.table(f"tune: {done} of {of} cases", headings, 3)
    by_case: dict[str, list[dict]] = {}
    for row in rows:
        by_case.setdefault(row["id"].rsplit(" / ", 1)[0], []).append(row)
    for of_case in by_case.values():
        right = {r["contender"]: r for r in of_case if r["status"] == "ok"}
        ours = min((r for n, r in right.items() if n not in PLAIN), key=lambda r: r["time_s"]["median"], default=None)
        plain = next((r for n, r in right.items() if n in PLAIN), None)
        key = of_case[0]["key"]
        if ours is None:
            shown.add_row(key["op"], key["shape"], "none", "", "", "", style="red")
            continue
        spent = ours["time_s"]["median"]
        beside = f"{plain['time_s']['median'] / spent:.2f}" if plain else ""
        by_bytes = key["op"] in tables.NORM_OPS
        rate = words.per_second(ours["bytes" if by_bytes else "flops"] / spent, "B" if by_bytes else "FLOP")
        name = ours["contender"].removesuffix(" direct").removeprefix("triton ")
        shown.add_row(key["op"], key["shape"], name, words.duration(spent), rate, beside)
    terminal.console.print(shown)
    terminal.without_number(rows)
    terminal.console.print(f"wrote {run.results.path}")
    if run.device.type == "cuda":
        terminal.console.print(f"to use it on this GPU: python -m bench tune --install {run.results.path}")
