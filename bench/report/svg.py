"""Plots as inline SVG that follow the page's light or dark colours through CSS classes."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Form:
    """A plot is drawn once for each width of page. Names and numbers of its rows stand beside the bars, which begin at
    `left`, or in a line of their own, `above` high."""

    width: int
    left: int
    above: int
    font: int  # px where the plot has its own width; page.css says the same
    height: int  # of a roofline

    def length(self, told: str) -> float:
        """Of a text, a character taken for 0.6 of the font's size."""
        return 0.6 * self.font * len(told)

    def lines(self, label: str) -> list[str]:
        """A title in lines that fit."""
        return textwrap.wrap(label, int((self.width - 8) / self.length("x")), break_on_hyphens=False)


WIDE = Form(width=720, left=190, above=0, font=13, height=380)
NARROW = Form(width=360, left=4, above=19, font=14, height=320)  # a phone's: 11 px at least on 320 of them


def text(x: float, y: float, content: str, cls: str = "", anchor: str = "start") -> str:
    """A text element; `content` is markup."""
    return f'<text class="{cls}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{content}</text>'


def path(cls: str, d: str) -> str:
    """A stroked path."""
    return f'<path class="{cls}" d="{d}"/>'


def dot(cls: str, x: float, y: float, radius: float, title: str = "") -> str:
    """A filled circle with a tooltip."""
    return f'<circle class="{cls}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'


def titled(form: Form, label: str, y: float) -> tuple[list[str], float]:
    """A group's title from `y` down, and where the group begins."""
    lines = form.lines(label)
    begins = y + 4 + 18 * len(lines) + (0 if form is WIDE else 3)
    return [text(4, y + 15 + 18 * i, escape(line)) for i, line in enumerate(lines)], begins


def named(form: Form, name: str, y: float, cls: str) -> str:
    """The name of the row that begins at `y`."""
    x, anchor = (form.left - 8, "end") if form is WIDE else (form.left, "start")
    return text(x, y + 13, escape(name), cls, anchor)


Bar = tuple[str, float, float, float]


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], unit: str, mark: float, form: Form = WIDE) -> str:
    """Horizontal bars, (name, value, low, high), under a title a group, whiskers from low to high, a line at `mark`."""
    left, thick, gap = form.left, 20 + form.above, 10
    entries = [bar for _, group in groups for bar in group]
    room = 1.12 if form is WIDE else 1.02  # for a number after the longest bar
    scale = (form.width - left - 4) / (room * max([high for *_, high in entries] + [mark]))
    parts, y = [], 0.0
    for label, group in groups:
        title, y = titled(form, label, y)
        parts += title
        for name, value, low, high in group:
            parts.append(named(form, name, y, "faint"))
            cls, top = "good" if value >= mark else "bad", y + form.above
            parts.append(
                f'<rect class="{cls}" x="{left}" y="{top + 1}" width="{value * scale:.1f}" height="15" rx="2"/>'
            )
            a, b = left + low * scale, left + high * scale
            if high > low:
                ends = f"M{a:.1f} {top + 4} v9 M{b:.1f} {top + 4} v9"
                parts.append(path("whisker", f"M{a:.1f} {top + 8.5} H{b:.1f} {ends}"))
            told = f"{value:.2f}{unit}"
            if form is not WIDE:
                parts.append(text(form.width - 4, y + 13, told, "value", "end"))
            elif b + 14 + form.length(told) > form.width:
                parts.append(text(min(left + value * scale, a) - 6, y + 13, told, "inside", "end"))
            else:
                parts.append(text(b + 6, y + 13, told, "value"))
            if form is not WIDE:  # between the names
                parts.append(path("mark", f"M{left + mark * scale:.1f} {top - 1} v19"))
            y += thick
        if form is WIDE:
            parts.append(path("mark", f"M{left + mark * scale:.1f} {y - thick * len(group) - 2} V{y - 1}"))
        y += gap
    return _svg(form.width, y, parts)


Series = tuple[str, bool, Sequence[tuple[str, float]]]


def percentiles(groups: Sequence[tuple[str, Sequence[Series]]], unit: str, form: Form = WIDE) -> str:
    """A line from the first to the last percentile, a dot at each: (name, ours, (percentile, value) in ascending
    order), under a title a group."""
    left, right, thick, gap = form.left, 16, 20 + form.above, 10
    most = max(v for _, group in groups for *_, values in group for _, v in values)
    scale = (form.width - left - right) / (1.02 * most)
    parts, y = [], 0.0
    for label, group in groups:
        title, y = titled(form, label, y)
        parts += title
        for name, ours, values in group:
            cls, at = "ours" if ours else "theirs", y + form.above + 9
            numbers = ", ".join(f"{m} {v:.4g} {unit}" for m, v in values)
            xs = [left + v * scale for _, v in values]
            parts.append(named(form, name, y, "" if ours else "faint"))
            parts.append(path(f"line {cls}", f"M{xs[0]:.1f} {at} H{xs[-1]:.1f}"))
            parts += [dot(cls, x, at, 5 - j, numbers) for j, x in enumerate(xs)]
            ends, room = dict.fromkeys(f"{v:.4g}" for _, v in (values[0], values[-1])), 130
            told = f"{' to '.join(ends)} {unit}"
            after = xs[-1] + room < form.width
            if after or form is not WIDE:  # a guide from the name to the dots, where no number stands in its way
                parts.append(path("base", f"M{left} {at} H{xs[0]:.1f}"))
            if form is not WIDE:
                parts.append(text(form.width - 4, y + 13, told, "faint", "end"))
            else:
                parts.append(
                    text(xs[-1] + 9 if after else xs[0] - 9, y + 13, told, "faint", "start" if after else "end")
                )
            y += thick
        y += gap
    return _svg(form.width, y, parts)


def roofline(
    points: Sequence[tuple[str, float, float, bool]], flops_per_s: float, bytes_per_s: float, form: Form = WIDE
) -> str:
    """Log-log: (label, FLOP per byte, FLOP/s, ours); the machine's two measured ceilings make the roof."""
    width, height, left, bottom, pad = form.width, form.height, 64, 44, 14
    ridge = flops_per_s / bytes_per_s
    x0 = math.floor(math.log10(min([p[1] for p in points] + [ridge])) - 0.2)
    x1 = math.ceil(math.log10(max([p[1] for p in points] + [ridge])) + 0.2)
    y0 = math.floor(math.log10(min([p[2] for p in points] + [10**x0 * bytes_per_s])))
    y1 = math.ceil(math.log10(max([p[2] for p in points] + [flops_per_s])) + 0.1)

    def at_x(v: float) -> float:
        return left + (math.log10(v) - x0) / (x1 - x0) * (width - left - pad)

    def at_y(v: float) -> float:
        return height - bottom - (math.log10(v) - y0) / (y1 - y0) * (height - bottom - pad)

    parts = []
    for d in range(x0, x1 + 1):
        parts.append(path("grid", f"M{at_x(10**d):.1f} {pad} V{height - bottom}"))
        anchor = "middle" if d < x1 else "end"  # the last would stand half outside
        parts.append(text(at_x(10**d), height - bottom + 18, f"{10.0**d:g}", "faint", anchor))
    for d in range(y0, y1 + 1):
        parts.append(path("grid", f"M{left} {at_y(10**d):.1f} H{width - pad}"))
        parts.append(text(left - 6, at_y(10**d) + 5, _short(10**d), "faint", "end"))
    parts.append(text(width - pad, height - 6, "across: FLOP per byte; up: FLOP/s", "faint", "end"))
    start, corner = (at_x(10**x0), at_y(10**x0 * bytes_per_s)), (at_x(ridge), at_y(flops_per_s))
    parts.append(path("roof", f"M{start[0]:.1f} {start[1]:.1f} L{corner[0]:.1f} {corner[1]:.1f} H{width - pad}"))
    for label, x, y, ours in points:
        parts.append(dot("ours" if ours else "theirs", at_x(x), at_y(y), 5, f"{label}: {y / 1e9:.3g} GFLOP/s"))
    return _svg(width, height, parts)


def _short(v: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if v >= scale:
            return f"{v / scale:g} {unit}"
    return f"{v:g}"


def _svg(width: int, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img">{"".join(parts)}</svg>'
