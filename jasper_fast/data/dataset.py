"""Utterances with their audio and targets: reading, filtering, perturbing, joining.

Everything random is a function of (seed, epoch, index), so a resumed run draws what the uninterrupted one would have.
What cannot be used is skipped, counted by reason and listed in ``SpeechDataset.skipped``; it never ends a run.

Shapes: N utterances, S samples, U target symbols.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from jasper_fast.data.manifest import Skipped, SkipReport, Utterance, read_manifest
from jasper_fast.data.perturb import (
    GainPerturbation,
    Join,
    NoisePerturbation,
    ShiftPerturbation,
    SpeedPerturbation,
    TempoPerturbation,
    build,
)
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError
from jasper_fast.speech.text import UnknownSymbolError, Vocabulary, normalize

_SUBSTITUTES = 8  # other utterances tried in the place of one that cannot be read, in training


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
        self.speed = build(SpeedPerturbation, speed_perturbation, "speed_perturbation") if training else None
        self.gain = build(GainPerturbation, gain_perturbation, "gain_perturbation") if training else None
        self.shift = build(ShiftPerturbation, shift_perturbation, "shift_perturbation") if training else None
        self.tempo = build(TempoPerturbation, tempo_perturbation, "tempo_perturbation") if training else None
        self.noise = build(NoisePerturbation, noise_perturbation, "noise_perturbation") if training else None
        self.join = build(Join, join, "join") if training else None
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
