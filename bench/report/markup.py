"""Pieces of HTML that the parts of the report's page share."""

from collections.abc import Callable, Iterable, Sequence

from jasper_fast.bench.report import svg


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
    named = ' class="named"' if headings[1] == "contender" else ""
    return f'<div class="wide"><table{named}><tr>{heads}</tr>{"".join(rows)}</table></div>'


def plot(draw: Callable[[svg.Form], str]) -> str:
    """A plot in two forms, of which the page's style shows the one that fits."""
    return "".join(
        f'<div class="{cls}">{draw(form)}</div>' for cls, form in (("broad", svg.WIDE), ("slim", svg.NARROW))
    )


def side(row: dict) -> str:
    """The class of a row: ours, theirs, or why it has no number."""
    return row["status"] if row["status"] != "ok" else "ours" if row["ours"] else "theirs"


def label(row: dict) -> str:
    """A row's case in words."""
    units = {"N": "N = {}", "seconds": "{} s", "p": "p = {}"}
    return ", ".join(units.get(k, "{}").format(v) for k, v in row["key"].items())
