"""Finds what is wrong with the utterances of a manifest before a training run reads them."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jasper_fast import page
from jasper_fast.data import places
from jasper_fast.data.dataset import ctc_frames
from jasper_fast.data.manifest import ManifestError, Utterance, each_utterance
from jasper_fast.data.prepare.copies import in_parallel
from jasper_fast.data.prepare.writing import Progress
from jasper_fast.data.reading import AudioReader
from jasper_fast.speech.audio import AudioError, ShortAudio
from jasper_fast.speech.text import UnknownSymbolError, Vocabulary, normalize_and_lost

SILENT_DB = -60.0  # dB of full scale; an utterance without a sample above this level counts as silent
CLIPPED = 0.001  # an utterance with more than this fraction of its samples at full scale counts as clipped
_FULL = 0.9995  # a sample of at least this absolute value counts as at full scale
_WARNINGS = {"clipped", "out_of_alphabet"}  # without `strict`, an utterance that has only these faults is kept
REASONS = {
    "bad_entry": "the line is not a valid utterance",
    "unreadable": "the audio cannot be read",
    "truncated": "the audio is shorter than the file's header says",
    "wrong_duration": "the audio is shorter than the manifest says",
    "silent": f"all samples are below {SILENT_DB:g} dB of full scale",
    "clipped": f"more than {CLIPPED:.1%} of the samples are at full scale",
    "empty_text": "no symbol of the text can be used",
    "too_long": "longer than --max-duration",
    "too_short": "shorter than --min-duration",
    "too_short_for_ctc": "fewer output frames than CTC needs for the text",
    "out_of_alphabet": "the text has symbols that are not in the alphabet",
    "duplicate": "the same samples as an earlier utterance",
}


@dataclass(frozen=True)
class Rules:
    """The rules for utterances: the alphabet, the shortest and longest duration in seconds, and ``frame_samples``, the
    number of samples per output frame of the model."""

    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    min_duration: float = 0.1
    max_duration: float = 16.7
    frame_samples: int = 320
    sample_rate: int = 16000
    normalize_text: bool = True
    strict: bool = False  # also leave out utterances that are otherwise only reported


class Fault(NamedTuple):
    """A fault of an utterance: a key of REASONS, and details."""

    reason: str
    detail: str


@dataclass
class Found:
    """What was found about one entry of a manifest; ``utterance`` is None if the entry is not valid. Levels are in dB
    of full scale, and ``print_of_samples`` is a hash of the samples."""

    entry: Any
    utterance: Utterance | None
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    peak_db: float = -math.inf
    level_db: float = -math.inf
    symbols: int = 0
    print_of_samples: bytes = b""

    def fault(self, reason: str, detail: str) -> None:
        self.faults.append(Fault(reason, detail))

    def good(self, strict: bool = False) -> bool:
        """Returns whether the entry belongs in the clean manifest."""
        return all(f.reason in _WARNINGS and not strict for f in self.faults)

    @property
    def name(self) -> str:
        return self.utterance.name if self.utterance else ""


def look(entry: Any, utterance: Utterance, rules: Rules) -> Found:
    """Reads the audio of an utterance, and checks audio and text against the rules."""
    found, text = Found(entry, utterance), utterance.text
    text, lost = normalize_and_lost(text, rules.vocabulary) if rules.normalize_text else (text, [])
    try:
        target = rules.vocabulary.encode(text)
    except UnknownSymbolError as error:
        target, lost = [], [str(error)]
    if lost:
        found.fault("out_of_alphabet", " ".join(lost))
    found.symbols = len(target)
    if not target:
        found.fault("empty_text", repr(utterance.text[:80]))
    try:
        samples, _ = AudioReader(rules.sample_rate).read(utterance)
    except AudioError as error:
        found.fault(error.reason, error.cause)
        if not isinstance(error, ShortAudio):
            return found
        samples = error.samples
    _listen(found, samples, rules)
    needed, frames = ctc_frames(target), -(-len(samples) // rules.frame_samples)
    if frames < needed:
        found.fault(
            "too_short_for_ctc", f"{frames} output frames, but CTC needs {needed} for its {len(target)} symbols"
        )
    return found


def _listen(found: Found, samples: np.ndarray, rules: Rules) -> None:
    """Adds the length, levels, hash and faults of the samples to ``found``."""
    found.seconds = len(samples) / rules.sample_rate
    found.print_of_samples = hashlib.blake2b(samples.tobytes(), digest_size=16).digest()
    size = np.abs(samples)
    peak, level = float(size.max()), math.sqrt(float(np.mean(np.square(samples, dtype=np.float64))))
    found.peak_db, found.level_db = (20 * math.log10(v) if v > 0 else -math.inf for v in (peak, level))
    if found.peak_db < SILENT_DB:
        found.fault("silent", f"the loudest sample is at {found.peak_db:.0f} dB")
    elif (part := float(np.mean(size >= _FULL))) > CLIPPED:
        found.fault("clipped", f"{part:.2%} of the samples are at full scale")
    if not rules.min_duration <= found.seconds <= rules.max_duration:
        found.fault("too_long" if found.seconds > rules.max_duration else "too_short", f"{found.seconds:.2f} s")


def check(
    manifest: str | os.PathLike,
    rules: Rules,
    data_dir: str | os.PathLike | None,
    jobs: int,
    progress: Progress,
) -> list[Found]:
    """Checks every entry of a manifest, and returns what was found. Raises ManifestError if the file itself cannot be
    read."""

    def work(entry: Any) -> Found:
        if isinstance(entry, ManifestError):
            return Found(None, None, [Fault("bad_entry", str(entry))])
        return look(*entry, rules)

    results = list(in_parallel(work, list(each_utterance(manifest, data_dir)), jobs, "check", progress))
    first: dict[bytes, Found] = {}
    for found in results:
        original = first.setdefault(found.print_of_samples, found)
        if found.print_of_samples and original is not found:
            found.fault("duplicate", f"the same as {original.name}")
    return results


def clean_entries(
    results: Sequence[Found], manifest: str, target: Path, data_dir: str | os.PathLike | None = None, strict=False
) -> Iterator[dict[str, Any]]:
    """Yields the entries of the clean manifest ``target``. Paths in them become absolute if ``target`` is in another
    folder than ``manifest``, or if ``data_dir`` is given."""
    root = os.fspath(data_dir or places.parent(manifest))
    same = os.path.realpath(places.parent(manifest)) == os.path.realpath(target.parent) and data_dir is None

    def place(name: str) -> str:
        full = places.joined(root, name)
        return name if same else full if places.is_url(full) else places.absolute(full)

    for found in results:
        if found.utterance is None or not found.good(strict):
            continue
        texts = {key for key in ("text", "transcript") if found.entry.get(key) is not None}
        entry = {k: v for k, v in found.entry.items() if k in texts or k not in ("text", "transcript", "text_filepath")}
        if "files" in entry:
            entry["files"] = [file | {"fname": place(file["fname"])} for file in entry["files"]]
            entry["original_duration"] = round(found.seconds, 6)
        if "shard_id" in entry and not same:
            tar = found.utterance.packed.tar
            entry["tar"] = tar if places.is_url(tar) else places.absolute(tar)
            entry["duration"] = round(found.seconds, 6)
        elif "audio_filepath" in entry:
            entry |= {"audio_filepath": place(entry["audio_filepath"]), "duration": round(found.seconds, 6)}
        yield entry if texts else entry | {"text": found.utterance.text}


def figures(results: Sequence[Found], strict: bool) -> dict[str, Any]:
    """Returns counts and hours as values that JSON can store."""
    good = [f for f in results if f.good(strict)]
    return {
        "entries": len(results),
        "good": len(good),
        "hours": sum(f.seconds for f in results) / 3600,
        "good_hours": sum(f.seconds for f in good) / 3600,
        "speakers": len({f.utterance.speaker for f in results if f.utterance and f.utterance.speaker}),
        "faults": dict(Counter(fault.reason for f in results for fault in f.faults).most_common()),
    }


def culprits(results: Sequence[Found], reason: str) -> list[tuple[str, str, str]]:
    """Returns the name, the details and the beginning of the text of each utterance that has this fault."""
    faults = ((found, fault) for found in results for fault in found.faults if fault.reason == reason)
    return [(of.name, fault.detail, of.utterance.text[:200] if of.utterance else "") for of, fault in faults]


def html(manifest: str, results: Sequence[Found], rules: Rules, most: int = 200) -> str:
    """Returns an HTML page with histograms and at most ``most`` faulty utterances per kind of fault."""
    heard = [f for f in results if f.seconds]
    histograms = {
        "seconds": page.histogram([f.seconds for f in heard]),
        "level, dB of full scale": page.histogram([f.level_db for f in heard]),
        "peak, dB of full scale": page.histogram([f.peak_db for f in heard]),
        "symbols a second": page.histogram([f.symbols / f.seconds for f in heard]),
    }
    summary = figures(results, rules.strict)
    return page.render(
        Path(__file__).parent, "check.html.j2", manifest=manifest, summary=summary, reasons=REASONS, most=most,
        histograms=histograms, culprits={reason: culprits(results, reason) for reason in summary["faults"]},
        rules=rules, warnings=_WARNINGS,
    )  # fmt: skip


def record(manifest: str, results: Sequence[Found], strict: bool) -> dict[str, Any]:
    """Returns counts and faulty utterances as values that JSON can store."""
    return figures(results, strict) | {
        "manifest": manifest,
        "culprits": [
            {"name": f.name, "seconds": round(f.seconds, 3), "faults": [fault._asdict() for fault in f.faults]}
            for f in results
            if f.faults
        ],
    }
