"""Perturbations of an utterance, drawn by chance, and joining several into one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np


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


def build(kind: type, settings: Any, name: str) -> Any:
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
