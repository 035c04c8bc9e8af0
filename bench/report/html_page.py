"""Writes one self-contained HTML page from results, and the README's table from the committed results.

`python -m bench report RESULT...` and `python -m bench report --readme`. The markup of the page is in page.html.j2.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from jasper_fast.bench.harness import result_file
from jasper_fast.bench.harness.console import say
from jasper_fast.bench.harness.paths import OUT
from jasper_fast.bench.report import published, readme_table, svg, words
from jasper_fast.bench.report.agreement import agreement
from jasper_fast.bench.report.goals import judge
from jasper_fast.bench.report.terminal import console

HERE = Path(__file__).parent
STYLE = HERE / "page.css"
Lines = list[tuple[str, Sequence[object]]]  # the CSS class and the cells of each row of a table


def main(paths: Sequence[Path], html: Path | None, readme: bool) -> int:
    """Writes the page or the README's table; returns the exit status."""
    if readme:
        return readme_table.write(load(path) for path in paths or sorted(readme_table.COMMITTED.glob("*.json")))
    chosen = list(paths) or newest(OUT)
    if not chosen:
        raise SystemExit("there is no result to report; run python -m bench all first, or give JSON files as arguments")
    results = [load(path) for path in chosen]
    if len(results) == 2 and results[0]["machine"]["name"] == results[1]["machine"]["name"]:
        agreed = agreement(*results)
        for line in (str(agreed), *(f"  no overlap: {row}" for row in agreed.apart)):
            say(line, console)
    target = html or chosen[0].with_suffix(".html")
    target.write_text(page(results))
    say(f"wrote {target}", console)
    return 0


def newest(folder: Path) -> list[Path]:
    """Returns the newest result file in a list, or an empty list if there is none. Skips traces of the profiler and
    results of `data`, which have no rows."""
    results = (path for path in folder.glob("*.json") if not path.name.startswith(("trace_", "data_")))
    return sorted(results, key=lambda p: p.stat().st_mtime)[-1:]


def load(path: Path) -> dict:
    """Returns a result with its path and goals. Raises SystemExit with the reason if the file is not a result."""
    try:
        result = result_file.read(path)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if result["schema"] != result_file.SCHEMA:
        raise SystemExit(f"{path}: not a result of this version of python -m bench; measure again")
    return result | {"path": path, "goals": judge(result["rows"], result["machine"]["device"].split(":")[0])}


def page(results: Sequence[dict]) -> str:
    """Returns the page. Raises SystemExit if Jinja2 is missing."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise SystemExit("the HTML page needs Jinja2: pip install jinja2") from None
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    functions = (
        facts, ratios_of, percentiles_of, longest, beside, in_words, roofs, verdict_lines, memory_lines, plain,
        launch_lines, tuned_lines, part_lines, by_bench, row_lines, all_notes, shared, agreement,
    )  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions} | {
        "words": words,
        "published": published,
        "same": "Jasper 10x5, conv masks on; eager PyTorch of 2020 (20.10-py3 container)",
        "titles": {"kernels": "Kernels", "train": "Training step", "latency": "Inference", "launches": "Launches"},
        "forms": (svg.WIDE, svg.NARROW),
        "style": STYLE.read_text(),
    }
    return environment.get_template("page.html.j2").render(results=results)


# ------------------------------------------------------------------ rows


def side(row: dict) -> str:
    """Returns the CSS class of a row: "ours" or "theirs", or the status of a row without a number."""
    return row["status"] if row["status"] != "ok" else "ours" if row["ours"] else "theirs"


def label(row: dict) -> str:
    """Returns the case of a row as text."""
    units = {"N": "N = {}", "seconds": "{} s", "p": "p = {}", "processes": "processes: {}"}
    return ", ".join(units.get(k, "{}").format(v) for k, v in row["key"].items())


def plain(lines: Iterable[Sequence[str]]) -> Lines:
    """Returns the lines with an empty CSS class."""
    return [("", cells) for cells in lines]


def row_lines(rows: Sequence[dict], shown: Sequence[words.Column]) -> Lines:
    """Returns one line per row, as `words.lines` does. A row without a number has the reason."""
    lines = words.lines(rows, shown, label, lambda row: f"{row['status']}: {row['why']}")
    return [(side(row), cells) for row, cells in lines]


def by_bench(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Returns the rows of each subcommand, except those of `memory`."""
    names = dict.fromkeys(row["bench"] for row in rows if row["bench"] != "memory")
    return {name: [row for row in rows if row["bench"] == name] for name in names}


def all_notes(rows: Sequence[dict]) -> list[str]:
    """Returns the notes to show below the tables of all rows, each once."""
    return list(dict.fromkeys(note for mine in by_bench(rows).values() for note in words.notes(mine)))


def memory_lines(rows: Iterable[dict]) -> Lines:
    """Returns one line per row of `python -m bench memory`."""
    return [line for row in rows if row["bench"] == "memory" for line in row_lines([row], words.MEMORY)]


def launch_lines(rows: Iterable[dict], counted: Sequence[words.Column]) -> Lines:
    """Returns one line per row of `python -m bench launches`: the counts, and the time of the call."""
    return [
        (side(r), [label(r), r["contender"], *(cell(r) for _, cell in counted),
                   words.duration(r["time_s"]["median"]) if "time_s" in r else r["status"]])
        for r in rows if r.get("launches")
    ]  # fmt: skip


def shared(results: Sequence[dict], field: str) -> list[tuple[tuple[str, str, str], list[dict]]]:
    """Returns ((CSS class, case, contender), rows) for each row that has `field` in all results. `rows` has that row of
    every result."""
    by_id = [{r["id"]: r for r in result["rows"] if r["status"] == "ok" and field in r} for result in results]
    both = [[rows[key] for rows in by_id] for key in by_id[0] if all(key in other for other in by_id[1:])]
    return [((side(r[0]), f"{r[0]['bench']}: {label(r[0])}", r[0]["contender"]), r) for r in both]


# ------------------------------------------------------------------ plots


def ratios_of(rows: Iterable[dict], bench: str) -> dict[str, list[tuple]]:
    """Returns, by case, the bars (name, value, low, high) of all rivals that have a ratio."""
    groups: dict[str, list[tuple]] = {}
    for r in (r for r in rows if r["bench"] == bench and "ratio" in r):
        low, high = ("low", "high") if words.known(r["ratio"]) else ("median", "median")
        groups.setdefault(label(r), []).append((r["contender"], *(r["ratio"][k] for k in ("median", low, high))))
    return groups


def percentiles_of(rows: Iterable[dict]) -> dict[str, list[tuple]]:
    """Returns, by case, for every contender: its name, whether it is ours, its percentiles in ms, all percentiles as
    text, and the first and last as text."""
    groups: dict[str, list[tuple]] = {}
    for r in (row for row in rows if row["bench"] == "latency" and row["status"] == "ok"):
        seconds = {p.upper(): words.quantile(r, p) for p in ("p50", "p90", "p95", "p99")}
        ms = {name: 1e3 * v for name, v in seconds.items() if v is not None}
        shown = [f"{v:.4g}" if v < 1000 else f"{v:.0f}" for v in ms.values()]
        numbers = ", ".join(f"{name} {text} ms" for name, text in zip(ms, shown, strict=True))
        ends = " to ".join(dict.fromkeys((shown[0], shown[-1])))
        groups.setdefault(label(r), []).append((r["contender"], r["ours"], list(ms.values()), numbers, f"{ends} ms"))
    return groups


def longest(groups: dict[str, list[tuple]]) -> float:
    """Returns the largest value that a plot shows: the end of an interval, the mark at 1, or a percentile."""
    return max(entry[2][-1] if len(entry) == 5 else max(entry[3], 1.0) for group in groups.values() for entry in group)


def roofs(result: dict) -> dict[str, functools.partial]:
    """Returns, by dtype, the function that lays out the roofline plot. It shows the rate of each row and the measured
    ceilings of the machine. Our dots are drawn last, over the others."""
    plots, limits = {}, result["limits"]
    for dtype, rate in limits.get("matmul_flops_per_s", {}).items():
        points = [
            (f"{r['contender']}: {label(r)}", r["flops"] / r["bytes"], r["flops_per_s"], r["ours"])
            for r in sorted(result["rows"], key=lambda r: r["ours"])
            if r["status"] == "ok" and r["dtype"] == dtype and r.get("flops_per_s") and r["bytes"]
        ]
        if points:
            plots[dtype] = functools.partial(svg.roofline, points, rate, limits["copy_bytes_per_s"])
    return plots


# ------------------------------------------------------------------ the machine, and the state of its kernels


def facts(result: dict) -> dict[str, object]:
    """Returns the facts about a run, by name: machine, versions, command and measured limits, as text."""
    m, limits = result["machine"], result["limits"]
    about = {"machine": m["name"], "instructions": ", ".join(m["cpu"]["isa"]), "threads": m["threads"]}
    if m["load_average"]:
        about["load before the run"] = f"{m['load_average'][0]:.1f} on {m['cpu']['cores']} cores"
    if gpu := m["gpu"]:
        about["GPU"] = f"{gpu['capability']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}, CUDA {m['cuda']}"
        if before := gpu.get("clocks_at_start"):
            about["clocks before the run"] = state(before)
    if after := limits.get("clocks"):
        about["clocks after load"] = state(after)
    about |= {
        "versions": f"Python {m['python']}, " + ", ".join(f"{k} {v}" for k, v in m["packages"].items()),
        "commit": f"{m['commit']}{' with local changes' if m['dirty'] else ''}",
        "date": m["date"],
        "command": m["command"],
    }
    if limits:
        rates = ", ".join(f"{k} {words.per_second(v, 'FLOP')}" for k, v in limits["matmul_flops_per_s"].items())
        if m["gpu"] and "float32_mode" in limits:
            rates += (
                f" (the limit of float32 rows is the rate in {limits['float32_mode']}, the precision of their convs)"
            )
        copy, launch = words.per_second(limits["copy_bytes_per_s"], "B"), words.duration(limits["launch_s"]["host"])
        about["measured limits"] = f"matrix product {rates}; copy {copy}; launch {launch}"
    return about


GPU_STATE = {"sm_mhz": "SM {} MHz", "memory_mhz": "memory {} MHz", "temperature_c": "{} °C", "power_w": "{:.0f} W"}


def state(clocks: dict) -> str:
    """Returns the readings of `machine.clocks` as text. `held_by` has the reasons why a GPU lowered its clock."""
    if "sm_mhz" in clocks:
        readings = [text.format(clocks[name]) for name, text in GPU_STATE.items() if name in clocks]
        return ", ".join(readings + [f"held by {why}" for why in clocks.get("held_by", ())])
    mhz = ", ".join(map(str, clocks.get("cpu_mhz", ())))
    degrees = f"{clocks['temperature_c']:.0f} °C" if "temperature_c" in clocks else ""
    return "; ".join(filter(None, [mhz and f"{mhz} MHz", degrees]))


def verdict_lines(result: dict) -> Lines:
    """Returns one line per verdict of the self-check. Bad verdicts have the reason."""
    return [
        ("" if v["status"] == "good" else "wrong", (v["op"], v["face"],
         f"{v['status']}{', a quick check' if v.get('quick') else ''}", v.get("checked", ""), v.get("failure") or ""))
        for v in result.get("selfcheck", {}).get("verdicts", ())
    ]  # fmt: skip


def tuned_lines(result: dict) -> Lines:
    """Returns one line per row of the tuned table: the fastest configuration of a face at a shape."""
    lines = []
    for row in result.get("table", {}).get("rows", ()):
        shape = f"{row['c_in']} to {row['c_out']}, K = {row['taps']}"
        shape += "".join(f", {k} {row[k]}" for k in ("stride", "dilation") if row[k] != 1)
        tile = ", ".join(f"{k} {v}" for k, v in (row.get("tile") or {}).items())
        time = words.duration(row["time_s"])
        lines.append(("", (row["op"], shape, row["dtype"], f"2^{row['rows_log2']}", row["face"], tile, time)))
    return lines


def part_lines(result: dict) -> Lines:
    """Returns one line per part of `python -m bench gpu`, with how it ended."""
    return [
        ("" if how == "finished" else "absent", (title, how)) for title, how in result.get("parts", {}).items()
    ]  # fmt: skip


# ------------------------------------------------------------------ comparison with published numbers


def beside(result: dict) -> list[dict]:
    """Returns tables with jasper_fast's and eager's numbers beside those that NVIDIA published: latencies for the same
    batch size and length, and training for the same batch size."""
    found = [latency_beside(result, dtype) for dtype in ("float16", "bfloat16", "float32")]
    lines = []
    for key, rows in ours_and_eager(result["rows"], "train", mode="step").items():
        case = dict(key)
        N, _, T = (int(v) for v in case["batch"].strip("()").split(","))
        theirs = [(gpu, rate) for gpu, gpus, rate in published.training(N, case["dtype"]) if gpus == 1]
        here = [f"{rows[name]['items_per_s']:.1f}" if name in rows else "" for name in ("jasper_fast", "eager")]
        lines.append((f"N = {N}, {T} frames, {case['dtype']}", here, theirs))
    return [table for table in (*found, {"lines": lines}) if table["lines"]]


def ours_and_eager(rows: Iterable[dict], bench: str, **key: object) -> dict[tuple, dict[str, dict]]:
    """Returns the timed rows of Jasper 10x5 that match `key`, by case and contender."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        timed = row["bench"] == bench and row["status"] == "ok" and "scaling" not in row
        matches = all(row["key"].get(k) == v for k, v in ({"model": "jasper10x5"} | key).items())
        if timed and matches and row["contender"] in ("jasper_fast", "eager"):
            cases.setdefault(tuple(row["key"].items()), {})[row["contender"]] = row
    return cases


def latency_beside(result: dict, dtype: str) -> dict:
    """Returns the table of percentiles by (N, seconds): ours, eager's on this machine, and those published for each
    GPU."""
    lines, elsewhere = [], published.latency(dtype)
    cases = ours_and_eager(result["rows"], "latency", path="acoustic model", dtype=dtype)
    for key, rows in cases.items():
        at = (dict(key)["N"], dict(key)["seconds"])
        if any(at in found for found in elsewhere.values()):
            here = []
            for row in (rows.get(name) for name in ("jasper_fast", "eager")):
                seconds = [words.quantile(row, q) for q in ("mean", "p90", "p95", "p99")] if row else []
                here.append(in_words([None if v is None else 1e3 * v for v in seconds]))
            there = [in_words(found.get(at)) for found in elsewhere.values()]
            lines.append((f"N = {at[0]}, {at[1]} s", here + there))
    return {
        "dtype": dtype,
        "theirs": "FP16" if elsewhere is published.LATENCY_FP16 else "TF32 on the A100, FP32 on the others",
        "gpus": list(elsewhere),
        "lines": lines,
        "few": words.few((row for rows in cases.values() for row in rows.values()), ("p90", "p95", "p99")),
    }


def in_words(milliseconds: Sequence[float | None] | None) -> list[str]:
    """Returns the values as text, with a dash where there are too few samples."""
    return [words.DASH if v is None else f"{v:.1f}" if v < 1000 else f"{v:.0f}" for v in milliseconds or ()]
