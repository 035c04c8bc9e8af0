"""One self-contained HTML page from results, and the README's table from the committed ones.

`python -m bench report RESULT...`, `python -m bench report --readme`
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from bench import published, svg, tables
from bench.agreement import agreement
from bench.goals import judge
from bench.machine import ROOT

BEGIN, END = "<!-- bench: made by python -m bench report --readme -->", "<!-- /bench -->"
COMMITTED = ROOT / "bench" / "results"
PERCENTILES = ("p50", "p90", "p95", "p99")
STYLE = Path(__file__).parent / "page.css"
RATIO = "its time / ours [95 %]"


def main(paths: Sequence[Path], html: Path | None, readme: bool) -> int:
    """Write the page, or the README's table; returns the exit status."""
    if readme:
        return write_readme(list(paths) or sorted(COMMITTED.glob("*.json")))
    chosen = list(paths) or sorted((ROOT / "build" / "bench").glob("*.json"), key=lambda p: p.stat().st_mtime)[-1:]
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


def load(path: Path) -> dict:
    """A result file; says what is wrong with one that is not."""
    try:
        result = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path}: not a result of python -m bench ({error})") from error
    if not isinstance(result, dict) or "rows" not in result or result.get("schema") != 1:
        raise SystemExit(f"{path}: not a result of this version of python -m bench; run it again")
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


def grid(headings: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls sideways on a phone: (class, cells of markup) a line; a short line's last cell is wide."""
    rows = []
    for cls, cells in lines:
        wide = len(headings) - len(cells)
        tags = [f"<td>{c}</td>" for c in cells]
        if wide:
            tags[-1] = f'<td class="l" colspan="{wide + 1}">{cells[-1]}</td>'
        rows.append(f'<tr class="{cls}">{"".join(tags)}</tr>')
    heads = "".join(f"<th>{h}</th>" for h in headings)
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def plot(content: str) -> str:
    """A plot that scrolls sideways on a phone."""
    return f'<div class="plot">{content}</div>'


def side(row: dict) -> str:
    """The class of a row: ours, theirs, or why it has no number."""
    return row["status"] if row["status"] != "ok" else "ours" if row["ours"] else "theirs"


def label(row: dict) -> str:
    """A row's case in words."""
    units = {"N": "N = {}", "seconds": "{} s", "p": "p = {}"}
    return ", ".join(units.get(k, "{}").format(v) for k, v in row["key"].items())


def sections(result: dict) -> list[str]:
    """One result from its summary to its last row."""
    rows = result["rows"]
    parts = [machine_list(result)]
    if not result.get("finished"):
        parts.append('<p class="missed">This run was cut off: the rows are those that it finished.</p>')
    if result["goals"]:
        parts.append("<h2>Goals</h2>" + goals(result["goals"]))
    for bench, title in (("kernels", "Kernels"), ("train", "Training step"), ("latency", "Inference")):
        eager = [row for row in rows if row["bench"] == bench and row["contender"] == "eager" and "ratio" in row]
        if eager:
            entries = [(label(r), r["ratio"]["median"], r["ratio"]["low"], r["ratio"]["high"]) for r in eager]
            note = "Timed in turns on the same inputs. Whiskers: 95 % interval. Dashed: as fast as eager."
            parts.append(f'<h2>{title}: eager\'s time / ours</h2><p class="faint">{note}</p>')
            parts.append(plot(svg.bars(entries, "x", 1.0)))
    parts += [latency(rows), memory(rows), roofline(result), "<h2>Every timed row</h2>" + table(rows)]
    return [p for p in parts if p]


def machine_list(result: dict) -> str:
    """Where the numbers come from and how to get them again."""
    m, limits = result["machine"], result["limits"]
    facts = {"machine": m["name"], "instructions": ", ".join(m["cpu"]["isa"]), "threads": m["threads"]}
    if m["load_average"]:
        facts["load before the run"] = f"{m['load_average'][0]:.1f} on {m['cpu']['cores']} cores"
    if m["gpu"]:
        gpu = m["gpu"]
        facts["GPU"] = f"{gpu['capability']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}, CUDA {m['cuda']}"
    facts["versions"] = f"Python {m['python']}, " + ", ".join(f"{k} {v}" for k, v in m["packages"].items())
    facts |= {"commit": f"{m['commit']}{' with local changes' if m['dirty'] else ''}", "date": m["date"]}
    facts["command"] = m["command"]
    if limits:
        rates = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in limits["matmul_flops_per_s"].items())
        copy, launch = limits["copy_bytes_per_s"] / 1e9, limits["launch_s"]["host"] * 1e6
        facts["measured limits"] = f"matrix product {rates}; copy {copy:.1f} GB/s; launch {launch:.1f} us"
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items()) + "</dl>"


def goals(found: Sequence[dict]) -> str:
    """Each goal beside what was measured."""
    lines = []
    for g in found:
        interval = f" [{g['low']:.3f}, {g['high']:.3f}]" if "low" in g else ""
        measured = "no number" if g["measured"] is None else f"{g['measured']:.3f}{interval}"
        verdict = '<span class="met">met</span>' if g["met"] else '<span class="missed">not met</span>'
        goal = f"{'at most' if g['at_most'] else 'at least'} {g['goal']:g}"
        lines.append(("", [escape(g["name"]), goal, measured, verdict]))
    return grid(("what", "goal", "measured", ""), lines)


def latency(rows: Iterable[dict]) -> str:
    """Percentiles of jasper_fast and its rivals, one length after another."""
    mine = [row for row in rows if row["bench"] == "latency" and row["status"] == "ok"]
    if not mine:
        return ""
    entries = [(f"{r['contender']}: {label(r)}", r["ours"], [1e3 * r["time_s"][p] for p in PERCENTILES]) for r in mine]
    return "<h2>Latency, P50 to P99</h2>" + plot(svg.percentiles(entries, [p.upper() for p in PERCENTILES], "ms"))


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
    heads = ("case", "", "kept for backward, MiB", "peak of the step, MiB", "ours / its, kept", "ours / its, peak")
    return "<h2>Memory of a training step</h2>" + grid(heads, lines) if lines else ""


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
            parts.append(f"<h3>{dtype}</h3>" + plot(svg.roofline(points, rate, limits["copy_bytes_per_s"])))
    if not parts:
        return ""
    key = (
        '<p class="key faint"><i class="ours"></i>jasper_fast <i class="theirs"></i>rivals. The roof is what this '
        "machine reached in a matrix product and in a copy; a point above the slope works from cache.</p>"
    )
    return "<h2>How far from the machine's limits</h2>" + key + "".join(parts)


def table(rows: Sequence[dict]) -> str:
    """All timed rows; a contender without a number says why."""
    lines, last = [], None
    for row in (r for r in rows if r["bench"] != "memory"):
        case = f"{row['bench']}: {escape(label(row))}"
        start = ["" if case == last else case, escape(row["contender"])]
        last = case
        if row["status"] != "ok":
            lines.append((side(row), [*start, f"{row['status']}: {escape(row['why'])}"]))
            continue
        t, limit = row["time_s"], row.get("limit", {})
        cells = [tables.duration(t[k]) for k in ("median", "p20", "p80", "p99")]
        cells += [tables.rate(row), f"{100 * limit['share']:.0f} % ({limit['bound']})" if "share" in limit else ""]
        cells.append(tables.span(row["ratio"]) if "ratio" in row else "")
        lines.append((side(row), [*start, *cells]))
    return grid(("case", "contender", "median", "p20", "p80", "p99", "rate", "of limit", RATIO), lines)


def comparison(results: Sequence[dict]) -> str:
    """The rows that two or more results share, medians side by side."""
    by_id = [{r["id"]: r for r in result["rows"] if r["status"] == "ok" and "time_s" in r} for result in results]
    heads = [
        f"{escape(m['name'])}<br><small>{escape(str(m['commit']))} {escape(m['date'][:16])}</small>"
        for m in (r["machine"] for r in results)
    ]
    lines = []
    for key in (k for k in by_id[0] if all(k in other for other in by_id[1:])):
        medians = [rows[key]["time_s"]["median"] for rows in by_id]
        cells = [
            tables.duration(m) + (f" <small>({medians[0] / m:.2f}x)</small>" if i else "")
            for i, m in enumerate(medians)
        ]
        row = by_id[0][key]
        lines.append((side(row), [f"{row['bench']}: {escape(label(row))}", escape(row["contender"]), *cells]))
    if not lines:
        return "<h2>Comparison</h2><p>These results have no row in common.</p>"
    note = '<p class="faint">Medians; in brackets, how many times as fast as the first.</p>'
    if len(results) == 2 and results[0]["machine"]["name"] == results[1]["machine"]["name"]:
        note += f"<p>{escape(str(agreement(*results)))}.</p>"
    return "<h2>Comparison</h2>" + note + grid(("case", "contender", *heads), lines)


def references() -> str:
    """The reference's published numbers, clearly marked as what they are."""
    gpus = list(published.LATENCY_FP16)
    lines = [
        ("", [f"N = {N}, {s} s", *(" / ".join(f"{v:.2f}" for v in published.LATENCY_FP16[g][N, s]) for g in gpus)])
        for N, s in published.LATENCY_FP16[gpus[0]]
    ]
    steps = [
        ("", [f"{gpu}, batch {batch}", "not published" if full is None else f"{full:.2f}", f"{amp:.2f}"])
        for gpu, batch, full, amp in published.TRAINING
    ]
    return (
        "<h2>Other hardware: what was published for the reference system</h2>"
        f'<p class="faint">Not measured here. {escape(published.SOURCE)}: eager PyTorch of 2020 (20.10-py3 container), '
        "Jasper 10x5, conv masks on.</p>"
        "<h3>Latency in FP16, ms per batch: mean / P90 / P95 / P99</h3>" + grid(("batch, length", *gpus), lines) + ""
        "<h3>Training on one GPU, utterances per second</h3>" + grid(("GPU", "TF32 (A100) or FP32", "AMP"), steps)
    )


# ------------------------------------------------------------------ README


def write_readme(paths: Sequence[Path], readme: Path = ROOT / "README.md") -> int:
    """Put a table a machine between the README's markers, each line from the newest result that has it."""
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{readme.name}: the markers {BEGIN} and {END} are missing; put them where the table belongs")
    machines: dict[str, list[dict]] = {}
    for result in sorted((load(p) | {"path": p} for p in paths), key=lambda r: r["machine"]["date"]):
        machines.setdefault(result["machine"]["name"], []).append(result)
    if not machines:
        raise SystemExit("no result in bench/results: commit one, or name JSON files")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{''.join(readme_table(r) for r in machines.values())}{END}{after}")
    tables.console.print(f"wrote the table in {readme.name}")
    return 0


def readme_table(results: Sequence[dict]) -> str:
    """Markdown: each goal's newest measurement on one machine, oldest result first, and how to repeat them."""
    latest = {goal["name"]: (goal, result) for result in results for goal in result["goals"]}
    lines = [
        f"| {results[-1]['machine']['name']} | eager PyTorch | jasper_fast | ratio [95 %] |",
        "|---|---:|---:|---:|",
    ]
    for goal, result in latest.values():
        rows = {row["id"]: row for row in result["rows"]}
        pair = rows.get(goal["row"]), rows[goal["row"].rsplit(" / ", 1)[0] + " / jasper_fast"]
        if goal["measured"] is None:
            cells = ["no number", pair[1].get("why", ""), ""]
        elif goal["kind"] == "share":
            cells = [tables.duration(r["time_s"]["median"]) if r and "time_s" in r else "" for r in pair]
            cells.append(f"{100 * goal['measured']:.0f} % of the limit")
        elif "memory" in pair[0]:
            cells = [f"{r['memory']['kept_bytes'] / 2**20:,.0f} MiB" for r in pair]
            cells.append(f"{goal['measured']:.2f} of eager's")
        else:
            cells = [tables.duration(r["time_s"]["median"]) for r in pair]
            cells[0] += "" if pair[0]["contender"] == "eager" else f" ({pair[0]['contender']})"
            cells.append(f"{goal['measured']:.2f}x [{goal['low']:.2f}, {goal['high']:.2f}]")
        lines.append(f"| {goal['name']} | {' | '.join(cells)} |")
    used = [r for r in results if any(result is r for _, result in latest.values())]
    return "\n".join([*lines, "", *(f"- {source(r)}" for r in used), ""])


def source(result: dict) -> str:
    """Command, versions and file of a result."""
    m, path = result["machine"], result["path"]
    file = f"[result](bench/results/{path.name})" if path.parent == COMMITTED else path.name
    return f"`{m['command']}`; {m['threads']} threads, torch {m['packages']['torch']}, commit {m['commit']}; {file}"
