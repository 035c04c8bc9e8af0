"""Renders the demo's page: one HTML file, for light and dark mode and for small screens."""

import base64
import struct
import zlib
from collections.abc import Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast import page
from jasper_fast.extras import need

# Colours from dark to bright, similar to matplotlib's colour map magma: readable on a light and on a dark page.
_PALETTE = (
    (11, 9, 36),
    (60, 16, 110),
    (129, 37, 129),
    (200, 62, 115),
    (246, 110, 92),
    (254, 176, 120),
    (252, 240, 190),
)


def png(levels: np.ndarray) -> bytes:
    """Returns a PNG file of `levels` (rows, columns) in [0, 1], row 0 at the top, coloured from dark to bright."""
    stops = np.array(_PALETTE, dtype=np.float64)
    x = np.linspace(0, len(stops) - 1, 256)
    palette = np.stack([np.interp(x, np.arange(len(stops)), stops[:, c]) for c in range(3)], 1).round().astype(np.uint8)
    pixels = (np.clip(levels, 0, 1) * 255).round().astype(np.uint8)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels), 9)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", rows), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def spectrogram(features: np.ndarray) -> bytes:
    """Returns a PNG file of log-mel `features` (bands, frames), low bands at the bottom. The darkest colour is the 5 %
    quantile, the brightest the 99.5 % quantile."""
    low, high = np.percentile(features, [5, 99.5])
    return png((features[::-1] - low) / max(high - low, 1e-9))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def ticks(top: float) -> list[float]:
    """Returns round numbers in equal steps, from 0 to at least `top`."""
    raw = max(top, 1e-9) / 4  # at most four steps
    unit = 10.0 ** floor(log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-10))
    return [i * step for i in range(ceil(top / step - 1e-9) + 1)]


def chart(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Returns what the template needs to draw a line chart of (minutes, value) `points`: the positions of ticks and
    points. Both axes begin at zero."""
    left, right, top, bottom = 44, 448, 10, 196
    x_top = max((x for x, _ in points), default=0) or 1
    ys = ticks(max((y for _, y in points), default=1))

    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + x / x_top * (right - left), 1), round(bottom - y / ys[-1] * (bottom - top), 1)

    return {
        "width": 460, "height": 230, "left": left, "right": right, "bottom": bottom,
        "xs": [(f"{x:g}", at(x, 0)[0]) for x in ticks(x_top) if x <= x_top * 1.001],
        "ys": [(f"{y:g}", at(0, y)[1]) for y in ys],
        "points": [{"x": x, "y": y, "at_x": at(x, y)[0], "at_y": at(x, y)[1]} for x, y in points],
    }  # fmt: skip


def comparison_rows(result: dict) -> list[tuple[str, ...]]:
    """Returns the rows of the comparison for the terminal and the page: (measured quantity, eager, fused, their ratio,
    meaning of the ratio)."""
    rows = []
    for what, key in (("Training step", "train"), ("Inference", "inference")):
        m = result[key]
        rates = [f"{m[f'{side}_utterances_per_second']:.1f}" for side in ("eager", "fused")]
        title, meaning = f"{what}, {m['shape']}: utterances per second", f"times eager's speed, {what.lower()}"
        rows.append((title, *rates, f"{m['ratio']:.2f}", meaning))
    m = result["memory"]
    sizes = [f"{m[f'{side}_bytes'] / 1e6:.1f}" for side in ("eager", "fused")]
    title, meaning = f"Kept for backward, {m['shape']}: MB", "of eager's bytes, kept for backward"
    return [*rows, (title, *sizes, f"{m['ratio']:.2f}", meaning)]


def render(result: dict, features: Sequence[np.ndarray], wavs: Sequence[bytes]) -> str:
    """Returns the page for `result`, the content of result.json. `features` (bands, frames) and `wavs` (WAV files) are
    those of its `examples`.

    Raises MissingExtra if jinja2 is not installed.
    """
    need("jinja2", "demo")
    examples = [
        e | {"image": _uri("image/png", spectrogram(f)), "sound": _uri("audio/wav", wav)}
        for e, f, wav in zip(result["examples"], features, wavs, strict=True)
    ]
    losses, wers = result["curves"]["loss"], result["curves"]["wer"]
    values = {
        "examples": examples,
        "rows": comparison_rows(result),
        "losses": chart([(p["minutes"], p["loss"]) for p in losses]),
        "wers": chart([(p["minutes"], 100 * p["wer"]) for p in wers]),
    }
    return page.render(Path(__file__).parent, "page.html.j2", **result | values)
