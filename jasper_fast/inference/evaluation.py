"""Summarises an evaluation: error rates overall and by set, length and speaker, and a page of the worst utterances."""

import base64
import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import soundfile

from jasper_fast import page
from jasper_fast.data.manifest import Utterance
from jasper_fast.data.shards import Packed
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError, ShortAudio
from jasper_fast.speech.metrics import alignment

Row = dict[str, Any]  # an utterance: text, pred_text, duration, word_errors, words, character_errors, characters, ...
LENGTHS = (2.0, 5.0, 10.0, 15.0)  # seconds: the bounds between the classes of `length_of`


def length_of(row: Row) -> str:
    """Returns the name of the length class to which an utterance belongs."""
    upper = bisect_right(LENGTHS, row["duration"])
    low = f"{LENGTHS[upper - 1]:g}" if upper else "0"
    return f"{low} to {LENGTHS[upper]:g} s" if upper < len(LENGTHS) else f"{low} s and more"


def grouped(rows: Sequence[Row], key: Callable[[Row], str | None]) -> dict[str, dict[str, Any]]:
    """Groups rows by the name that ``key`` returns, and returns ``totals`` by name. Rows with the name None are left
    out."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if (name := key(row)) is not None:
            groups.setdefault(name, []).append(row)
    return {name: totals(group) for name, group in sorted(groups.items())}


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns counts and error rates of ``rows``. If the references have no words, ``wer`` is the number of errors."""
    sums = {k: sum(row[k] for row in rows) for k in ("word_errors", "words", "character_errors", "characters")}
    return {
        "utterances": len(rows),
        "seconds": round(sum(row["duration"] for row in rows), 3),
        **sums,
        "wer": sums["word_errors"] / max(sums["words"], 1),
        "cer": sums["character_errors"] / max(sums["characters"], 1),
    }


def by_parts(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns ``totals`` by manifest, by length and by speaker."""
    return {
        "sets": grouped(rows, lambda row: row["manifest"]),
        "lengths": dict(sorted(grouped(rows, length_of).items(), key=lambda item: float(item[0].split()[0]))),
        "speakers": grouped(rows, lambda row: row.get("speaker")),
    }


def worst(rows: Sequence[Row], count: int) -> list[Row]:
    """Returns the ``count`` rows with the highest word error rates, the worst first. Rows without errors are left
    out."""
    bad = sorted((r for r in rows if r["word_errors"]), key=lambda r: r["word_errors"] / max(r["words"], 1))
    return bad[::-1][: max(count, 0)]


def sound(row: Row) -> str | None:
    """Returns the audio of an utterance as a data URI (FLAC, 16 kHz), or None if it cannot be read."""
    try:
        packed = Packed(row["tar"], row["tar_start"], row["tar_size"]) if "tar" in row else None
        source = Utterance(row["audio_filepath"], row["duration"], "", packed=packed).source()
        samples = audio.load(source, 16000, row["offset"], row["duration"])
    except ShortAudio as short:
        samples = short.samples
    except AudioError:
        return None
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(file.getvalue()).decode()}"


def html(figures: dict[str, Any], rows: Sequence[Row], count: int) -> str:
    """Returns the page: figures, histograms, and the ``count`` worst utterances with their alignment and audio."""
    shown = [
        row | {"aligned": alignment(row["text"], row["pred_text"]), "sound": sound(row)} for row in worst(rows, count)
    ]
    histograms = {
        "word error rate of an utterance, %": page.histogram(
            [100 * r["word_errors"] / max(r["words"], 1) for r in rows]
        ),
        "seconds of an utterance": page.histogram([r["duration"] for r in rows]),
        "confidence": page.histogram([r["confidence"] for r in rows]),
    }
    return page.render(
        Path(__file__).parent, "evaluation.html.j2", figures=figures, worst=shown, histograms=histograms,
    )  # fmt: skip
