"""The page's tables of what was published for the reference system: beside our rows, and all of it. Other hardware."""

from collections.abc import Iterable, Sequence
from html import escape

from jasper_fast.bench.report import published, tables
from jasper_fast.bench.report.markup import grid

ELSEWHERE = "<i>{}</i><br><small>published</small>"
SAME = "Jasper 10x5, conv masks on; eager PyTorch of 2020 (20.10-py3 container)"


def beside_published(result: dict) -> str:
    """Our rows beside what was published for the reference system at the same batch and length, on other hardware."""
    parts = [latency_beside(result, dtype) for dtype in ("float16", "bfloat16", "float32")] + [training_beside(result)]
    if not any(parts):
        return ""
    note = (
        f"Columns marked <i>published</i> were not measured here: {escape(published.SOURCE)}; {SAME}, on the hardware "
        "that each names. They tell what that system was, not how much of a difference is ours and how much the "
        "machine's."
    )
    return "<h2>Beside other hardware's published numbers</h2><p>" + note + "</p>" + "".join(parts)


def ours_and_eager(rows: Iterable[dict], bench: str, **key: object) -> dict[tuple, dict[str, dict]]:
    """Timed rows of Jasper 10x5 that match `key`, by case and contender."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        mine = row["bench"] == bench and row["status"] == "ok" and row["contender"] in ("jasper_fast", "eager")
        if mine and all(row["key"].get(k) == v for k, v in ({"model": "jasper10x5"} | key).items()):
            cases.setdefault(tuple(row["key"].items()), {})[row["contender"]] = row
    return cases


def latency_beside(result: dict, dtype: str) -> str:
    """Percentiles by (N, seconds): ours, eager here, and each GPU's."""
    lines, elsewhere = [], published.latency(dtype)
    cases = ours_and_eager(result["rows"], "latency", path="acoustic model", dtype=dtype)
    for key, rows in cases.items():
        at = (dict(key)["N"], dict(key)["seconds"])
        if any(at in found for found in elsewhere.values()):
            quantiles = ("mean", "p90", "p95", "p99")
            here = [
                four([in_ms(tables.quantile(rows[name], q)) for q in quantiles]) if name in rows else ""
                for name in ("jasper_fast", "eager")
            ]
            lines.append(
                ("", [f"N = {at[0]}, {at[1]} s", *here, *(four(found.get(at)) for found in elsewhere.values())])
            )
    if not lines:
        return ""
    name = escape(result["machine"]["name"])
    heads = ["batch, length", f"jasper_fast<br><small>{name}</small>", f"eager<br><small>{name}</small>"]
    heads += [ELSEWHERE.format(escape(gpu)) for gpu in elsewhere]
    theirs = "FP16" if elsewhere is published.LATENCY_FP16 else "TF32 on the A100, FP32 on the others"
    title = f"<h3>Latency, {dtype} here, {theirs} there: mean / P90 / P95 / P99, ms per batch</h3>"
    here = [row for rows in cases.values() for row in rows.values()]
    note = f'<p class="faint">{tables.FEW}</p>' if tables.few(here, ("p90", "p95", "p99")) else ""
    return title + grid(heads, lines) + note


def in_ms(seconds: float | None) -> float | None:
    """Milliseconds of what was told."""
    return None if seconds is None else 1e3 * seconds


def training_beside(result: dict) -> str:
    """Utterances per second of a training step, ours, eager here, and of each single GPU at the same batch."""
    lines = []
    for key, rows in ours_and_eager(result["rows"], "train", mode="step").items():
        case = dict(key)
        N, _, T = (int(v) for v in case["batch"].strip("()").split(","))
        theirs = [
            f"<i>{escape(gpu)}</i> {rate:.1f}" for gpu, gpus, rate in published.training(N, case["dtype"]) if gpus == 1
        ]
        here = [f"{rows[name]['items_per_s']:.1f}" if name in rows else "" for name in ("jasper_fast", "eager")]
        lines.append(("", [f"N = {N}, {T} frames, {case['dtype']}", *here, "; ".join(theirs) or "none published"]))
    if not lines:
        return ""
    heads = ("batch", "jasper_fast", "eager", ELSEWHERE.format("one GPU, same batch"))
    note = "Published batches held real speech of up to 16.7 s; ours are all of the same length."
    return f'<h3>Training, utterances per second</h3><p class="faint">{note}</p>' + grid(heads, lines)


def four(milliseconds: Sequence[float | None] | None) -> str:
    """Mean, and smaller P90 / P95 / P99; a dash for what too few samples tell."""
    if milliseconds is None:
        return ""
    mean, *rest = (tables.DASH if v is None else f"{v:.1f}" if v < 1000 else f"{v:.0f}" for v in milliseconds)
    return f"{mean} <small>/ {' / '.join(rest)}</small>"


def references() -> str:
    """All of the reference's published numbers, clearly marked as what they are."""
    parts = []
    for title, found in (
        ("Latency in FP16", published.LATENCY_FP16),
        ("Latency in TF32 on the A100, FP32 on the others", published.LATENCY_FP32),
    ):
        lines = [("", [f"N = {N}, {s} s", *(four(of_gpu[N, s]) for of_gpu in found.values())]) for N, s in found["T4"]]
        heads = ("batch, length", *(escape(gpu) for gpu in found))
        parts.append(f"<h3>{title}, ms per batch: mean / P90 / P95 / P99</h3>" + grid(heads, lines))
    steps = [
        ("", [escape(gpu), str(batch), str(gpus), "not published" if full is None else f"{full:.2f}", f"{amp:.2f}"])
        for gpu, batch, gpus, full, amp in published.TRAINING
    ]
    heads = ("GPU", "batch of each", "GPUs", "TF32 (A100) or FP32", "AMP")
    parts.append("<h3>Training, utterances per second of all GPUs together</h3>" + grid(heads, steps))
    return (
        "<h2>Other hardware: what was published for the reference system</h2>"
        f'<p class="faint">Not measured here. {escape(published.SOURCE)}; {SAME}.</p>'
        f"<details><summary>All tables</summary>{''.join(parts)}</details>"
    )
