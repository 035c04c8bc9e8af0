"""Datasets: utterances with their audio and targets, filtered, perturbed and joined.

Everything random is a function of (seed, epoch, index), so a resumed run draws the same numbers as an uninterrupted
one. Unusable utterances are skipped, counted by reason and listed in ``SpeechDataset.skipped``.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from torch.utils.data import Dataset

from jasper_fast.data.join import Clips
from jasper_fast.data.manifest import Skipped, SkipReport, Utterance, read_manifest
from jasper_fast.data.perturb import Change, Perturb
from jasper_fast.data.places import is_url
from jasper_fast.data.reading import AudioReader
from jasper_fast.data.settings import AudioSettings
from jasper_fast.speech.audio import AudioError, ShortAudio
from jasper_fast.speech.text import UnknownSymbolError, Vocabulary, normalize_and_lost

_SUBSTITUTES = 8  # in training, how many other utterances are tried in place of an unusable one


@dataclass
class Item:
    """An utterance, or several that are joined, ready to be collated. ``audio`` is None if nothing could be used.

    ``skipped`` lists utterances that were left out. ``warned`` has an entry if the audio is used although something is
    wrong with it. ``start``: seconds trimmed from the beginning.
    """

    index: int
    name: str
    text: str
    audio: np.ndarray | None
    target: list[int]
    skipped: list[Skipped] = field(default_factory=list)
    start: float = 0.0
    warned: list[Skipped] = field(default_factory=list)


def ctc_frames(target: Sequence[int]) -> int:
    """Returns the number of output frames that CTC needs for a target: one for each symbol, and one for the blank
    between two equal neighbours."""
    return len(target) + sum(a == b for a, b in itertools.pairwise(target))


class SpeechDataset(Dataset):
    """Utterances with their targets. They are filtered by their manifest entries when the dataset is made, and by their
    audio when they are read.

    Indexed by ``index`` or ``(epoch, index)``; returns Items for ``collate``. For training, the dataset leaves out
    utterances whose duration in the manifest (before any perturbation) is unknown or outside the settings' bounds,
    whose text is empty after normalisation, or which (unless utterances are joined) have fewer output frames than CTC
    needs. ``frame_samples`` is the number of samples per output frame, the hop times the model's stride. An utterance
    whose audio cannot be used is replaced by one of similar length, or, if utterances are joined, only left out.

    With ``training=False`` nothing is perturbed, joined or replaced, and utterances of any length and with empty text
    are kept. Unreadable files are skipped. If a file is shorter than its header or the manifest says, the available
    audio is used, with a warning.

    Utterances whose text (after normalisation, unless that is switched off) has symbols that are not labels are always
    left out. ``kept`` lists the indices of the remaining utterances in the argument ``utterances``. Raises ValueError
    if none remains.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        vocabulary: Vocabulary,
        settings: AudioSettings | None = None,
        *,
        training: bool = True,
        frame_samples: int = 320,
        seed: int = 0,
    ) -> None:
        settings = settings or AudioSettings()
        self.vocabulary, self.training, self.frame_samples, self.seed = vocabulary, training, frame_samples, seed
        self.settings = settings if training else replace(settings, perturb=Perturb(), join=None)
        self.reader = AudioReader(settings.sample_rate, settings.trim_silence)
        self.skipped = SkipReport()
        usable = []
        for place, utterance in enumerate(utterances):
            text, lost = (
                normalize_and_lost(utterance.text, vocabulary) if settings.normalize_text else (utterance.text, [])
            )
            if lost:
                self.skipped.lose(utterance.manifest, lost)
            try:
                target = vocabulary.encode(text)
                unfit = self._unfit(utterance, target) if training else None
            except UnknownSymbolError as error:
                unfit = Skipped(utterance.name, "unknown_symbols", str(error))
            if unfit is None:
                usable.append((place, utterance, text, target))
            else:
                self.skipped.add([unfit])
        if not usable:
            raise ValueError(f"none of the {len(utterances)} utterances can be used: {self.skipped}")
        self.kept, self.utterances, self.texts, self.targets = map(list, zip(*usable, strict=True))
        self._seconds = [u.seconds for u in self.utterances]
        self._remote = any(u.packed and is_url(u.packed.tar) for u in self.utterances)
        self._by_speaker: dict[str | None, list[int]] = defaultdict(list)
        for i, utterance in enumerate(self.utterances):
            self._by_speaker[utterance.speaker].append(i)
        if settings.preload:
            self.reader.preload(self.utterances)

    @classmethod
    def from_manifests(
        cls,
        manifests: Sequence[str | os.PathLike] | str | os.PathLike,
        vocabulary: Vocabulary,
        audio_dataset: dict[str, Any] | None = None,
        data_dir: str | os.PathLike | None = None,
        **others: Any,
    ) -> Self:
        """Makes a dataset from manifests. The settings are a dict with the keys of NVIDIA's ``audio_dataset`` (see
        ``AudioSettings.from_config``). ``others`` are arguments of this class. Raises ValueError for bad settings or if
        no utterance can be used, and ManifestError for a bad manifest."""
        settings = AudioSettings.from_config(audio_dataset)
        paths = [manifests] if isinstance(manifests, (str, os.PathLike)) else manifests
        utterances = [u for path in paths for u in read_manifest(path, data_dir, settings.offline_speeds)]
        return cls(utterances[: max(settings.max_utterances, 0) or None], vocabulary, settings, **others)

    def _unfit(self, utterance: Utterance, target: list[int]) -> Skipped | None:
        """Returns why the manifest entry of an utterance forbids its use for training, or None if it does not."""
        seconds, name, bounds = utterance.duration, utterance.name, self.settings
        for reason, holds, detail in (
            (
                "bad_duration",
                not seconds > 0 or math.isinf(seconds),
                f"its duration is {seconds} s in the manifest or the file",
            ),
            ("too_long", seconds > bounds.max_duration, f"{seconds:.2f} s, more than {bounds.max_duration} s"),
            ("too_short", seconds < bounds.min_duration, f"{seconds:.3f} s, less than {bounds.min_duration} s"),
            ("empty_text", not target, f"its text {utterance.text!r} has no symbol of the vocabulary"),
        ):
            if holds:
                return Skipped(name, reason, f"{name}: {detail}")
        # Silence is added to a joined item until it has enough frames for CTC.
        return None if bounds.join else self._too_short_for_ctc(name, round(seconds * bounds.sample_rate), target)

    def _too_short_for_ctc(self, name: str, samples: int, target: list[int]) -> Skipped | None:
        frames, needed = -(-samples // self.frame_samples), ctc_frames(target)
        detail = f"{name}: it has {frames} output frames, but CTC needs {needed} for its {len(target)} symbols"
        return Skipped(name, "too_short_for_ctc", detail) if frames < needed else None

    def __len__(self) -> int:
        return (self.settings.join and self.settings.join.items) or len(self.utterances)

    def durations(self, epoch: int = 0) -> list[float]:
        """Returns the seconds of every item in an epoch, after joining and perturbation, from the utterances'
        durations."""
        if not (self.settings.join or self.settings.perturb.speed or self.settings.perturb.tempo):
            return list(self._seconds)
        draws = (self._draw(epoch, i) for i in range(len(self)))
        return [clips.seconds(self._seconds) / (change.speed * change.tempo) for clips, change in draws]

    @property
    def shards(self) -> list[int] | None:
        """The number of each utterance's shard, from 0 on. None unless all utterances are packed in shards."""
        if not all(u.packed for u in self.utterances):
            return None
        numbers: dict[str, int] = {}
        return [numbers.setdefault(u.packed.tar, len(numbers)) for u in self.utterances]

    def _draw(self, epoch: int, index: int) -> tuple[Clips, Change]:
        rng = np.random.default_rng((self.seed, epoch, index))
        own, join = index % len(self.utterances), self.settings.join
        clips = Clips((own,))
        if join is not None:
            speaker = self.utterances[own].speaker
            pool = self._by_speaker[speaker] if join.same_speaker else range(len(self.utterances))
            clips = join.draw(own, pool, self._seconds, self.settings.max_duration, rng)
        return clips, self.settings.perturb.draw(rng)

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[Item]:
        """Returns the items of a batch. PyTorch's DataLoader calls this method instead of ``__getitem__``."""
        if self._remote:
            drawn = (self._draw(*(key if isinstance(key, tuple) else (0, key)))[0] for key in keys)
            self.reader.fetch(self.utterances[i] for clips in drawn for i in clips.indices)
        return [self[key] for key in keys]

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} is not in 0..{len(self) - 1}")
        clips, change = self._draw(epoch, index)
        if self.settings.join is not None:
            return self._joined(index, clips, change, np.random.default_rng((self.seed, epoch, index, 1)))
        item, skipped = self._single(index, change), []
        if item.audio is not None or not self.training:
            return item
        order = sorted(range(len(self.utterances)), key=self._seconds.__getitem__)
        rank = order.index(index)
        # Shorter ones come first, because they do not make the batch longer.
        for neighbour in (order[:rank][::-1] + order[rank + 1 :])[:_SUBSTITUTES]:
            skipped += item.skipped
            item = self._single(neighbour, change)
            if item.audio is not None:
                break
        item.skipped = skipped + item.skipped
        return item

    def _read(
        self, index: int, change: Change, skipped: list[Skipped], warned: list[Skipped]
    ) -> tuple[np.ndarray | None, float]:
        utterance = self.utterances[index]
        try:
            return self.reader.read(utterance, change.variant if self.training else None)
        except AudioError as error:
            found = Skipped(utterance.name, error.reason, str(error))
            if isinstance(error, ShortAudio) and not self.training:
                warned.append(found)
                return error.samples, error.start
            skipped.append(found)
            return None, 0.0

    def _single(self, index: int, change: Change) -> Item:
        name, target = self.utterances[index].name, self.targets[index]
        item = Item(index, name, self.texts[index], None, target)
        item.audio, item.start = self._read(index, change, item.skipped, item.warned)
        if item.audio is None or not self.training:
            return item
        if (short := self._too_short_for_ctc(name, len(item.audio), target)) is not None:
            item.audio = None
            item.skipped.append(short)
            return item
        changed = change.apply(item.audio, self.settings.sample_rate)
        if self._too_short_for_ctc(name, len(changed), target) is None:
            item.audio = changed
        return item

    def _joined(self, index: int, clips: Clips, change: Change, rng: np.random.Generator) -> Item:
        pieces, read, skipped, rate = [], [], [], self.settings.sample_rate
        for clip, gap in zip(clips.indices, clips.gaps, strict=False):
            samples, _ = self._read(clip, change, skipped, [])
            if samples is not None:
                pieces += [clips.silence(round(gap * rate), rng), samples]
                read.append(clip)
        text = self.vocabulary.separator.join(self.texts[i] for i in read)
        name = " + ".join(self.utterances[i].name for i in read)
        item = Item(index, name, text, None, self.vocabulary.encode(text), skipped)
        if pieces:
            samples = change.apply(np.concatenate([*pieces, clips.silence(round(clips.gaps[-1] * rate), rng)]), rate)
            missing = ctc_frames(item.target) * self.frame_samples - len(samples)
            item.audio = np.concatenate([samples, clips.silence(max(missing, 0), rng)])
        return item
