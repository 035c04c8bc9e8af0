"""The table of fastest choices in a result of `python -m bench tune`: makes, installs and summarises it."""

from pathlib import Path

from jasper_fast.bench.cases.cells import work
from jasper_fast.bench.harness import result_file
from jasper_fast.bench.harness.console import say
from jasper_fast.bench.harness.ratios import summary as summary_of
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.report import terminal, words
from jasper_fast.kernels import tables
from jasper_fast.kernels.tables import Cell

PLAIN = ("aten library", "reference library")  # contenders that are plain PyTorch


def case_id(cell: Cell) -> str:
    """Returns the name of the cell (an op at a shape, in one dtype) in the rows of a result."""
    return "tune " + " ".join(map(str, cell))


def shape_of(cell: Cell) -> str:
    """Returns the shape at which a cell is timed, as text for messages."""
    n, frames = cell.batch
    if cell.op in tables.NORM_OPS:
        return f"({n}, {cell.c_in}, {frames})"
    shape = f"({n}, {cell.c_in}->{cell.c_out}, {frames}) K {cell.taps}"
    return shape + f" s {cell.stride}" * (cell.stride > 1) + f" d {cell.dilation}" * (cell.dilation > 1)


def rows_of(cell: Cell, found: dict) -> list[dict]:
    """Returns the rows of a tuned cell, one per contender. Rows without a number have the reason."""
    flops, nbytes = work(cell)
    row = {
        "bench": "tune", "key": {"op": cell.op, "shape": shape_of(cell), "dtype": cell.dtype}, "dtype": cell.dtype,
        "flops": flops, "bytes": nbytes, "clock": "events",
    }  # fmt: skip
    best = next((name for name in found["timed"] if name not in PLAIN), None)
    made = []
    for name, choice in found["timed"].items():
        spent = summary_of(found["samples"][name], 1)
        rates = {f"{kind}_per_s": row[kind] / spent["median"] for kind in ("flops", "bytes") if row[kind]}
        tuned = {k: v for k, v in choice.items() if k != "time_s"}
        made.append({"contender": name, "ours": name == best, "status": "ok", "time_s": spent, "tune": tuned} | rates)
    made += [
        {"contender": name, "ours": False, "status": "wrong" if why.startswith("wrong") else "failed", "why": why}
        for name, why in found["refused"].items()
    ]
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
    timed = [tables.Row(**row["tune"], time_s=row["time_s"]["median"]) for row in rows if row["status"] == "ok"]
    best = {row.key: row for row in sorted(timed, key=lambda row: row.time_s, reverse=True)}
    return [best[key] for key in dict.fromkeys(row.key for row in timed)]


def table_header(data: dict) -> dict[str, str]:
    """Returns the header of a table, which says where its numbers come from."""
    machine = data["machine"]
    gpu = machine["gpu"] or {"name": machine["name"], "capability": "sm_00", "driver": "none"}
    return {
        "gpu": gpu["name"],
        "capability": gpu["capability"],
        "multiprocessors": str(gpu.get("sm_count", "unknown")),
        "bandwidth": gpu.get("bandwidth", "unknown"),
        "driver": gpu["driver"] or "unknown",
        "torch": machine["packages"]["torch"],
        "triton": machine["packages"]["triton"],
        "commit": (machine["commit"] or "unknown") + ("-dirty" if machine["dirty"] else ""),
        "command": machine["command"],
        "date": machine["date"],
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
    kept = old.rows if old is not None else ()
    if old is not None and any(old.header[k] != new.header[k] for k in ("driver", "torch", "triton")):
        say(f"dropped {len(kept)} rows that were measured with another driver, torch or Triton")
        kept = ()
    rows = {row.key: row for row in (*kept, *new.rows)}
    target = tables.folder() / f"{tables.slug(new.header['gpu'])}.json"
    tables.write(target, new.header, rows.values())
    say(f"wrote {len(rows)} rows, {len(new.rows)} of them new, to {target}; now run `jasper-fast selfcheck`")
    return 0


def _table_of(path: Path) -> tables.Table:
    """Returns the table of a result. Raises TableError if the file has no table that was measured on a GPU."""
    try:
        data = result_file.read(path)
    except ValueError as error:
        raise tables.TableError(str(error)) from None
    if data["command"] != "tune" or not data.get("table"):
        raise tables.TableError(f"{path}: not a result of `python -m bench tune`; run that first")
    if data["machine"]["gpu"] is None:
        raise tables.TableError(
            f"{path}: this was measured on a CPU, in Triton's interpreter; install the result of a GPU"
        )
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
        key, timed = of_case[0]["key"], [r for r in of_case if r["status"] == "ok"]
        plain = next((r for r in timed if r["contender"] in PLAIN), None)
        ours = [r for r in timed if r["contender"] not in PLAIN]
        if not ours:
            shown.add_row(key["op"], key["shape"], "none", style="red")
            continue
        best = min(ours, key=lambda r: r["time_s"]["median"])
        spent = best["time_s"]["median"]
        kind, unit = ("bytes", "B") if key["op"] in tables.NORM_OPS else ("flops", "FLOP")
        shown.add_row(
            key["op"],
            key["shape"],
            best["contender"].removesuffix(" direct").removeprefix("triton "),
            words.duration(spent),
            words.per_second(best[kind] / spent, unit),
            f"{plain['time_s']['median'] / spent:.2f}" if plain else "",
        )
    terminal.console.print(shown)
    terminal.without_number(rows)
    say(f"wrote {run.results.path}", terminal.console)
    if run.device.type == "cuda":
        say(f"to use it on this GPU: python -m bench tune --install {run.results.path}", terminal.console)
