"""Results in the terminal."""

from rich.console import Console
from rich.table import Table

console = Console()
if not console.is_terminal:  # a file or a pipe has no width: do not fold the columns to a guess of 80
    console = Console(width=160)
STYLES = {"wrong": "bold red", "failed": "red", "absent": "dim"}


def show(rows: list[dict], goals: list[dict]) -> None:
    """One table a subcommand, then the goals."""
    for bench in dict.fromkeys(row["bench"] for row in rows):
        mine = [row for row in rows if row["bench"] == bench]
        console.print(_memory(mine) if bench == "memory" else _timed(bench, mine))
        for row in (r for r in mine if r["status"] != "ok"):
            case = " ".join(str(v) for v in row["key"].values())
            console.print(f"{row['status']}: {row['contender']}, {case}: {row['why']}", style=STYLES[row["status"]])
    if goals:
        console.print(_goals(goals))


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def rate(row: dict) -> str:
    """What the row achieves, in the unit of its bound."""
    if row.get("limit", {}).get("bound") == "memory":
        return f"{row['bytes_per_s'] / 1e9:.3g} GB/s"
    return f"{row['flops_per_s'] / 1e9:.3g} GFLOP/s" if "flops_per_s" in row else ""


def span(ratio: dict) -> str:
    """A ratio and its interval."""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _timed(bench: str, rows: list[dict]) -> Table:
    table = Table(title=bench, title_justify="left")
    for column in ("case", "contender", "median", "p20 to p80", "p99", "rate", "of limit", "its time / ours [95 %]"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    last = None
    for row in rows:
        case = " ".join(str(v) for v in row["key"].values())
        first, last = ("" if case == last else case), case
        if row["status"] != "ok":
            table.add_row(first, row["contender"], row["status"], style=STYLES[row["status"]])
            continue
        t = row["time_s"]
        share = f"{100 * row['limit']['share']:.0f} %" if "share" in row.get("limit", {}) else ""
        spread = f"{duration(t['p20'])} to {duration(t['p80'])}"
        beside = span(row["ratio"]) if "ratio" in row else ""
        table.add_row(
            first,
            row["contender"],
            duration(t["median"]),
            spread,
            duration(t["p99"]),
            rate(row),
            share,
            beside,
            style="bold" if row["ours"] else None,
        )
    return table


def _memory(rows: list[dict]) -> Table:
    table = Table(title="memory", title_justify="left")
    for column in (
        "case",
        "contender",
        "kept for backward",
        "peak of the step",
        "ours / its, kept",
        "ours / its, peak",
    ):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for row in rows:
        case = " ".join(str(v) for v in row["key"].values())
        if row["status"] != "ok":
            table.add_row(case, row["contender"], row["status"], style=STYLES[row["status"]])
            continue
        m = row["memory"]
        shares = [f"{m[k]:.3f}" if k in m else "" for k in ("ours_over_kept", "ours_over_peak")]
        table.add_row(
            case,
            row["contender"],
            f"{m['kept_bytes'] / 2**20:.1f} MiB",
            f"{m['peak_bytes'] / 2**20:.1f} MiB",
            *shares,
            style="bold" if row["ours"] else None,
        )
    return table


def _goals(goals: list[dict]) -> Table:
    table = Table(title="goals", title_justify="left")
    for column in ("what", "goal", "measured", ""):
        table.add_column(column)
    for g in goals:
        if g["measured"] is None:
            measured = "no number"
        else:
            measured = f"{g['measured']:.3f}" + (f" [{g['low']:.3f}, {g['high']:.3f}]" if "low" in g else "")
        sign = "at most" if g["at_most"] else "at least"
        table.add_row(g["name"], f"{sign} {g['goal']:g}", measured, "[green]met[/]" if g["met"] else "[red]not met[/]")
    return table
