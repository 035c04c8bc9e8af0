"""Renders reports as HTML pages. A page is a single file and adapts to light and dark mode and to small screens.

page.html.j2 here has the style, tables and histograms. The templates of `evaluate` and of the manifest check extend it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jasper_fast.extras import need


def render(folder: Path, template: str, **values: Any) -> str:
    """Renders ``template`` of ``folder`` with ``values``, and returns the page. Raises MissingExtra if jinja2 is not
    installed."""
    jinja2 = need("jinja2", "train")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]), undefined=jinja2.StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(values)


def histogram(values: Sequence[float], bins: int = 24) -> list[tuple[float, float, int]]:
    """Returns (low, high, count) for each bin of a histogram of the finite values. There are at most about ``bins``
    bins, and their width is a round number. Without finite values the list is empty."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return []
    low, high = min(finite), max(finite)
    raw = max((high - low) / bins, 1e-9 * max(abs(low), abs(high), 1e-3))
    unit = 10.0 ** math.floor(math.log10(raw))
    width = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    counts = Counter(math.floor(value / width) for value in finite)
    return [(i * width, (i + 1) * width, counts[i]) for i in range(min(counts), max(counts) + 1)]
