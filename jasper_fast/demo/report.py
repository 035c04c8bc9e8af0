"""The demo's page: one HTML file that needs nothing else, readable in light and dark and on a phone."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

import numpy as np

# Magma-like stops, dark to bright: readable on a light and on a dark page.
_PALETTE = (
    (11, 9, 36),
    (60, 16, 110),
    (129, 37, 129),
    (200, 62, 115),
    (246, 110, 92),
    (254, 176, 120),
    (252, 240, 190),
)

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1a1c1e; --soft: #5d646b; --line: #dfe2e5;
  --grid: #eceeef; --fused: #0b6bcb; --eager: #8a9199; --good: #0f7b53; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e8eaec; --soft: #a0a8b0;
  --line: #32383e; --grid: #272c31; --fused: #5fb0ff; --eager: #8b949e; --good: #4cc38a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p { margin: .5rem 0; max-width: 44rem; }
.soft, figcaption, th, dt { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12rem, 100%), 1fr)); gap: .75rem;
  margin: 1.5rem 0; }
.tile, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tile { padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .875rem; }
.trio { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: .75rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .75rem; }
figure { margin: 0 0 .75rem; padding: .9rem 1rem; min-width: 0; }
figcaption { font-size: .875rem; margin-bottom: .5rem; }
figcaption strong { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); }
.curve { fill: none; stroke: var(--fused); stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.dot { fill: var(--fused); stroke: var(--card); stroke-width: 1.5; }
.spectrogram { display: block; width: 100%; height: 11rem; border-radius: .25rem; }
.words { font-size: 1.15rem; font-weight: 600; margin: .6rem 0 0; }
.right { color: var(--good); } .wrong { color: var(--ink); }
audio { width: 100%; max-width: 26rem; height: 2.2rem; margin-top: .6rem; display: block; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem; text-align: right; border-top: 1px solid var(--grid); }
th { font-weight: 500; font-size: .875rem; border-top: 0; }
td:first-child, th:first-child { text-align: left; }
tr td:last-child { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { th, td { padding: .5rem .5rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; }
"""


def png(levels: np.ndarray) -> bytes:
    """A PNG file of `levels` (rows, columns) in [0, 1], row 0 at the top, coloured from dark to bright."""
    stops = np.array(_PALETTE, dtype=np.float64)
    x = np.linspace(0, len(stops) - 1, 256)
    palette = np.stack([np.interp(x, np.arange(len(stops)), stops[:, c]) for c in range(3)], 1).round().astype(np.uint8)
    pixels = (np.clip(levels, 0, 1) * 255).round().astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", palette.tobytes())
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


def spectrogram(features: np.ndarray) -> bytes:
    """A PNG of log-mel `features` (bands, frames), low bands at the bottom, from their 5 % to their 99.5 % level."""
    low, high = np.percentile(features, [5, 99.5])
    return png((features[::-1] - low) / max(high - low, 1e-9))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _ticks(top: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least `top`."""
    raw = max(top, 1e-9) / count
    unit = 10.0 ** floor(log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    return [i * step for i in range(ceil(top / step - 1e-9) + 1)]


def chart(points: Sequence[tuple[float, float]], *, unit: str, label: str, dots: bool = False) -> str:
    """An SVG line chart of (minutes, value) points from zero; each dot tells its value when pointed at."""
    left, right, top, bottom, width, height = 44, 12, 10, 34, 460, 230
    xs, ys = _ticks(max((x for x, _ in points), default=1)), _ticks(max((y for _, y in points), default=1))
    x_top = max((x for x, _ in points), default=1) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / x_top * (width - left - right), height - bottom - y / ys[-1] * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for y in ys:
        _, py = at(0, y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{y:g}{unit}</text>')
    for x in xs:
        if x <= x_top * 1.001:
            px, py = at(x, 0)
            parts.append(f'<text x="{px:.1f}" y="{py + 16:.1f}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 3}" text-anchor="end">minutes of training</text>')
    x0, y0 = at(0, 0)
    parts.append(f'<line class="axis" x1="{x0}" x2="{width - right}" y1="{y0:.1f}" y2="{y0:.1f}"/>')
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in points))
    parts.append(f'<polyline class="curve" points="{path}"/>')
    if dots:
        for x, y in points:
            px, py = at(x, y)
            text = f"{x:.1f} min: {y:.3g}{unit}"
            parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="4.5"><title>{text}</title></circle>')
    parts.append("</svg>")
    return "".join(parts)


def _example(example: dict, features: np.ndarray | None, wav: bytes | None) -> str:
    right = example["reference"] == example["transcript"]
    parts = [f"<figure><figcaption>Voice <strong>{escape(example['speaker'])}</strong>, not in training"]
    parts.append(f" &#183; <code>{escape(example['file'])}</code></figcaption>")
    if features is not None:
        image = _uri("image/png", spectrogram(features))
        parts.append(f'<img class="spectrogram" alt="log-mel spectrogram, low frequencies below" src="{image}"/>')
    if wav is not None:
        parts.append(f'<audio controls="controls" preload="none" src="{_uri("audio/wav", wav)}"></audio>')
    said = escape(example["transcript"]) or "(nothing)"
    parts.append(f'<p class="words {"right" if right else "wrong"}">{said}</p>')
    parts.append(
        f'<p class="soft">{"word for word" if right else "spoken: " + escape(example["reference"])}</p></figure>'
    )
    return "".join(parts)


def comparison_rows(result: dict) -> list[tuple[str, str, str, str]]:
    """(what, eager, fused, gain) for each measured quantity; the terminal's table and the page's share them."""
    rows = []
    for title, key, ratio in (
        ("Training step", "train", result["train_step_ratio"]),
        ("Inference", "inference", result["inference_ratio"]),
    ):
        m = result[key]
        rates = (f"{m[f'{side}_utterances_per_second']:.1f}" for side in ("eager", "fused"))
        rows.append((f"{title}, {m['shape']}: utterances per second", *rates, f"{ratio:.2f}\u00d7"))
    m = result["memory"]
    sizes = (f"{m[f'{side}_bytes'] / 1e6:.1f}" for side in ("eager", "fused"))
    rows.append((f"Kept for backward, {m['shape']}: MB", *sizes, f"{result['memory_ratio']:.2f}\u00d7"))
    return rows


def render(
    result: dict,
    features: Sequence[np.ndarray | None] = (),
    wavs: Sequence[bytes | None] = (),
) -> str:
    """The page for a `result` as in result.json; `features` (bands, frames) and `wavs` go with its `examples`."""
    losses = [(p["seconds"] / 60, p["loss"]) for p in result["curves"]["loss"]]
    wers = [(p["seconds"] / 60, 100 * p["wer"]) for p in result["curves"]["wer"]]
    data, model, machine = result["corpus"], result["model"], result["machine"]
    tiles = (
        (f"{100 * result['wer_unseen']:.1f} %", f"word error rate on {data['test_voices']} voices not in training"),
        (f"{result['train_step_ratio']:.2f}&#215;", "speed of a training step, fused against eager"),
        (f"{result['inference_ratio']:.2f}&#215;", "speed of inference, fused against eager"),
        (f"{result['memory_ratio']:.2f}", "of eager's bytes kept for backward"),
    )
    examples = result["examples"]
    pad = [None] * len(examples)
    shown = [
        _example(e, f, w)
        for e, f, w in zip(examples, [*features, *pad][: len(examples)], [*wavs, *pad][: len(examples)], strict=True)
    ]
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in comparison_rows(result)
    )
    facts = {
        "Machine": f"{machine['name']}, {machine['device']}, {machine['threads']} threads",
        "Versions": ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "Model": f"{model['name']}, {model['parameters']:,} parameters",
        "Time": ", ".join(f"{k} {v:.0f} s" for k, v in result["seconds"].items()),
        "Command": f"<code>{escape(result['command'])}</code>",
        "Date": result["date"],
    }
    details = "".join(f"<dt>{k}</dt><dd>{v if v.startswith('<code>') else escape(v)}</dd>" for k, v in facts.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>jasper_fast demo: {100 * result["wer_unseen"]:.1f} % WER on unseen voices</title>
<style>{_STYLE}</style>
</head>
<body><main>
<h1>A fused Jasper, trained here in {result["seconds"]["training"] / 60:.1f} minutes</h1>
<p class="soft">{data["train_utterances"]} commands spoken by {data["train_voices"]} synthetic voices
({data["train_minutes"]:.0f} minutes) to learn from, {data["test_utterances"]} by {data["test_voices"]} other voices to
be judged by. Everything on this page was measured in one run on this machine.</p>
<div class="tiles">{"".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in tiles)}</div>
<h2>Learning</h2>
<div class="pair">
<figure><figcaption><strong>Training loss</strong>, CTC per utterance</figcaption>
{chart(losses, unit="", label="training loss over time")}</figure>
<figure><figcaption><strong>Word error rate</strong> on the unseen voices</figcaption>
{chart(wers, unit=" %", label="word error rate over time", dots=True)}</figure>
</div>
<h2>What it hears</h2>
<div class="trio">{"".join(shown)}</div>
<h2>Fused beside eager</h2>
<div class="table"><table><thead><tr><th>same weights, same batch, alternating</th>
<th>eager PyTorch</th><th>jasper_fast</th><th>gain</th></tr></thead><tbody>{rows}</tbody></table></div>
<p class="soft">Eager is the plain model: separate convolution, batch norm, ReLU, dropout and mask passes. Times
are medians of alternating runs.</p>
<h2>This run</h2>
<dl>{details}</dl>
</main></body>
</html>
"""
