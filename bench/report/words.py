"""Turns results into text for the terminal and the page: units, marks, notes, and the columns of tables."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from jasper_fast.bench.harness import ratios
from jasper_fast.bench.report import published


def duration(seconds: float) -> str:
    """Returns seconds as text, in a unit that suits their size."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{plain(seconds / scale)} {unit}"
    return f"{plain(seconds / 1e-9)} ns"


def rate(row: dict) -> str:
    """Returns the rate of a row as text: bytes per second if memory is its limit, and otherwise FLOP per second, or an
    empty text if the row has no FLOPs."""
    if row.get("limit", {}).get("bound") == "memory":
        return per_second(row["bytes_per_s"], "B")
    return per_second(row["flops_per_s"], "FLOP") if "flops_per_s" in row else ""


def per_second(value: float, of: str) -> str:
    """Returns a rate as text, in a unit that suits its size. `of` is the unit of what is counted, such as "FLOP"."""
    unit, scale = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{plain(value / scale)} {unit}{of}/s"


def plain(value: float) -> str:
    """Returns a number as text: from 100 on without decimals, and below with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


DASH = "–"
FEW = f"{DASH} too few samples for this percentile: P20 and P80 need 5, P90 needs 10, P95 needs 20, P99 needs 100."
SLOWED = "‡ while this was timed, the clock was more than 5 % below the highest of the run."
HURRIED = "† timed in fewer rounds than usual, because one round takes much of the time for a case."
MARKED = {"throttled": SLOWED, "hurried": HURRIED}  # by field of a row: the note; its first character marks the row
# A ratio with fewer pairs has no interval. The range from the smallest to the largest of n ratios contains the true
# median with a probability of 1 - 2^(1 - n), which is below 95 % for n < 6.
PAIRS = 6


def quantile(row: dict, key: str) -> float | None:
    """Returns a quantile of a row in seconds, or None if there are too few samples for it."""
    found = row["time_s"]
    return found[key] if key in found and found["samples"] >= ratios.SAMPLES.get(key, 0) else None


def marks(row: dict) -> str:
    """Returns the marks after a row's median. The notes in MARKED explain them."""
    return "".join(f" {note[0]}" for field, note in MARKED.items() if row.get(field))


def few(rows: Iterable[dict], keys: Iterable[str]) -> bool:
    """Whether the note FEW is needed for these rows."""
    return any(quantile(row, key) is None for row in rows if "time_s" in row for key in keys)


def known(ratio: dict) -> bool:
    """Whether a ratio has an interval, which needs at least PAIRS pairs."""
    return ratio.get("pairs", PAIRS) >= PAIRS


def span(ratio: dict) -> str:
    """Returns a ratio as text with its interval, or with its number of pairs if these are too few for an interval."""
    if not known(ratio):
        return f"{ratio['median']:.2f} of {ratio['pairs']} pair{'s' if ratio['pairs'] > 1 else ''}"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def share(row: dict) -> str:
    """Returns a row's rate as a percentage of its limit, as text. A star marks values over 100 % (see FOOTNOTE)."""
    limit = row.get("limit", {})
    if "share" not in limit:
        return ""
    return f"{100 * limit['share']:.0f} %{'*' * (limit['share'] > 1)} ({limit['bound']})"


FOOTNOTE = (
    "* More than 100 % is possible: FLOPs are counted by the definition of the op, but a fast FIR algorithm needs "
    "fewer multiplications; the data of a small case may fit into a cache; and the limit is itself a measurement."
)


Column = tuple[str, Callable[[dict], str]]  # heading, and a function that returns the text of a row's cell


def lines(
    rows: Iterable[dict], shown: Sequence[Column], label: Callable[[dict], str], missing: Callable[[dict], str]
) -> Iterator[tuple[dict, list[str]]]:
    """Yields each row with the cells of its line in a table: case, contender, and the columns `shown`.

    The case is shown only where it changes; `label` returns its text. A row without a number has a single cell instead
    of the columns, with the text that `missing` returns.
    """
    last = None
    for row in rows:
        case = label(row)
        cells = [cell(row) for _, cell in shown] if row["status"] == "ok" else [missing(row)]
        yield row, ["" if case == last else case, row["contender"], *cells]
        last = case


def waited(rows: Iterable[dict]) -> bool:
    """Whether the table of these rows shows P50 to P99, because they are about the time until a call returns."""
    return any(row["bench"] in ("latency", "launches") for row in rows)


def notes(rows: Sequence[dict]) -> list[str]:
    """Returns the notes to print below a table of these rows."""
    timed = [row for row in rows if "time_s" in row]
    found = [FOOTNOTE] if any(row.get("limit", {}).get("share", 0) > 1 for row in timed) else []
    found += [note for field, note in MARKED.items() if any(row.get(field) for row in timed)]
    found += [f"{r['contender']}, {r['precision']}: {r['rule']}" for r in rows if "rule" in r]
    if few(timed, ratios.SAMPLES if waited(timed) else ("p20", "p80", "p99")):
        found.append(FEW)
    return list(dict.fromkeys(found))


OPTIONAL: list[Column] = [  # columns that a table leaves out if all their cells are empty
    ("host", lambda row: duration(row["host_s"]) if "host_s" in row else ""),
    ("utterances/s", lambda row: plain(row["items_per_s"]) if "items_per_s" in row else ""),
    ("RTFx", lambda row: plain(row["items_per_s"] * row["key"]["audio_s"]) if "audio_s" in row["key"] else ""),
    ("rate", rate),
    ("of limit", share),
]


def columns(rows: Sequence[dict]) -> list[Column]:
    """Returns the columns after case and contender, for the timed rows of one subcommand."""
    timed = [row for row in rows if "time_s" in row]

    def cell(*keys: str) -> Callable[[dict], str]:
        def text(row: dict) -> str:
            values = [quantile(row, key) for key in keys]
            mark = marks(row) if keys[0] in ("median", "p50") else ""
            return DASH if None in values else " to ".join(map(duration, values)) + mark

        return text

    times: list[Column] = [("median", cell("median")), ("p20 to p80", cell("p20", "p80")), ("p99", cell("p99"))]
    if waited(timed):
        times = [(heading, cell(heading.lower())) for heading in ("mean", "P50", "P90", "P95", "P99")]
    rates = [(heading, of) for heading, of in OPTIONAL if any(map(of, timed))]
    ratio = ("its time / ours [95 %]", lambda row: span(row["ratio"]) if "ratio" in row else "")
    return [*launch_columns(timed), *times, *rates, ratio]


def launch_columns(rows: Sequence[dict]) -> list[Column]:
    """Returns the columns with the counts of `python -m bench launches`."""
    kinds = dict.fromkeys(kind for row in rows for kind in row.get("launches", {}))
    return [
        (kind.replace("_", " "), lambda row, kind=kind: str(row.get("launches", {}).get(kind, ""))) for kind in kinds
    ]


PROFILE = ("time", "share", "calls")  # the columns after the name


def profiled(records: Sequence[dict], limit: int) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yields (title, lines) for each kind of record in a profile, with at most `limit` lines. A line is a name and the
    cells of the columns PROFILE."""
    for kind, title in (("layer", "layer, forward"), ("backward", "layer, backward"), ("op", "op, its own time")):
        mine = [r for r in records if r["kind"] == kind]
        whole = sum(r["seconds"] for r in mine)
        lines = [
            (r["name"], duration(r["seconds"]), f"{100 * r['seconds'] / whole:.1f} %", str(r["calls"]))
            for r in mine[:limit]
        ]
        if lines:
            yield title, lines


def _mib(kind: str) -> Callable[[dict], str]:
    return lambda row: f"{row['memory'][kind] / 2**20:.1f}"


def _share(kind: str) -> Callable[[dict], str]:
    return lambda row: f"{row['memory'][kind]:.3f}" if kind in row["memory"] else ""


MEMORY: list[Column] = [
    ("kept for backward, MiB", _mib("kept_bytes")),
    ("peak of the step, MiB", _mib("peak_bytes")),
    ("ours / its, kept", _share("ours_over_kept")),
    ("ours / its, peak", _share("ours_over_peak")),
]


def measured(goal: dict, rows: Iterable[dict]) -> str:
    """Returns the measured value of a goal as text, with its interval if there is one."""
    if goal["measured"] is None:
        return "no number"
    value = f"{goal['measured']:.3f}"
    if "low" not in goal:
        return value
    ratio = next((row.get("ratio", {}) for row in rows if row["id"] == goal["row"]), {})
    return f"{value} [{goal['low']:.3f}, {goal['high']:.3f}]" if known(ratio) else f"{value} of {ratio['pairs']} pairs"


SCALING = (
    "case", "contender", "processes", "utterances/s", "efficiency", "step", "communication left exposed",
    "published for the same number of GPUs: utterances/s (efficiency)",
)  # fmt: skip


def scaling_lines(rows: Iterable[dict]) -> list[tuple[str, ...]]:
    """Returns a line of the table SCALING for each row with the field `scaling`."""
    lines = []
    for row in (r for r in rows if r["status"] == "ok" and "scaling" in r):
        scaling, key, step = row["scaling"], row["key"], row["time_s"]["median"]
        exposed = DASH
        if "exposed_s" in scaling:
            median, low, high = (100 * scaling[k] / step for k in ("exposed_s", "exposed_low_s", "exposed_high_s"))
            exposed = f"{duration(max(scaling['exposed_s'], 0.0))}, {median:.1f} [{low:.1f}, {high:.1f}] %"
        theirs = published.scaling(scaling["processes"], row["dtype"]) if key["model"] == "jasper10x5" else []
        lines.append(
            (
                f"{key['model']} {key['batch']} {key['dtype']}",
                row["contender"],
                str(scaling["processes"]),
                plain(row["items_per_s"]),
                f"{100 * scaling['efficiency']:.0f} %",
                duration(step),
                exposed,
                "; ".join(f"{gpu}, {n} each: {rate:.1f} ({100 * e:.0f} %)" for gpu, n, rate, e in theirs),
            )
        )
    return lines
