"""One self-contained HTML page from results, and the README's table from the committed ones.

`python -m bench report RESULT...`, `python -m bench report --readme`
"""

import functools
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from jasper_fast.bench.harness.paths import OUT
from jasper_fast.bench.report import readme_table, svg, tables
from jasper_fast.bench.report.agreement import agreement
from jasper_fast.bench.report.goals import judge
from jasper_fast.bench.report.markup import grid, label, plot, side
from jasper_fast.bench.report.report_published import beside_published, references

PERCENTILES = ("p50", "p90", "p95", "p99")
STYLE = Path(__file__).parent / "page.css"
TITLES = {"kernels": "Kernels", "train": "Training step", "latency": "Inference", "launches": "Launches"}


def main(paths: Sequence[Path], html: Path | None, readme: bool) -> int:
    """Write the page, or the README's table; returns the exit status."""
    if readme:
        committed = sorted(readme_table.COMMITTED.glob("*.json"))
        return readme_table.write(load(path) for path in list(paths) or committed)
    chosen = list(paths) or newest(OUT)
    if not chosen:
        raise SystemExit("no result to report on: run python -m bench all first, or name JSON files")
    results = [load(path) for path in chosen]
    if len(results) == 2:
        found = agreement(*results)
        tables.console.print(str(found))
        for row in found.apart:
            tables.console.print(f"  apart: {row}", markup=False)
    target = html or chosen[0].with_suffix(".html")
    target.write_text(page(results))
    tables.console.print(f"wrote {target}")
    return 0


def newest(folder: Path) -> list[Path]:
    """The result written last, if there is one; traces of the profiler lie beside results."""
    found = (path for path in folder.glob("*.json") if not path.name.startswith("trace_"))
    return sorted(found, key=lambda p: p.stat().st_mtime)[-1:]


def load(path: Path) -> dict:
    """A result with its path and goals; says what is wrong with a file that is none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path}: not a result of python -m bench ({error})") from error
    if not isinstance(result, dict) or "rows" not in result or result.get("schema") != 1:
        raise SystemExit(f"{path}: not a result of this version of python -m bench; run it again")
    result["path"] = path
    result["goals"] = judge(result["rows"], result["machine"]["device"].split(":")[0])
    return result


# ------------------------------------------------------------------ the page


def page(results: Sequence[dict]) -> str:
    """The whole page."""
    names = " and ".join(dict.fromkeys(r["machine"]["name"] for r in results))
    body = [f"<h1>jasper_fast on {escape(names)}</h1>"]
    if len(results) > 1:
        body.append(comparison(results))
    for result in results:
        if len(results) > 1:
            body.append(f"<h1>{escape(result['machine']['name'])}, {escape(result['machine']['date'])}</h1>")
        body += sections(result)
    body.append(references())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>jasper_fast bench</title>'
        f"<style>{STYLE.read_text()}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def sections(result: dict) -> list[str]:
    """One result from its summary to its last row."""
    rows = result["rows"]
    parts = [machine_list(result)]
    if not result.get("finished"):
        parts.append('<p class="missed">This run was cut off: the rows are those that it finished.</p>')
    if result["goals"]:
        parts.append("<h2>Goals</h2>" + goals(result["goals"], rows))
    parts += [speedups(rows, bench) for bench in TITLES]
    parts += [latency(rows), beside_published(result), memory(rows), launches(rows), roofline(result)]
    parts += [profiles(result), selfcheck(result), tuning(result), parts_of_run(result), timed(rows)]
    return [p for p in parts if p]


def speedups(rows: Iterable[dict], bench: str) -> str:
    """A bar for every rival that has a time, case after case."""
    groups: dict[str, list[svg.Bar]] = {}
    for r in (r for r in rows if r["bench"] == bench and "ratio" in r):
        median, ends = r["ratio"]["median"], [r["ratio"][k] for k in ("low", "high")]
        bar = (r["contender"], median, *(ends if tables.known(r["ratio"]) else (median, median)))
        groups.setdefault(label(r), []).append(bar)
    if not groups:
        return ""
    note = (
        f"Timed in turns on the same inputs. Whiskers: 95 % interval, none of fewer than {tables.PAIRS} pairs. Dashed: "
        "as fast as the rival."
    )
    plotted = plot(lambda form: svg.bars(list(groups.items()), "x", 1.0, form))
    return f'<h2>{TITLES[bench]}: each rival\'s time / ours</h2><p class="faint">{note}</p>{plotted}'


def machine_list(result: dict) -> str:
    """Where the numbers come from and how to get them again."""
    m, limits = result["machine"], result["limits"]
    facts = {"machine": m["name"], "instructions": ", ".join(m["cpu"]["isa"]), "threads": m["threads"]}
    if m["load_average"]:
        facts["load before the run"] = f"{m['load_average'][0]:.1f} on {m['cpu']['cores']} cores"
    if m["gpu"]:
        gpu = m["gpu"]
        facts["GPU"] = f"{gpu['capability']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}, CUDA {m['cuda']}"
    before, after = (m["gpu"] or {}).get("clocks_at_start"), limits.get("clocks")
    moments = {"clocks before the run": before, "clocks after load": after}
    facts |= {when: state(found) for when, found in moments.items() if found}
    facts["versions"] = f"Python {m['python']}, " + ", ".join(f"{k} {v}" for k, v in m["packages"].items())
    facts |= {"commit": f"{m['commit']}{' with local changes' if m['dirty'] else ''}", "date": m["date"]}
    facts["command"] = m["command"]
    if limits:
        rates = ", ".join(f"{k} {tables.per_second(v, 'FLOP')}" for k, v in limits["matmul_flops_per_s"].items())
        if m["gpu"] and "float32_mode" in limits:
            rates += f" (rows of float32 are held to {limits['float32_mode']}, which their convolutions may use)"
        copy, launch = tables.per_second(limits["copy_bytes_per_s"], "B"), tables.duration(limits["launch_s"]["host"])
        facts["measured limits"] = f"matrix product {rates}; copy {copy}; launch {launch}"
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items()) + "</dl>"


def state(clocks: dict) -> str:
    """What `machine.clocks` found, in words."""
    if "sm_mhz" in clocks:
        return gpu_state(clocks)
    if "cpu_mhz" in clocks or "temperature_c" in clocks:
        mhz = ", ".join(str(v) for v in clocks.get("cpu_mhz", ()))
        degrees = f"{clocks['temperature_c']:.0f} °C" if "temperature_c" in clocks else ""
        return "; ".join(filter(None, [mhz and f"{mhz} MHz", degrees]))
    units = {"temperature.gpu": " °C"}  # the only one that nvidia-smi gives without
    return ", ".join(f"{name} {value}{units.get(name, '')}" for name, value in clocks.items())


GPU_STATE = {"sm_mhz": "SM {} MHz", "memory_mhz": "memory {} MHz", "temperature_c": "{} °C", "power_w": "{:.0f} W"}


def gpu_state(clocks: dict) -> str:
    """What the driver's library told of a GPU, in words; `held_by` is why its clock was held down."""
    found = [text.format(clocks[name]) for name, text in GPU_STATE.items() if name in clocks]
    held = [f"held by {why}" for why in clocks.get("held_by", ())]
    return ", ".join(found + held)


def goals(found: Sequence[dict], rows: Sequence[dict]) -> str:
    """Each goal beside what was measured."""
    lines = []
    for g in found:
        verdict = '<span class="met">met</span>' if g["met"] else '<span class="missed">not met</span>'
        goal = f"{'at most' if g['at_most'] else 'at least'} {g['goal']:g}"
        lines.append(("", [escape(g["name"]), goal, tables.measured(g, rows), verdict]))
    return grid(("what", "goal", "measured", ""), lines)


def latency(rows: Iterable[dict]) -> str:
    """Percentiles of jasper_fast and its rivals, one length after another."""
    mine = [row for row in rows if row["bench"] == "latency" and row["status"] == "ok"]
    if not mine:
        return ""
    groups: dict[str, list] = {}
    for r in mine:
        found = {p.upper(): tables.quantile(r, p) for p in PERCENTILES}
        values = [(name, 1e3 * v) for name, v in found.items() if v is not None]
        groups.setdefault(label(r), []).append((r["contender"], r["ours"], values))
    plotted = plot(lambda form: svg.percentiles(list(groups.items()), "ms", form))
    note = (
        "Dots: P50, P90, P95, P99, as far as the samples tell them (P90 takes 10, P95 20, P99 100); the first and the "
        "last in numbers, all of them in the table of every row."
    )
    return f'<h2>Latency, P50 to P99</h2><p class="faint">{note}</p>{plotted}'


def memory(rows: Iterable[dict]) -> str:
    """Bytes kept for backward and the step's peak, ours beside eager's."""
    lines = []
    for row in (r for r in rows if r["bench"] == "memory"):
        start = [escape(label(row)), row["contender"]]
        if row["status"] != "ok":
            lines.append((side(row), [*start, f"{row['status']}: {escape(row['why'])}"]))
            continue
        m = row["memory"]
        sizes = [f"{m[k] / 2**20:.1f}" for k in ("kept_bytes", "peak_bytes")]
        shares = [f"{m[k]:.3f}" if k in m else "" for k in ("ours_over_kept", "ours_over_peak")]
        lines.append((side(row), [*start, *sizes, *shares]))
    heads = (
        "case",
        "contender",
        "kept for backward, MiB",
        "peak of the step, MiB",
        "ours / its, kept",
        "ours / its, peak",
    )
    return "<h2>Memory of a training step</h2>" + grid(heads, lines) if lines else ""


def launches(rows: Iterable[dict]) -> str:
    """What one call launches, and how long it takes where nothing but launching is left to do."""
    mine = [row for row in rows if row.get("launches")]
    counted = tables.launch_columns(mine)
    lines = []
    for r in mine:
        spent = tables.duration(r["time_s"]["median"]) if "time_s" in r else r["status"]
        cells = [escape(label(r)), escape(r["contender"]), *(cell(r) for _, cell in counted), spent]
        lines.append((side(r), cells))
    heads = ("case", "contender", *(heading for heading, _ in counted), "median time")
    return "<h2>Launches of one call</h2>" + grid(heads, lines) if lines else ""


def profiles(result: dict) -> str:
    """Where the time of a step went, by layer and by op."""
    parts = []
    for found in result.get("profiles", ()):
        N, T = found["batch"]
        title = f"{found['contender']}: {found['model']}, {found['mode']}, N = {N}, {T} frames"
        parts.append(f"<h3>{escape(title)}</h3>")
        if "why" in found:
            parts.append(f'<p class="missed">{escape(found["status"])}: {escape(found["why"])}</p>')
            continue
        if "step_s" in found:
            told = [tables.duration(found[k]) for k in ("step_s", "profiled_s")]
            parts.append(f'<p class="faint">{told[0]} without the profiler, {told[1]} with it.</p>')
        for title, records in tables.profiled(found["records"]):
            heads, lines = tables.profile_lines(records, 12)
            parts.append(grid((title, *heads), [("", [escape(name), *cells]) for name, *cells in lines]))
    return "<h2>Where the time goes</h2>" + "".join(parts) if parts else ""


def selfcheck(result: dict) -> str:
    """The verdicts that the run gave on this machine's kernels, the bad ones with the reason."""
    found = result.get("selfcheck")
    if not found:
        return ""
    lines = []
    for v in found["verdicts"]:
        how = f"{v['status']}{', a quick check' if v.get('quick') else ''}"
        cells = [escape(v["op"]), escape(v["face"]), how, str(v.get("checked", "")), escape(v.get("failure") or "")]
        lines.append(({"good": ""}.get(v["status"], "wrong"), cells))
    failures = "".join(f'<p class="missed">{escape(line)}</p>' for line in found.get("failures", ())[:20])
    return "<h2>Self-check of the kernels</h2>" + grid(("op", "face", "verdict", "checks", ""), lines) + failures


def tuning(result: dict) -> str:
    """What the run's tuning would have dispatch choose: the fastest configuration of each shape."""
    lines = []
    for row in result.get("table", {}).get("rows", ()):
        shape = f"{row['c_in']} to {row['c_out']}, K = {row['taps']}"
        shape += "".join(f", {k} {row[k]}" for k in ("stride", "dilation") if row[k] != 1)
        tile = ", ".join(f"{k} {v}" for k, v in (row.get("tile") or {}).items())
        cells = [row["op"], shape, row["dtype"], f"2^{row['rows_log2']}", row["face"], tile]
        lines.append(("", [*map(escape, cells), tables.duration(row["time_s"])]))
    heads = ("op", "shape", "dtype", "rows", "face", "tile", "time")
    return "<h2>Tuning: the fastest of each face</h2>" + grid(heads, lines) if lines else ""


def parts_of_run(result: dict) -> str:
    """How each part of `python -m bench gpu` ended."""
    parts = result.get("parts", {})
    lines = [("" if how == "finished" else "absent", [escape(part), escape(how)]) for part, how in parts.items()]
    return "<h2>Parts of the run</h2>" + grid(("part", "how it ended"), lines) if lines else ""


def roofline(result: dict) -> str:
    """Achieved rates under the machine's measured ceilings."""
    limits, parts = result["limits"], []
    for dtype, rate in limits.get("matmul_flops_per_s", {}).items():
        timed = [r for r in result["rows"] if r["status"] == "ok" and r["dtype"] == dtype and r.get("flops_per_s")]
        points = [
            (f"{r['contender']}: {label(r)}", r["flops"] / r["bytes"], r["flops_per_s"], r["ours"])
            for r in timed
            if r["bytes"]
        ]
        if points:
            points.sort(key=lambda p: p[3])  # ours on top
            drawn = functools.partial(svg.roofline, points, rate, limits["copy_bytes_per_s"])
            parts.append(f"<h3>{dtype}</h3>" + plot(drawn))
    if not parts:
        return ""
    key = (
        '<p class="key faint"><i class="ours"></i>jasper_fast <i class="theirs"></i>rivals. The roof is what this '
        "machine reached in a matrix product and in a copy; a point above the slope works from cache, one above the "
        "flat part multiplies less often than the definition counts.</p>"
    )
    return "<h2>How far from the machine's limits</h2>" + key + "".join(parts)


def timed(rows: Sequence[dict]) -> str:
    """All timed rows, a table a subcommand; a contender without a number says why."""
    benches = dict.fromkeys(r["bench"] for r in rows if r["bench"] != "memory")
    parts = [f"<h3>{TITLES.get(b, b)}</h3>" + table([r for r in rows if r["bench"] == b]) for b in benches]
    found = dict.fromkeys(note for b in benches for note in tables.notes([r for r in rows if r["bench"] == b]))
    note = "".join(f'<p class="faint">{escape(line)}</p>' for line in found)
    return "<h2>Every timed row</h2>" + "".join(parts) + note if parts else ""


def table(rows: Sequence[dict]) -> str:
    """The timed rows of one subcommand."""
    shown, lines, last = tables.columns(rows), [], None
    for row in rows:
        case = escape(label(row))
        start = ["" if case == last else case, escape(row["contender"])]
        last = case
        if row["status"] != "ok":
            lines.append((side(row), [*start, f"{row['status']}: {escape(row['why'])}"]))
        else:
            lines.append((side(row), [*start, *(cell(row) for _, cell in shown)]))
    return grid(("case", "contender", *(heading for heading, _ in shown)), lines)


def comparison(results: Sequence[dict]) -> str:
    """What two or more results share, side by side: medians and ratios, and the bytes of training."""
    heads = [
        f"{escape(m['name'])}<br><small>{escape(str(m['commit']))} {escape(m['date'][:16])}</small>"
        for m in (r["machine"] for r in results)
    ]
    parts = []
    if lines := shared(results, "time_s", _beside_time):
        parts += ['<p class="faint">Medians; in brackets, how many times as fast as the first; below, its time / ours '
                  "[95 %].</p>"]  # fmt: skip
        if len(results) == 2 and results[0]["machine"]["name"] == results[1]["machine"]["name"]:
            parts.append(f"<p>{escape(str(agreement(*results)))}.</p>")
        parts.append(grid(("case", "contender", *heads), lines))
    if lines := shared(results, "memory", _beside_memory):
        note = "Kept for backward and peak of the step, MiB; in brackets, times the first's."
        parts.append(f'<h3>Memory</h3><p class="faint">{note}</p>' + grid(("case", "contender", *heads), lines))
    return "<h2>Comparison</h2>" + ("".join(parts) or "<p>These results have no row in common.</p>")


def shared(results: Sequence[dict], field: str, cell) -> list[tuple[str, list[str]]]:
    """A line for each row that has `field` in all results; `cell(row, the first result's row)` is one's markup."""
    by_id = [{r["id"]: r for r in result["rows"] if r["status"] == "ok" and field in r} for result in results]
    lines = []
    for key in (k for k in by_id[0] if all(k in other for other in by_id[1:])):
        first = by_id[0][key]
        cells = [cell(rows[key], first) for rows in by_id]
        lines.append((side(first), [f"{first['bench']}: {escape(label(first))}", escape(first["contender"]), *cells]))
    return lines


def _beside_time(row: dict, first: dict) -> str:
    median = row["time_s"]["median"]
    text = tables.duration(median)
    if row is not first:
        text += f" <small>({first['time_s']['median'] / median:.2f}x)</small>"
    return text + (f"<br><small>{tables.span(row['ratio'])}</small>" if "ratio" in row else "")


def _beside_memory(row: dict, first: dict) -> str:
    told = []
    for kind in ("kept_bytes", "peak_bytes"):
        now, before = row["memory"][kind], first["memory"][kind]
        told.append(f"{now / 2**20:.1f}" + (f" <small>({now / before:.3f})</small>" if row is not first else ""))
    return " / ".join(told)
