"""Copies of audio files at other speeds or in another format, made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from jasper_fast.data.prepare.writing import PrepareError, Progress, whole
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError


@dataclass(frozen=True)
class Copy:
    """One version of each file: its ``speed`` factor, and the ``suffix`` of its format ("" keeps the original's)."""

    speed: float = 1.0
    suffix: str = ".flac"

    @property
    def plain(self) -> bool:
        """Whether this version is the original itself."""
        return self.speed == 1.0 and self.suffix == ".flac"

    def folder(self, original: Path) -> Path:
        """The folder of the copies, beside the folder of the originals."""
        speed = "" if self.speed == 1.0 else f"-sp{self.speed:g}"
        return original if self.plain else original.with_name(f"{original.name}{speed}{self.suffix.replace('.', '-')}")

    def path(self, file: Path, original: Path) -> Path:
        """The path of the copy of a file in the folder of originals."""
        return self.folder(original) / file.relative_to(original).with_suffix(self.suffix)


def make(file: Path, copy: Copy, target: Path, work: Path) -> float:
    """Writes a 16-bit copy of an audio file at its own sample rate, unless it exists; returns its seconds.

    ``work`` holds it meanwhile. Raises PrepareError naming a file that cannot be read.
    """
    try:
        if not copy.plain and not target.exists():
            rate = soundfile.info(str(file)).samplerate
            samples = audio.change_speed(audio.load(file, rate), copy.speed)
            with whole(target, work) as temporary:
                soundfile.write(str(temporary), samples, rate, subtype="PCM_16", format=copy.suffix[1:].upper())
        return audio.duration(target)
    except (AudioError, soundfile.LibsndfileError) as error:
        raise PrepareError(f"{file}: {error}") from error


def in_parallel(
    work: Callable[[Any], Any], items: Iterable[Any], jobs: int, what: str, total: int, progress: Progress
) -> Iterator[Any]:
    """The results of ``work`` for each item, in order, computed by ``jobs`` threads. Decoding and resampling release
    Python's lock, and threads end with their process, however it is killed."""
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(work, items)
        try:
            for done, result in enumerate(results, 1):
                progress(what, done, total)
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
