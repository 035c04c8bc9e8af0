"""From manifests to batches: reading, filtering, perturbing, joining, bucketing, collating.

Everything random is a function of (seed, epoch, index), so a resumed run draws what the uninterrupted one would have.
What cannot be used is skipped, counted by reason and listed in ``SpeechDataset.skipped``; it never ends a run.

Shapes: N utterances, S samples, U target symbols.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jasper_fast import audio
from jasper_fast.audio import AudioError
from jasper_fast.text import UnknownSymbolError, Vocabulary, normalize

_SUBSTITUTES = 8  # other utterances tried in the place of one that cannot be read, in training


class ManifestError(ValueError):
    """A manifest cannot be read; the message names the file, the line or entry, and what is wrong."""


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest: ``duration`` seconds of the file at ``path`` from ``offset`` seconds on, and its text.

    ``alternatives``: files of the same utterance at other speeds, of which training takes one at random.
    """

    path: str
    duration: float
    text: str
    offset: float = 0.0
    speaker: str | None = None
    alternatives: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.path}@{self.offset:g}" if self.offset else self.path


def read_manifest(
    path: str | os.PathLike, data_dir: str | os.PathLike | None = None, offline_speeds: bool = False
) -> list[Utterance]:
    """Utterances of a manifest: JSON lines (NeMo: audio_filepath, duration, text[, offset, speaker]) or one JSON array
    (the reference: transcript, files, original_duration).

    Relative paths are taken from ``data_dir``, by default the manifest's folder. A missing duration is read from the
    file's header (NaN where that fails: the dataset reports it). Of the reference's ``files`` the one at speed 1 is
    used, all of them with ``offline_speeds``. Raises ManifestError naming the line or entry.
    """
    path = Path(path)
    root = Path(data_dir) if data_dir is not None else path.parent
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot read the manifest: {error}") from error
    utterances = []
    for where, entry in _entries(path, content):
        try:
            utterances.append(_utterance(entry, root, offline_speeds))
        except (KeyError, TypeError, ValueError, OSError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise ManifestError(f"{path}, {where}: {what}") from error
    if not utterances:
        raise ManifestError(f"{path}: holds no utterances")
    return utterances


def _entries(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    if content.lstrip().startswith("["):
        try:
            entries = json.loads(content)
        except json.JSONDecodeError as error:
            raise ManifestError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
        for i, entry in enumerate(entries):
            yield f"entry {i}", entry
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(
                    f"{path}, line {number}: not valid JSON: {error.msg} (column {error.colno})"
                ) from error


def _utterance(entry: Any, root: Path, offline_speeds: bool) -> Utterance:
    if not isinstance(entry, dict):
        raise TypeError(f"expected an object with 'audio_filepath' or 'files', got {type(entry).__name__}")
    text = next((entry[k] for k in ("text", "transcript") if entry.get(k) is not None), None)
    if text is None:
        if "text_filepath" not in entry:
            raise KeyError("text")
        text = (root / entry["text_filepath"]).read_text(encoding="utf-8").replace("\n", " ")
    if not isinstance(text, str):
        raise TypeError(f"the text must be a string, got {text!r}")
    alternatives: tuple[str, ...] = ()
    if "files" in entry:
        files = entry["files"]
        plain = [f for f in files if f.get("speed", 1.0) == 1.0] or files
        if not plain:
            raise ValueError("'files' is empty")
        file = plain[0]["fname"]
        if offline_speeds:
            alternatives = tuple(str(root / f["fname"]) for f in files)
        duration = entry.get("original_duration", plain[0].get("duration"))
    else:
        file, duration = entry["audio_filepath"], entry.get("duration")
    offset = float(entry.get("offset") or 0.0)
    path = str(root / file)
    if duration is None:
        try:
            duration = audio.duration(path) - offset
        except AudioError:
            duration = math.nan
    speaker = entry.get("speaker")
    return Utterance(path, float(duration), text, offset, None if speaker is None else str(speaker), alternatives)


class Skipped(NamedTuple):
    """Why an utterance was left out: ``reason`` is one of a few words to count by, ``detail`` says it in full."""

    name: str
    reason: str
    detail: str


@dataclass
class SkipReport:
    """What was left out: ``counts`` by reason and ``items``, each utterance once for each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    items: list[Skipped] = field(default_factory=list)
    _seen: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def add(self, skipped: Sequence[Skipped]) -> None:
        for item in skipped:
            if (item.name, item.reason) not in self._seen:
                self._seen.add((item.name, item.reason))
                self.counts[item.reason] += 1
                self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        return f"{len(self)} skipped ({reasons})" if self.items else "none skipped"


@dataclass(frozen=True)
class SpeedPerturbation:
    """Plays an utterance min_rate to max_rate times as fast with probability p; discrete: one of min, 1, max."""

    min_rate: float = 0.85
    max_rate: float = 1.15
    discrete: bool = False
    p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.min_rate <= self.max_rate:
            raise ValueError(f"speed_perturbation: need 0 < min_rate <= max_rate, got {self.min_rate}, {self.max_rate}")

    def draw(self, rng: np.random.Generator) -> float:
        apply, uniform = rng.random() < self.p, rng.random()
        if not apply:
            return 1.0
        if self.discrete:
            return (self.min_rate, 1.0, self.max_rate)[int(uniform * 3)]
        return self.min_rate + uniform * (self.max_rate - self.min_rate)


@dataclass(frozen=True)
class TempoPerturbation:
    """Speaks min_rate to max_rate times as fast at the same pitch, log-uniform, with probability p."""

    min_rate: float = 0.8
    max_rate: float = 1.25
    p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.min_rate <= self.max_rate:
            raise ValueError(f"tempo_perturbation: need 0 < min_rate <= max_rate, got {self.min_rate}, {self.max_rate}")

    def draw(self, rng: np.random.Generator) -> float:
        apply, uniform = rng.random() < self.p, rng.random()
        return self.min_rate * (self.max_rate / self.min_rate) ** uniform if apply else 1.0


@dataclass(frozen=True)
class GainPerturbation:
    """Changes the level by min_gain_dbfs to max_gain_dbfs decibels with probability p."""

    min_gain_dbfs: float = -10.0
    max_gain_dbfs: float = 10.0
    p: float = 0.1

    def draw(self, rng: np.random.Generator) -> float:
        apply, uniform = rng.random() < self.p, rng.random()
        return self.min_gain_dbfs + uniform * (self.max_gain_dbfs - self.min_gain_dbfs) if apply else 0.0


@dataclass(frozen=True)
class ShiftPerturbation:
    """Moves an utterance by min_shift_ms to max_shift_ms to the left with probability p; zeros come in."""

    min_shift_ms: float = -5.0
    max_shift_ms: float = 5.0
    p: float = 0.1

    def draw(self, rng: np.random.Generator) -> float:
        apply, uniform = rng.random() < self.p, rng.random()
        return self.min_shift_ms + uniform * (self.max_shift_ms - self.min_shift_ms) if apply else 0.0


@dataclass(frozen=True)
class NoisePerturbation:
    """Adds noise min_snr_db to max_snr_db below the utterance's mean power with probability p, from white to brown."""

    min_snr_db: float = 5.0
    max_snr_db: float = 60.0
    p: float = 1.0

    def __post_init__(self) -> None:
        if not self.min_snr_db <= self.max_snr_db:
            raise ValueError(
                f"noise_perturbation: min_snr_db {self.min_snr_db} is more than max_snr_db {self.max_snr_db}"
            )

    def draw(self, rng: np.random.Generator) -> tuple[float, float, int] | None:
        """Decibels below the speech, the exponent of the noise's power over frequency (0 white, -2 brown), its seed."""
        apply, snr, slope = rng.random() < self.p, rng.uniform(self.min_snr_db, self.max_snr_db), -2 * rng.random()
        return (snr, slope, int(rng.integers(2**32))) if apply else None

    @staticmethod
    def add(samples: np.ndarray, snr_db: float, slope: float, seed: int) -> np.ndarray:
        """The samples with the noise; silence stays as it is."""
        spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(len(samples), np.float32))
        spectrum *= np.linspace(0.01, 1, len(spectrum)) ** (slope / 2)  # flat below 1 % of the band
        noise = np.fft.irfft(spectrum, len(samples))
        wanted = np.sqrt(np.mean(np.square(samples, dtype=np.float64))) * 10 ** (-snr_db / 20)
        return (samples + noise * (wanted / max(noise.std(), 1e-12))).astype(np.float32)


@dataclass(frozen=True)
class Join:
    """Joins min_clips..max_clips utterances into one, with silences of min_gap..max_gap seconds around and between.

    Each item holds its own utterance and random others, of the same speaker with ``same_speaker`` (where speakers are
    known). ``noise_db`` (low, high) fills the silences with white noise of that level below full scale; None: zeros.
    ``items`` per epoch: as many as there are utterances, unless given.
    """

    min_clips: int = 1
    max_clips: int = 7
    min_gap: float = 0.0
    max_gap: float = 0.3
    same_speaker: bool = True
    noise_db: tuple[float, float] | None = None
    items: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_clips <= self.max_clips:
            raise ValueError(f"join: need 1 <= min_clips <= max_clips, got {self.min_clips}, {self.max_clips}")
        if not 0 <= self.min_gap <= self.max_gap:
            raise ValueError(f"join: need 0 <= min_gap <= max_gap, got {self.min_gap}, {self.max_gap}")


def _build(kind: type, settings: Any, name: str) -> Any:
    """An instance of ``kind`` from an instance, a dict of its fields, a tuple of its first fields, or None."""
    if settings is None or isinstance(settings, kind):
        return settings
    known = [f.name for f in fields(kind)]
    if isinstance(settings, dict):
        unknown = settings.keys() - set(known)
        if unknown:
            raise ValueError(f"{name}.{min(unknown)} is unknown; known keys: {', '.join(known)}")
        return kind(**settings)
    return kind(*settings)


@dataclass(frozen=True)
class _Draw:
    """What chance decided for one item: clips by index, silences in seconds (one more than clips), perturbations."""

    clips: tuple[int, ...]
    gaps: tuple[float, ...]
    speed: float
    gain_db: float
    shift_ms: float
    tempo: float
    noise: tuple[float, float, int] | None  # of NoisePerturbation
    variant: float  # 0 to 1, chooses among the alternatives of an utterance
    noise_db: float | None


@dataclass
class Item:
    """One utterance ready to be collated; ``audio`` is None where it had to be skipped.

    ``start``: seconds that trimming took from its front.
    """

    index: int
    name: str
    text: str
    audio: np.ndarray | None
    target: list[int]
    skipped: list[Skipped]
    start: float = 0.0


def ctc_frames(target: Sequence[int]) -> int:
    """Output frames that CTC needs for a target: one for each symbol and one blank between two equal neighbours."""
    return len(target) + sum(a == b for a, b in itertools.pairwise(target))


class SpeechDataset(Dataset):
    """Utterances with their targets, filtered at once by what the manifest tells and later by what the files hold.

    Indexed by ``index`` or ``(epoch, index)``; gives Items for ``collate``. In training it skips utterances whose
    manifest duration (before any perturbation) is not within min_duration..max_duration, whose text is empty after
    normalisation or holds symbols that are no labels, and those with fewer output frames than CTC needs
    (``frame_samples`` samples per output frame: hop times the model's stride); an unreadable file is replaced by a
    neighbour in length. With ``training=False`` nothing is perturbed, joined, replaced or left out for its length or
    text: only unreadable files are skipped.

    speed, tempo, noise, gain, shift perturbation and join: instances of the classes above, or dicts or tuples of their
    fields.
    Raises ValueError if nothing is left.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        vocabulary: Vocabulary,
        sample_rate: int = 16000,
        speed_perturbation: SpeedPerturbation | dict | tuple | None = None,
        max_duration: float = math.inf,
        join: Join | dict | tuple | None = None,
        *,
        min_duration: float = 0.1,
        gain_perturbation: GainPerturbation | dict | tuple | None = None,
        shift_perturbation: ShiftPerturbation | dict | tuple | None = None,
        noise_perturbation: NoisePerturbation | dict | tuple | None = None,
        tempo_perturbation: TempoPerturbation | dict | tuple | None = None,
        trim_silence: bool = False,
        normalize_text: bool = True,
        training: bool = True,
        frame_samples: int = 320,
        seed: int = 0,
    ) -> None:
        self.vocabulary, self.sample_rate, self.frame_samples = vocabulary, sample_rate, frame_samples
        self.trim_silence, self.training, self.seed = trim_silence, training, seed
        self.min_duration, self.max_duration = min_duration, max_duration
        self.speed = _build(SpeedPerturbation, speed_perturbation, "speed_perturbation") if training else None
        self.gain = _build(GainPerturbation, gain_perturbation, "gain_perturbation") if training else None
        self.shift = _build(ShiftPerturbation, shift_perturbation, "shift_perturbation") if training else None
        self.tempo = _build(TempoPerturbation, tempo_perturbation, "tempo_perturbation") if training else None
        self.noise = _build(NoisePerturbation, noise_perturbation, "noise_perturbation") if training else None
        self.join = _build(Join, join, "join") if training else None
        self.skipped = SkipReport()
        self.utterances: list[Utterance] = []
        self.texts: list[str] = []
        self.targets: list[list[int]] = []
        self._memory: dict[int, tuple[np.ndarray, float]] = {}
        for utterance in utterances:
            text = normalize(utterance.text, vocabulary) if normalize_text else utterance.text
            try:
                target = vocabulary.encode(text)
            except UnknownSymbolError as error:
                self.skipped.add([Skipped(utterance.name, "unknown_symbols", str(error))])
                continue
            reason = self._unfit(utterance, target)
            if reason is not None:
                self.skipped.add([reason])
                continue
            self.utterances.append(utterance)
            self.texts.append(text)
            self.targets.append(target)
        if not self.utterances:
            raise ValueError(f"no utterance is left of {len(utterances)}: {self.skipped}")
        self._by_speaker: dict[str | None, list[int]] = defaultdict(list)
        for i, utterance in enumerate(self.utterances):
            self._by_speaker[utterance.speaker].append(i)
        self._by_duration = sorted(range(len(self.utterances)), key=lambda i: self.utterances[i].duration)
        self._rank_by_duration = {i: rank for rank, i in enumerate(self._by_duration)}

    @classmethod
    def from_manifests(
        cls,
        manifests: Sequence[str | os.PathLike] | str | os.PathLike,
        vocabulary: Vocabulary,
        audio_dataset: dict[str, Any] | None = None,
        data_dir: str | os.PathLike | None = None,
        **overrides: Any,
    ) -> SpeechDataset:
        """Reads manifests and takes the settings from the reference's ``audio_dataset`` dict, which may also hold
        ``join`` and ``preload: true``; ``overrides`` are arguments of this class. Raises ValueError naming an unknown
        key, ManifestError for a bad manifest."""
        settings = dict(audio_dataset or {})
        offline = not settings.pop("ignore_offline_speed_perturbation", True)
        max_utts, preload = settings.pop("max_utts", 0), settings.pop("preload", False)
        settings.pop("pad_to_max_duration", None)  # LogMelFeatures pads
        settings.pop("sort_by_duration", None)  # BatchPlan orders
        if "normalize_transcripts" in settings:
            settings["normalize_text"] = settings.pop("normalize_transcripts")
        known = {"sample_rate", "trim_silence", "normalize_text", "min_duration", "max_duration", "join"}
        known |= {"speed_perturbation", "gain_perturbation", "shift_perturbation"}
        known |= {"noise_perturbation", "tempo_perturbation"}
        unknown = settings.keys() - known
        if unknown:
            taken = {"ignore_offline_speed_perturbation", "max_utts", "normalize_transcripts", "pad_to_max_duration"}
            known = sorted((known | taken | {"preload", "sort_by_duration"}) - {"normalize_text"})
            raise ValueError(f"audio_dataset.{min(unknown)} is unknown; known keys: {', '.join(known)}")
        paths = [manifests] if isinstance(manifests, (str, os.PathLike)) else manifests
        utterances = [u for path in paths for u in read_manifest(path, data_dir, offline)]
        dataset = cls(utterances[: max_utts or None], vocabulary, **(settings | overrides))
        if preload:
            dataset.preload()
        return dataset

    def _unfit(self, utterance: Utterance, target: list[int]) -> Skipped | None:
        """Why the manifest's data rule an utterance out, if they do."""
        seconds, name = utterance.duration, utterance.name
        if not math.isfinite(seconds) or seconds <= 0:
            if not self.training:
                return None  # reading the file will tell
            return Skipped(name, "bad_duration", f"{name}: duration {seconds} s in the manifest or the file")
        if not self.training:
            return None
        if seconds > self.max_duration:
            return Skipped(name, "too_long", f"{name}: {seconds:.2f} s, more than {self.max_duration} s")
        if seconds < self.min_duration:
            return Skipped(name, "too_short", f"{name}: {seconds:.3f} s, less than {self.min_duration} s")
        if not target:
            return Skipped(name, "empty_text", f"{name}: no symbol of the vocabulary in {utterance.text!r}")
        if self.join is None:
            return self._too_short_for_ctc(name, round(seconds * self.sample_rate), target)
        return None  # the silences of a joined item make room

    def _too_short_for_ctc(self, name: str, samples: int, target: list[int]) -> Skipped | None:
        frames, needed = -(-samples // self.frame_samples), ctc_frames(target)
        if frames >= needed:
            return None
        detail = f"{name}: {frames} output frames, its {len(target)} symbols need {needed}"
        return Skipped(name, "too_short_for_ctc", detail)

    def __len__(self) -> int:
        return self.join.items if self.join and self.join.items else len(self.utterances)

    def durations(self, epoch: int = 0) -> list[float]:
        """Seconds of every item in that epoch, joined and perturbed: what a BatchPlan goes by."""
        if self.join is None and self.speed is None and self.tempo is None:
            return [_finite(u.duration) for u in self.utterances]
        return [self._duration(self._draw(epoch, i)) for i in range(len(self))]

    def _duration(self, draw: _Draw) -> float:
        return self._seconds(draw.clips, draw.gaps) / (draw.speed * draw.tempo)

    def _seconds(self, clips: Sequence[int], gaps: Sequence[float]) -> float:
        return sum(_finite(self.utterances[i].duration) for i in clips) + sum(gaps)

    def _draw(self, epoch: int, index: int) -> _Draw:
        rng = np.random.default_rng((self.seed, epoch, index))
        own = index % len(self.utterances)
        clips, gaps, noise_db = (own,), (0.0, 0.0), None
        if self.join is not None:
            clips, gaps, noise_db = self._draw_join(own, rng)
        speed = self.speed.draw(rng) if self.speed else 1.0
        gain = self.gain.draw(rng) if self.gain else 0.0
        shift = self.shift.draw(rng) if self.shift else 0.0
        variant = rng.random()
        noise = self.noise.draw(rng) if self.noise else None
        tempo = self.tempo.draw(rng) if self.tempo else 1.0
        return _Draw(clips, gaps, speed, gain, shift, tempo, noise, variant, noise_db)

    def _draw_join(self, own: int, rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[float, ...], float | None]:
        join = self.join
        pool = self._by_speaker[self.utterances[own].speaker] if join.same_speaker else range(len(self.utterances))
        count = int(rng.integers(join.min_clips, join.max_clips + 1))
        clips = [pool[i] for i in rng.integers(0, len(pool), count)]
        clips[int(rng.integers(0, count))] = own
        gaps = rng.uniform(join.min_gap, join.max_gap, count + 1).tolist()
        noise_db = float(rng.uniform(*join.noise_db)) if join.noise_db else None
        while (
            count > join.min_clips and sum(self.utterances[i].duration for i in clips) + sum(gaps) > self.max_duration
        ):
            count -= 1  # from the end, but never the item's own utterance
            del clips[-1 if clips[-1] != own else 0], gaps[-1]
        return tuple(clips), tuple(gaps), noise_db

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        draw = self._draw(epoch, index)
        item = self._joined(epoch, index, draw) if self.join is not None else self._single(index, draw)
        if item.audio is not None or not self.training or self.join is not None:
            return item
        skipped = item.skipped
        rank, order = self._rank_by_duration[index], self._by_duration
        neighbours = order[:rank][::-1] + order[rank + 1 :]  # shorter ones first: the batch keeps its size
        for neighbour in neighbours[:_SUBSTITUTES]:
            item = self._single(neighbour, draw)
            skipped += item.skipped
            if item.audio is not None:
                break
        item.skipped = skipped
        return item

    def preload(self, max_gib: float = 4.0, progress: Callable[[int], None] | None = None) -> None:
        """Keeps all audio in memory, trimmed and resampled, for corpora that are read many times.

        Takes 4 bytes a sample; workers forked later share it. Files that cannot be read are reported when they are
        used. ``progress`` is called with the number just read. Raises ValueError above ``max_gib``.
        """
        gib = sum(_finite(u.duration) for u in self.utterances) * self.sample_rate * 4 / 2**30
        if gib > max_gib:
            raise ValueError(f"{gib:.1f} GiB of audio do not fit the {max_gib} GiB allowed; do not preload this corpus")

        def read(index: int) -> tuple[np.ndarray, float] | None:
            try:
                return self._read(self.utterances[index])
            except AudioError:
                return None

        with ThreadPoolExecutor() as pool:
            for index, loaded in enumerate(pool.map(read, range(len(self.utterances)))):
                if loaded is not None:
                    self._memory[index] = loaded
                if progress is not None:
                    progress(1)

    def _load(self, index: int, draw: _Draw) -> tuple[np.ndarray, float]:
        """Samples, which must not be written to, and the seconds that trimming took from their front."""
        utterance = self.utterances[index]
        if utterance.alternatives and self.training:
            return self._read(utterance, utterance.alternatives[int(draw.variant * len(utterance.alternatives))])
        return self._memory.get(index) or self._read(utterance)

    def _read(self, utterance: Utterance, alternative: str | None = None) -> tuple[np.ndarray, float]:
        path, seconds = utterance.path, _finite(utterance.duration)
        if alternative is not None:
            path, seconds = alternative, 0.0  # the whole of it: its length is not in the manifest's entry
        samples = audio.load(path, self.sample_rate, utterance.offset, seconds)
        if not self.trim_silence:
            return samples, 0.0
        first, end = audio.silence_bounds(samples)
        return samples[first:end], first / self.sample_rate

    def _single(self, index: int, draw: _Draw) -> Item:
        utterance, target = self.utterances[index], self.targets[index]
        item = Item(index, utterance.name, self.texts[index], None, target, [])
        try:
            samples, item.start = self._load(index, draw)
        except AudioError as error:
            item.skipped.append(Skipped(utterance.name, "unreadable", str(error)))
            return item
        if self.training:
            short = self._too_short_for_ctc(utterance.name, len(samples), target)
            if short is not None:
                item.skipped.append(short)
                return item
            changed = self._perturb(samples, draw)
            fits = self._too_short_for_ctc(utterance.name, len(changed), target) is None
            samples = changed if fits else samples
        item.audio = samples
        return item

    def _joined(self, epoch: int, index: int, draw: _Draw) -> Item:
        rng = np.random.default_rng((self.seed, epoch, index, 1))
        pieces, names, texts, skipped = [], [], [], []
        for clip, gap in zip(draw.clips, draw.gaps, strict=False):
            utterance = self.utterances[clip]
            try:
                samples, _ = self._load(clip, draw)
            except AudioError as error:
                skipped.append(Skipped(utterance.name, "unreadable", str(error)))
                continue
            pieces += [self._silence(gap, draw.noise_db, rng), samples]
            names.append(utterance.name)
            texts.append(self.texts[clip])
        text = self.vocabulary.separator.join(texts)
        item = Item(index, " + ".join(names), text, None, self.vocabulary.encode(text), skipped)
        if not pieces:
            return item
        samples = np.concatenate([*pieces, self._silence(draw.gaps[-1], draw.noise_db, rng)])
        samples = self._perturb(samples, draw)
        missing = ctc_frames(item.target) * self.frame_samples - len(samples)
        if missing > 0:
            samples = np.concatenate([samples, self._silence(missing / self.sample_rate, draw.noise_db, rng)])
        item.audio = samples
        return item

    def _silence(self, seconds: float, noise_db: float | None, rng: np.random.Generator) -> np.ndarray:
        samples = round(seconds * self.sample_rate)
        if noise_db is None:
            return np.zeros(samples, np.float32)
        return rng.standard_normal(samples, np.float32) * np.float32(10 ** (noise_db / 20))

    def _perturb(self, samples: np.ndarray, draw: _Draw) -> np.ndarray:
        if draw.speed != 1.0:
            samples = audio.change_speed(samples, draw.speed)
        if draw.tempo != 1.0:
            samples = audio.change_tempo(samples, draw.tempo, self.sample_rate)
        if draw.noise is not None and len(samples):
            samples = NoisePerturbation.add(samples, *draw.noise)
        if draw.gain_db:
            samples = samples * np.float32(10 ** (draw.gain_db / 20))
        shift = int(draw.shift_ms * self.sample_rate // 1000)
        if shift and abs(shift) < len(samples):
            moved = np.zeros_like(samples)
            if shift > 0:
                moved[:-shift] = samples[shift:]
            else:
                moved[-shift:] = samples[:shift]
            samples = moved
        return samples


def _finite(seconds: float) -> float:
    return seconds if math.isfinite(seconds) else 0.0


@dataclass
class Batch:
    """Utterances of one step: audio (N, S) fp32, zero beyond audio_lengths (N,) in samples; targets (N, U) int64,
    0 beyond target_lengths (N,); texts, names, indices in the dataset, and ``starts``, the seconds trimmed from their
    fronts. ``skipped`` lists what was left out; ``epoch`` and ``step`` (in the epoch) say where the batch belongs.
    N may be 0 where nothing could be read."""

    audio: Tensor
    audio_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    texts: list[str]
    names: list[str]
    indices: list[int]
    skipped: list[Skipped] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    epoch: int = 0
    step: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        self.audio, self.audio_lengths = f(self.audio), f(self.audio_lengths)
        self.targets, self.target_lengths = f(self.targets), f(self.target_lengths)
        return self

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Moves the tensors to the device, in place."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))


def _padded(rows: Sequence[np.ndarray | list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    out = torch.zeros(len(rows), int(lengths.max()) if len(rows) else 0, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out, lengths


def collate(items: Sequence[Item]) -> Batch:
    """Items of a SpeechDataset as one zero-padded Batch; those without audio are left out and listed."""
    good = [item for item in items if item.audio is not None]
    audio_, audio_lengths = _padded([item.audio for item in good], torch.float32)
    targets, target_lengths = _padded([item.target for item in good], torch.int64)
    return Batch(
        audio_,
        audio_lengths,
        targets,
        target_lengths,
        [item.text for item in good],
        [item.name for item in good],
        [item.index for item in good],
        [s for item in items for s in item.skipped],
        [item.start for item in good],
    )


class BatchPlan:
    """Which items form which batch, for every epoch, as a pure function of (seed, epoch): resume by skipping steps.

    durations in seconds: a list, or a function of the epoch (``dataset.durations``). Give ``batch_size`` (utterances
    per batch and rank), ``max_seconds`` (of padded audio per batch and rank: count times the longest; one utterance
    longer than that is a batch of its own), or both. ``bucketing`` puts items of like length together, with 10 % of
    chance in the order; batches come shuffled, or unshuffled with ``shuffle=False`` (then in the given order, or by
    length with bucketing). With ``world_size`` ranks every rank has the same number of steps and batches of like length
    at each step; the rest is filled by repetition, or left out with ``drop_last`` (without shuffling it is neither: an
    evaluation counts each utterance once). Raises ValueError for sizes that are not positive or a rank out of range.
    """

    def __init__(
        self,
        durations: Sequence[float] | Callable[[int], Sequence[float]],
        batch_size: int | None = None,
        max_seconds: float | None = None,
        bucketing: bool = True,
        seed: int = 0,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size is None and max_seconds is None:
            raise ValueError("give batch_size, max_seconds or both")
        if (batch_size is not None and batch_size < 1) or (max_seconds is not None and not max_seconds > 0):
            raise ValueError(f"batch_size={batch_size} and max_seconds={max_seconds} must be positive")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        self._durations = durations
        self.batch_size, self.max_seconds, self.bucketing, self.seed = batch_size, max_seconds, bucketing, seed
        self.shuffle, self.drop_last, self.rank, self.world_size = shuffle, drop_last, rank, world_size
        self._kept: tuple[int, list[list[int]]] = (-1, [])

    def batches(self, epoch: int = 0) -> list[list[int]]:
        """This rank's batches of the epoch, in order: lists of item indices."""
        if self._kept[0] != epoch:
            self._kept = (epoch, self._make(epoch))
        return self._kept[1]

    def steps(self, epoch: int = 0) -> int:
        return len(self.batches(epoch))

    def __len__(self) -> int:
        return self.steps(0)

    def _make(self, epoch: int) -> list[list[int]]:
        seconds = np.asarray(self._durations(epoch) if callable(self._durations) else self._durations, dtype=float)
        rng = np.random.default_rng((self.seed, epoch))
        jitter = 1 + 0.1 * rng.random(len(seconds)) if self.shuffle else 1.0
        if self.bucketing:
            order = np.argsort(seconds * jitter, kind="stable")
        else:
            order = rng.permutation(len(seconds)) if self.shuffle else np.arange(len(seconds))
        batches = self._cut(order.tolist(), seconds)
        if not self.shuffle:
            return batches[self.rank :: self.world_size]
        if len(batches) % self.world_size:
            whole = len(batches) // self.world_size * self.world_size
            if self.drop_last:
                batches = batches[:whole]
            else:
                missing = self.world_size - (len(batches) - whole)
                batches += [batches[i % len(batches)] for i in range(missing)]
        steps = len(batches) // self.world_size
        return [batches[step * self.world_size + self.rank] for step in rng.permutation(steps)]

    def _cut(self, order: list[int], seconds: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        current: list[int] = []
        longest = 0.0
        for index in order:
            grown = max(longest, seconds[index])
            full = self.batch_size is not None and len(current) == self.batch_size
            full |= self.max_seconds is not None and grown * (len(current) + 1) > self.max_seconds
            if current and full:
                batches.append(current)
                current, grown = [], seconds[index]
            current.append(index)
            longest = grown
        partial = self.batch_size is not None and len(current) < self.batch_size and self.max_seconds is None
        if current and not (self.drop_last and partial):
            batches.append(current)
        return batches


def batches(
    dataset: SpeechDataset,
    plan: BatchPlan,
    epoch: int = 0,
    start_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of an epoch from ``start_step`` on, loaded by ``workers`` processes (0: this one).

    What is skipped on the way is added to ``dataset.skipped``. Draws nothing from torch's global generator.
    """
    keys = [[(epoch, index) for index in batch] for batch in plan.batches(epoch)[start_step:]]
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
    for step, batch in enumerate(loader, start_step):
        batch.epoch, batch.step = epoch, step
        dataset.skipped.add(batch.skipped)
        yield batch
