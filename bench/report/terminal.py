"""Prints results in the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jasper_fast.bench.report import words

console = Console(markup=False)  # without markup, because a path may contain brackets
if not console.is_terminal:  # for a file or a pipe, rich would wrap columns to its default width of 80
    console.width = 200
STYLES = {"wrong": "bold red", "failed": "red", "refused": "red", "absent": "dim"}


def show(rows: list[dict], goals: list[dict]) -> None:
    """Prints a table per subcommand with notes on its rows, the table of scaling over processes, and the goals."""
    for bench in dict.fromkeys(row["bench"] for row in rows):
        mine = [row for row in rows if row["bench"] == bench]
        console.print(_rows(bench, mine, words.MEMORY if bench == "memory" else words.columns(mine)))
        without_number(mine)
    if lines := words.scaling_lines(rows):
        console.print(table("training over processes", words.SCALING, 2, lines))
    if goals:
        console.print(_goals(goals, rows))


def without_number(rows: Iterable[dict]) -> None:
    """Prints the reason for each row without a number."""
    for row in (r for r in rows if r["status"] != "ok"):
        console.print(f"{row['status']}: {row['contender']}, {_case(row)}: {row['why']}", style=STYLES[row["status"]])


def table(
    title: str,
    headings: Sequence[str],
    left: int,
    lines: Iterable[Sequence[str | Text]] = (),
    caption: str | None = None,
) -> Table:
    """Returns a table with these lines. The first `left` columns are aligned left, and the others right (numbers)."""
    made = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < left else "right")
    for line in lines:
        made.add_row(*line)
    return made


def _case(row: dict) -> str:
    return " ".join(str(v) for v in row["key"].values())


def _rows(bench: str, rows: list[dict], columns: Sequence[words.Column]) -> Table:
    headings = ("case", "contender", *(heading for heading, _ in columns))
    made = table(bench, headings, 2, caption="\n".join(words.notes(rows)) or None)
    for row, cells in words.lines(rows, columns, _case, lambda row: row["status"]):
        made.add_row(*cells, style=STYLES.get(row["status"], "bold" if row["ours"] else None))
    return made


def _goals(goals: list[dict], rows: list[dict]) -> Table:
    lines = (
        (
            g["name"],
            f"{'at most' if g['at_most'] else 'at least'} {g['goal']:g}",
            words.measured(g, rows),
            Text("met", "green") if g["met"] else Text("not met", "red"),
        )
        for g in goals
    )
    return table("goals", ("what", "goal", "measured", ""), 4, lines)
