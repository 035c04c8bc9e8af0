"""Plots as inline SVG that follow the page's light or dark colours through CSS classes."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, ROW = 720, 44


def text(x: float, y: float, content: str, cls: str = "", anchor: str = "start") -> str:
    """A text element; `content` is markup."""
    return f'<text class="{cls}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{content}</text>'


def path(cls: str, d: str) -> str:
    """A stroked path."""
    return f'<path class="{cls}" d="{d}"/>'


def dot(cls: str, x: float, y: float, radius: float, title: str = "") -> str:
    """A filled circle with a tooltip."""
    return f'<circle class="{cls}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'


def bars(entries: Sequence[tuple[str, float, float, float]], unit: str, mark: float) -> str:
    """Horizontal bars, (label, value, low, high), with whiskers from low to high and a line at `mark`."""
    left = 4
    scale = (WIDTH - 2 * left) / (1.12 * max([high for *_, high in entries] + [mark]))
    parts = []
    for i, (label, value, low, high) in enumerate(entries):
        y = ROW * i
        parts.append(text(left, y + 15, escape(label)))
        cls = "good" if value >= mark else "bad"
        parts.append(f'<rect class="{cls}" x="{left}" y="{y + 21}" width="{value * scale:.1f}" height="15" rx="2"/>')
        a, b = left + low * scale, left + high * scale
        parts.append(path("whisker", f"M{a:.1f} {y + 28.5} H{b:.1f} M{a:.1f} {y + 24} v9 M{b:.1f} {y + 24} v9"))
        if b + 70 > WIDTH:
            parts.append(text(min(left + value * scale, a) - 6, y + 33, f"{value:.2f}{unit}", "inside", "end"))
        else:
            parts.append(text(b + 6, y + 33, f"{value:.2f}{unit}", "value"))
        parts.append(path("mark", f"M{left + mark * scale:.1f} {y + 18} v21"))
    return _svg(ROW * len(entries) + 6, parts)


def percentiles(entries: Sequence[tuple[str, bool, Sequence[float]]], marks: Sequence[str], unit: str) -> str:
    """A line from the first to the last percentile, a dot at each: (label, ours, values in ascending order)."""
    left, right = 8, 16
    scale = (WIDTH - left - right) / (1.02 * max(v for *_, values in entries for v in values))
    parts = []
    for i, (label, ours, values) in enumerate(entries):
        y, cls = ROW * i, "ours" if ours else "theirs"
        numbers = ", ".join(f"{m} {v:.4g}" for m, v in zip(marks, values, strict=True))
        parts.append(text(left, y + 15, f'{escape(label)} <tspan class="faint">{escape(numbers)} {unit}</tspan>'))
        xs = [left + v * scale for v in values]
        parts.append(path("base", f"M{left} {y + 29} H{WIDTH - right}"))
        parts.append(path(f"line {cls}", f"M{xs[0]:.1f} {y + 29} H{xs[-1]:.1f}"))
        parts += [dot(cls, x, y + 29, 5 - j) for j, x in enumerate(xs)]
    return _svg(ROW * len(entries) + 6, parts)


def roofline(points: Sequence[tuple[str, float, float, bool]], flops_per_s: float, bytes_per_s: float) -> str:
    """Log-log: (label, FLOP per byte, FLOP/s, ours); the machine's two measured ceilings make the roof."""
    height, left, bottom, pad = 380, 64, 44, 14
    ridge = flops_per_s / bytes_per_s
    x0 = math.floor(math.log10(min([p[1] for p in points] + [ridge])) - 0.2)
    x1 = math.ceil(math.log10(max([p[1] for p in points] + [ridge])) + 0.2)
    y0 = math.floor(math.log10(min([p[2] for p in points] + [10**x0 * bytes_per_s])))
    y1 = math.ceil(math.log10(max([p[2] for p in points] + [flops_per_s])) + 0.1)

    def at_x(v: float) -> float:
        return left + (math.log10(v) - x0) / (x1 - x0) * (WIDTH - left - pad)

    def at_y(v: float) -> float:
        return height - bottom - (math.log10(v) - y0) / (y1 - y0) * (height - bottom - pad)

    parts = []
    for d in range(x0, x1 + 1):
        parts.append(path("grid", f"M{at_x(10**d):.1f} {pad} V{height - bottom}"))
        parts.append(text(at_x(10**d), height - bottom + 18, f"{10.0**d:g}", "faint", "middle"))
    for d in range(y0, y1 + 1):
        parts.append(path("grid", f"M{left} {at_y(10**d):.1f} H{WIDTH - pad}"))
        parts.append(text(left - 6, at_y(10**d) + 5, _short(10**d), "faint", "end"))
    parts.append(text(WIDTH - pad, height - 6, "across: FLOP per byte; up: FLOP/s", "faint", "end"))
    start, corner = (at_x(10**x0), at_y(10**x0 * bytes_per_s)), (at_x(ridge), at_y(flops_per_s))
    parts.append(path("roof", f"M{start[0]:.1f} {start[1]:.1f} L{corner[0]:.1f} {corner[1]:.1f} H{WIDTH - pad}"))
    for label, x, y, ours in points:
        parts.append(dot("ours" if ours else "theirs", at_x(x), at_y(y), 5, f"{label}: {y / 1e9:.3g} GFLOP/s"))
    return _svg(height, parts)


def _short(v: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if v >= scale:
            return f"{v / scale:g} {unit}"
    return f"{v:g}"


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
