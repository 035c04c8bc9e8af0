"""Geometry of the plots in plots.html.j2: their sizes on a wide and a narrow page, and the axes of a roofline plot."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from jasper_fast.bench.report import words


@dataclass(frozen=True)
class Form:
    """The sizes of a plot for one page width.

    Bars begin at `left`. The name and the number of a bar are in a line of height `above` above the bar. If `above` is
    0, they are beside the bar.
    """

    width: int
    left: int
    above: int
    font: int  # font size in px if the plot is shown at `width`; page.css has the same size
    height: int  # height of a roofline plot

    @property
    def wide(self) -> bool:
        """Whether names are beside the bars."""
        return not self.above

    def length(self, text: str) -> float:
        """Returns the width of a text in px, estimated as 0.6 of the font size per character."""
        return 0.6 * self.font * len(text)

    def lines(self, label: str) -> list[str]:
        """Returns the title `label` split into lines that fit."""
        return textwrap.wrap(label, int((self.width - 8) / self.length("x")), break_on_hyphens=False)

    def begins(self, label: str) -> int:
        """Returns the distance from the top of a group's title to its first row."""
        return 4 + 18 * len(self.lines(label)) + (0 if self.wide else 3)


WIDE = Form(width=720, left=190, above=0, font=13, height=380)
NARROW = Form(width=360, left=4, above=19, font=14, height=320)  # on a phone 320 px wide its text still has 11 px
Point = tuple[str, float, float, bool]  # (label, FLOP per byte, FLOP/s, ours)


def roofline(points: Sequence[Point], flops_per_s: float, bytes_per_s: float, form: Form) -> dict:
    """Returns the positions of the axes, the roof and the dots of a roofline plot, whose axes are logarithmic."""
    left, top, right, bottom = 64, 14, form.width - 14, form.height - 44
    ridge = flops_per_s / bytes_per_s  # FLOP per byte at which the limit changes from bandwidth to arithmetic
    x0 = math.floor(math.log10(min([p[1] for p in points] + [ridge])) - 0.2)
    x1 = math.ceil(math.log10(max([p[1] for p in points] + [ridge])) + 0.2)
    y0 = math.floor(math.log10(min([p[2] for p in points] + [10**x0 * bytes_per_s])))
    y1 = math.ceil(math.log10(max([p[2] for p in points] + [flops_per_s])) + 0.1)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (math.log10(x) - x0) / (x1 - x0), (math.log10(y) - y0) / (y1 - y0)
        return left + across * (right - left), bottom - up * (bottom - top)

    return {
        "left": left, "top": top, "right": right, "bottom": bottom,
        "across": [(at(10**d, 1)[0], f"{10.0**d:g}") for d in range(x0, x1 + 1)],
        "up": [(at(1, 10**d)[1], _short(10**d)) for d in range(y0, y1 + 1)],
        "slope": (*at(10**x0, 10**x0 * bytes_per_s), *at(ridge, flops_per_s), right),
        "dots": [("ours" if ours else "theirs", *at(x, y), f"{label}: {words.per_second(y, 'FLOP')}")
                 for label, x, y, ours in points],
    }  # fmt: skip


def _short(v: float) -> str:
    units = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1.0))
    return next((f"{v / scale:g} {unit}".strip() for unit, scale in units if v >= scale), f"{v:g}")
