"""Reading audio files: WAV, FLAC and what else libsndfile knows; mono fp32 at one sample rate."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr


class AudioError(Exception):
    """A file gives no usable audio; ``path`` is the file, ``cause`` says what is wrong with it."""

    def __init__(self, path: str | os.PathLike, cause: str) -> None:
        super().__init__(str(path), cause)
        self.path, self.cause = str(path), cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}"


def _open(path: str | os.PathLike) -> soundfile.SoundFile:
    file = Path(path)
    if not file.exists():
        raise AudioError(path, "no such file")
    if file.is_dir():
        raise AudioError(path, "is a folder, not an audio file")
    if file.stat().st_size == 0:
        raise AudioError(path, "empty file (0 bytes)")
    try:
        return soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise AudioError(path, f"cannot be read as audio: {reason.strip()}") from error


def duration(path: str | os.PathLike) -> float:
    """Seconds of audio by the file's header. Raises AudioError where there is none."""
    with _open(path) as file:
        return file.frames / file.samplerate


def load(
    path: str | os.PathLike, sample_rate: int = 16000, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Audio of a file as (samples,) fp32, mono (mean of the channels), resampled to ``sample_rate``.

    Reads ``duration`` seconds from ``offset`` seconds on; None or 0 reads to the end. Integer formats are scaled to
    [-1, 1). Raises AudioError naming the file and the cause: missing, unreadable, truncated, empty, no samples at the
    offset, NaN or infinite samples.
    """
    if not (offset >= 0 and math.isfinite(offset)) or (duration is not None and not duration >= 0):
        raise AudioError(path, f"offset={offset} and duration={duration} must not be negative")
    with _open(path) as file:
        rate, frames = file.samplerate, file.frames
        if frames <= 0:
            raise AudioError(path, "holds no samples")
        first = int(offset * rate)
        if first >= frames:
            raise AudioError(path, f"offset {offset} s is past the end ({frames / rate:.3f} s)")
        expected = frames - first
        if duration:
            expected = min(expected, max(1, round(min(duration * rate, frames))))
        try:
            file.seek(first)
            samples = file.read(expected, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise AudioError(path, f"damaged: {getattr(error, 'error_string', error)}") from error
    if len(samples) < expected:
        raise AudioError(
            path, f"truncated: the header promises {first + expected} samples, {first + len(samples)} are there"
        )
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError(path, f"{int((~np.isfinite(mono)).sum())} of {len(mono)} samples are NaN or infinite")
    mono = resample(mono, rate, sample_rate)
    if not len(mono):
        raise AudioError(path, f"{expected} samples at {rate} Hz leave none at {sample_rate} Hz")
    return np.ascontiguousarray(mono)


def resample(samples: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """(samples,) at ``rate`` Hz as (samples * new_rate / rate,) fp32 at ``new_rate`` Hz, band-limited (soxr, HQ)."""
    samples = np.asarray(samples, dtype=np.float32)
    if rate == new_rate or not len(samples):
        return samples
    return soxr.resample(samples, rate, new_rate, quality="HQ")


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """(samples,) played ``speed`` times as fast, pitch and all: about samples / speed values."""
    return resample(samples, speed, 1.0)


def change_tempo(samples: np.ndarray, tempo: float, sample_rate: int) -> np.ndarray:
    """(samples,) spoken ``tempo`` times as fast at the same pitch: round(samples / tempo) values, float32.

    Waveform-similarity overlap-add (Verhelst and Roelands, 1993): windows of 30 ms that overlap by half are taken from
    the input at the other tempo, each moved by up to 8 ms to where it continues the one before best.
    """
    half, reach = round(0.015 * sample_rate), round(0.008 * sample_rate)
    size = round(len(samples) / tempo)
    if tempo == 1.0 or size <= half:
        return samples[:size] if size <= half else samples
    padded = np.pad(samples.astype(np.float32), (reach, reach + 3 * half))
    count = -(-size // half)
    window = (0.5 - 0.5 * np.cos(np.pi * (np.arange(2 * half) + 0.5) / half)).astype(np.float32)
    out = np.zeros((count + 1) * half, np.float32)
    start = reach  # in padded, of the window in hand
    out[:half] = padded[start : start + half] * (1 - window[:half])  # nothing fades in at the beginning
    for i in range(count):
        out[i * half : (i + 2) * half] += padded[start : start + 2 * half] * window
        wanted = padded[start + half : start + 2 * half]  # what would follow by itself
        lowest = min(round((i + 1) * half * tempo), len(samples))
        match = np.correlate(padded[lowest : lowest + half + 2 * reach], wanted, "valid")
        start = lowest + int(match.argmax())
    return out[:size]


def silence_bounds(samples: np.ndarray, top_db: float = 60.0, frame: int = 2048, hop: int = 512) -> tuple[int, int]:
    """First sample and end of what is not silence: hops within ``top_db`` of the loudest frame's power.

    Where all is equally loud or silent, that is everything. Equivalent: ``librosa.effects.trim(samples, top_db)[1]``.
    """
    if not len(samples):
        return 0, 0
    energy = np.concatenate(([0.0], np.cumsum(np.square(samples, dtype=np.float64))))
    centres = np.arange(1 + len(samples) // hop) * hop
    first, end = (centres + d for d in (-(frame // 2), frame // 2))
    power = (energy[end.clip(0, len(samples))] - energy[first.clip(0, len(samples))]) / frame
    loud = np.flatnonzero(power > max(power.max(), 1e-10) * 10 ** (-top_db / 10))
    if not len(loud):
        return 0, len(samples)
    return int(loud[0]) * hop, min(len(samples), (int(loud[-1]) + 1) * hop)


def trim_silence(samples: np.ndarray, top_db: float = 60.0) -> np.ndarray:
    """The samples within ``silence_bounds``."""
    first, end = silence_bounds(samples, top_db)
    return samples[first:end]
