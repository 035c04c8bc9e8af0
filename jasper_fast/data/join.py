"""Joins several utterances into one item, with silences around and between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clips:
    """The parts of an item: the ``indices`` of its utterances, and ``gaps``, the seconds of silence before, between and
    after them. ``noise_db`` is the level of the noise in the silences, in dB of full scale (None: no noise)."""

    indices: tuple[int, ...]
    gaps: tuple[float, ...] = (0.0, 0.0)
    noise_db: float | None = None

    def seconds(self, durations: Sequence[float]) -> float:
        return sum(durations[i] for i in self.indices) + sum(self.gaps)

    def silence(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        """Returns (samples,) fp32 zeros, or white noise of the level ``noise_db``."""
        if self.noise_db is None:
            return np.zeros(samples, np.float32)
        return rng.standard_normal(samples, np.float32) * np.float32(10 ** (self.noise_db / 20))


@dataclass(frozen=True)
class Join:
    """Joins min_clips..max_clips utterances into one, with silences of min_gap..max_gap seconds around and between
    them.

    Item i contains utterance i (modulo the number of utterances) and random ones. With ``same_speaker`` all are of one
    speaker, if the manifest names speakers. ``noise_db`` (low, high) fills the silences with white noise of a random
    level in that range, in dB of full scale; None fills them with zeros. ``items`` is the number of items per epoch
    (None: one per utterance).
    """

    min_clips: int = 1
    max_clips: int = 7
    min_gap: float = 0.0
    max_gap: float = 0.3
    same_speaker: bool = True
    noise_db: tuple[float, float] | None = None
    items: int | None = None

    def __post_init__(self) -> None:
        clips, gaps, noise = (self.min_clips, self.max_clips), (self.min_gap, self.max_gap), self.noise_db
        levels = isinstance(noise, Sequence) and len(noise) == 2 and noise[0] <= noise[1]
        for fits, wrong in (
            (1 <= clips[0] <= clips[1], f"need 1 <= min_clips <= max_clips, got {clips[0]}, {clips[1]}"),
            (0 <= gaps[0] <= gaps[1], f"need 0 <= min_gap <= max_gap, got {gaps[0]}, {gaps[1]}"),
            (noise is None or levels, f"noise_db must be two levels, the lower one first, got {noise!r}"),
            (self.items is None or self.items >= 1, f"items must be positive, got {self.items}"),
        ):
            if not fits:
                raise ValueError(wrong)

    def draw(
        self, own: int, pool: Sequence[int], durations: Sequence[float], longest: float, rng: np.random.Generator
    ) -> Clips:
        """Returns utterance ``own`` among random others of ``pool``. Drops others until the item fits into ``longest``
        seconds or has only ``min_clips`` utterances."""
        count = int(rng.integers(self.min_clips, self.max_clips + 1))
        indices = [pool[i] for i in rng.integers(0, len(pool), count)]
        indices[int(rng.integers(0, count))] = own
        gaps = rng.uniform(self.min_gap, self.max_gap, count + 1).tolist()
        noise_db = float(rng.uniform(*self.noise_db)) if self.noise_db else None
        while len(indices) > self.min_clips and sum(durations[i] for i in indices) + sum(gaps) > longest:
            # drop the last clip, or the first if the last is `own`
            del indices[-1 if indices[-1] != own else 0], gaps[-1]
        return Clips(tuple(indices), tuple(gaps), noise_db)
