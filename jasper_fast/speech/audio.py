"""Reads audio files (WAV, FLAC and the other formats of libsndfile) as mono fp32 at one sample rate."""

import io
import math
import mmap
import os
import re
import stat
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from jasper_fast.speech import mp3

SOUNDS = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph", ".w64", ".caf"}  # file extensions
# Full scale is 1, or 2^31 in files with integers stored as floats. The squares of much louder samples overflow fp32.
_LOUDEST = 1e10
_LOWEST_RATE = 1000  # Hz; at lower rates resampling would make a small file fill the memory
_CHUNK = 1 << 22  # samples; longer files are read in parts, so that a header with a false length costs no memory
_STREAMED = 0x7FFF0000  # bytes; a header that was written before the length was known states this or more


@dataclass(frozen=True)
class Memory:
    """An audio file whose bytes are in memory. Error messages show ``name`` instead of a path."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


class AudioError(Exception):
    """A file has no usable audio. ``cause`` says what is wrong; ``reason`` is the category in which it is counted."""

    reason = "unreadable"

    def __init__(self, path: str | os.PathLike | Memory, cause: str) -> None:
        super().__init__(str(path), cause)
        self.path, self.cause = str(path), cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}"


class ShortAudio(AudioError):
    """A file is shorter than its header says (``reason`` is "truncated") or than the manifest says ("wrong_duration").
    ``samples`` is the available audio, from ``start`` seconds on."""

    def __init__(self, path: str | os.PathLike | Memory, cause: str, reason: str, samples: np.ndarray) -> None:
        super().__init__(path, cause)
        self.args = (str(path), cause, reason, samples)  # pickle restores the error from these
        self.reason, self.samples, self.start = reason, samples, 0.0


class _File(soundfile.SoundFile):
    """A file that is read from front to back. soundfile would seek after each read, which some codecs cannot do."""

    def seekable(self) -> bool:
        return False

    def forward(self, frames: int) -> None:
        """Skips ``frames`` frames at the beginning of the file."""
        if super().seekable():
            self.seek(frames)
        else:
            for _ in self.chunks(frames):
                pass

    def chunks(self, frames: int):
        """Yields the next ``frames`` frames, or fewer at the end of the file, in arrays (n, channels) fp32."""
        size = max(1, _CHUNK // self.channels)
        while frames > 0:
            samples = self.read(min(size, frames), dtype="float32", always_2d=True)
            yield samples
            frames = frames - len(samples) if len(samples) else 0

    def promised(self) -> int:
        """Returns the number of frames that the file's header states. If libsndfile has corrected that number, the
        original is in libsndfile's log."""
        for name in ("data|SSND|BODY|Data Size", "riff|Riff size"):
            if found := re.search(rf"^\s*(?:{name})\s*: (\d+) \(should be (\d+)\)", self.extra_info, re.MULTILINE):
                stated, real = int(found[1]), int(found[2])
                if real < stated < _STREAMED and (more := self.frames * stated // max(real, 1)) > self.frames:
                    return more
        return self.frames


def _bytes(path: str | os.PathLike) -> io.BytesIO:
    """Returns the content of a file or a pipe. A pipe that has no writer counts as empty."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as file:
        return io.BytesIO(file.read())


def _counted(source: io.BytesIO | bytes) -> bytes | None:
    """Returns ``mp3.with_length`` of a file. Maps a file on disk into memory, so that only the parts used are read."""
    if isinstance(source, io.BytesIO):
        return mp3.with_length(source.getvalue())
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return mp3.with_length(data)


def _open(path: str | os.PathLike | Memory, pipes: bool = True) -> _File:
    try:
        if isinstance(path, Memory):
            return _decoder(io.BytesIO(path.data))
        name = os.fsencode(path)
        status = os.stat(name)
        pipe = stat.S_ISFIFO(status.st_mode)
        for holds, cause in (
            (stat.S_ISDIR(status.st_mode), "is a folder, not an audio file"),
            (not pipe and not stat.S_ISREG(status.st_mode), "is neither a regular file nor a pipe"),
            (pipe and not pipes, "is a pipe: its length is known only after reading"),
        ):
            if holds:
                raise AudioError(path, cause)
        # Given the name *.raw, soundfile would assume that the file has no header. It gets the bytes instead.
        source = _bytes(path) if pipe or name.lower().endswith(b".raw") else name
        if not (len(source.getbuffer()) if isinstance(source, io.BytesIO) else status.st_size):
            raise AudioError(path, "empty file (0 bytes)" if not pipe else "empty: this pipe delivered no data")
        return _decoder(source)
    except FileNotFoundError as error:
        raise AudioError(path, "no such file") from error
    except UnicodeEncodeError as error:
        raise AudioError(path, "no such file: its name is not valid text") from error
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
        raise AudioError(path, f"cannot be read as audio: {reason.strip()}") from error


def _decoder(source: io.BytesIO | bytes) -> _File:
    """Opens an audio file. `source` is its content (BytesIO) or its encoded name (bytes)."""
    file = _File(source)
    if file.format == "MP3" and (counted := _counted(source)) is not None:
        file.close()
        file = _File(io.BytesIO(counted))
    return file


def duration(path: str | os.PathLike | Memory) -> float:
    """Returns the seconds of audio that the file's header promises. Raises AudioError for a pipe, and for a file that
    cannot be read as audio."""
    with _open(path, pipes=False) as file:
        return file.promised() / file.samplerate


def load(
    path: str | os.PathLike | Memory, sample_rate: int = 16000, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Returns the audio of a file as (samples,) fp32, mono (mean of the channels), resampled to ``sample_rate``.

    Reads ``duration`` seconds from ``offset`` seconds on; None or 0 reads to the end. Integer formats are scaled to
    [-1, 1). A pipe is read to its end, and can be read only once.

    Raises AudioError, which names the file and the cause. For example, the file is missing, unreadable or empty, has no
    samples at the offset, or has samples that are NaN, infinite or beyond 1e10. Raises ShortAudio if the file is
    shorter than its header promises, so that more than 10 ms of the requested audio are missing.
    """
    if not (offset >= 0 and math.isfinite(offset)) or (duration is not None and not duration >= 0):
        raise AudioError(path, f"offset={offset} and duration={duration} must not be negative, nor the offset infinite")
    try:
        return _load(path, sample_rate, offset, duration)
    except MemoryError as error:
        raise AudioError(path, "does not fit into memory") from error


def _load(path: str | os.PathLike | Memory, sample_rate: int, offset: float, duration: float | None) -> np.ndarray:
    with _open(path) as file:
        rate, frames, promised = file.samplerate, file.frames, file.promised()
        if frames <= 0:
            raise AudioError(path, "has no samples")
        if rate < _LOWEST_RATE:
            raise AudioError(path, f"a sample rate of {rate} Hz is too low for speech")
        if offset * rate >= frames:
            raise AudioError(path, f"offset {offset} s is past the end ({frames / rate:.3f} s)")
        first = int(offset * rate)
        wanted = promised - first
        if duration:
            wanted = min(wanted, max(1, round(min(duration * rate, promised))))
        try:
            if first:
                file.forward(first)
            samples = np.concatenate([*file.chunks(min(wanted, frames - first))])
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise AudioError(path, f"damaged: {getattr(error, 'error_string', error)}") from error
    lengths = f"the header promises {promised / rate:.3f} s, but the file has {(first + len(samples)) / rate:.3f} s"
    if not len(samples):
        raise AudioError(path, f"truncated: {lengths}")
    with np.errstate(invalid="ignore"):  # inf and -inf have no mean; the NaN is reported below
        mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise AudioError(path, f"{int((~np.isfinite(mono)).sum())} of {len(mono)} samples are NaN or infinite")
    if (peak := float(np.abs(mono).max())) > _LOUDEST:
        raise AudioError(path, f"damaged: a sample has the value {peak:.3g}; full scale is 1")
    found = np.ascontiguousarray(resample(mono, rate, sample_rate))
    if not len(found):
        raise AudioError(path, f"too short: {len(mono)} samples at {rate} Hz give not one sample at {sample_rate} Hz")
    if wanted - len(samples) > rate // 100:  # codecs round lengths to whole blocks, so 10 ms may be missing
        raise ShortAudio(path, f"truncated: {lengths}", "truncated", found)
    return found


def resample(samples: np.ndarray, rate: float, new_rate: float) -> np.ndarray:
    """Resamples (samples,) from ``rate`` to ``new_rate`` Hz by soxr at quality HQ. Returns
    (samples * new_rate / rate,) fp32."""
    samples = np.asarray(samples, dtype=np.float32)
    if rate == new_rate or not len(samples):
        return samples
    return soxr.resample(samples, rate, new_rate, quality="HQ")


def change_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """Plays (samples,) ``speed`` times as fast, which also changes the pitch. Returns about samples / speed values."""
    return resample(samples, speed, 1.0)


def change_tempo(samples: np.ndarray, tempo: float, sample_rate: int) -> np.ndarray:
    """Makes (samples,) fp32 ``tempo`` times as fast at the same pitch. Returns round(samples / tempo) values, fp32.
    If that is at most 15 ms, it returns the beginning of the input instead.

    The method is waveform-similarity overlap-add (Verhelst and Roelands, 1993). It adds windows of 30 ms that overlap
    by half. They are taken from the input at distances of 15 ms times ``tempo``. Each is moved by up to 8 ms, to the
    place where it best continues the window before.
    """
    half, reach = round(0.015 * sample_rate), round(0.008 * sample_rate)
    size = round(len(samples) / tempo)
    if tempo == 1.0 or size <= half:
        return samples[:size] if size <= half else samples
    padded = np.pad(samples.astype(np.float32), (reach, reach + 3 * half))
    count = -(-size // half)
    window = (0.5 - 0.5 * np.cos(np.pi * (np.arange(2 * half) + 0.5) / half)).astype(np.float32)
    out = np.zeros((count + 1) * half, np.float32)
    start = reach  # where the current window begins in `padded`
    out[:half] = padded[start : start + half] * (1 - window[:half])  # the first window does not fade in
    for i in range(count):
        out[i * half : (i + 2) * half] += padded[start : start + 2 * half] * window
        wanted = padded[start + half : start + 2 * half]  # how the next window would begin at the old tempo
        lowest = min(round((i + 1) * half * tempo), len(samples))
        start = lowest + int(np.correlate(padded[lowest : lowest + half + 2 * reach], wanted, "valid").argmax())
    return out[:size]


def silence_bounds(samples: np.ndarray, top_db: float = 60.0, frame: int = 2048, hop: int = 512) -> tuple[int, int]:
    """Returns (first, end) of the part ``samples[first:end]`` without the silence at both ends. A frame of ``frame``
    samples is centred on every ``hop``-th sample. It is silent if its power is more than ``top_db`` dB below that of
    the loudest frame.

    If everything is silent, the part is all samples. Equivalent: ``librosa.effects.trim(samples, top_db)[1]``, except
    that librosa counts a frame below -100 dB of full scale as one of -100 dB.
    """
    if not len(samples):
        return 0, 0
    energy = np.concatenate(([0.0], np.cumsum(np.square(samples, dtype=np.float64))))
    centres = np.arange(1 + len(samples) // hop) * hop
    power = (energy[(centres + frame // 2).clip(max=len(samples))] - energy[(centres - frame // 2).clip(min=0)]) / frame
    loud = np.flatnonzero(power > max(power.max(), 1e-10) * 10 ** (-top_db / 10))
    if not len(loud):
        return 0, len(samples)
    return int(loud[0]) * hop, min(len(samples), (int(loud[-1]) + 1) * hop)
