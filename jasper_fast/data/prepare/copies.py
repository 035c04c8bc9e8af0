"""Makes copies of audio files at other speeds or in another format. Does not make a copy again if it exists."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
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
    """A kind of copy that is made of every file: the ``speed`` relative to the original, and the ``suffix`` of the
    format."""

    speed: float = 1.0
    suffix: str = ".flac"

    @property
    def plain(self) -> bool:
        """Whether this kind is the original itself, so that nothing is copied."""
        return self.speed == 1.0 and self.suffix == ".flac"

    def folder(self, original: Path) -> Path:
        """Returns the folder of the copies, beside the folder of the originals. For a plain kind both are the same."""
        speed = "" if self.speed == 1.0 else f"-sp{self.speed:g}"
        return original if self.plain else original.with_name(f"{original.name}{speed}{self.suffix.replace('.', '-')}")

    def path(self, file: Path, original: Path) -> Path:
        """Returns the path of the copy of ``file``, a file in the folder ``original``."""
        return self.folder(original) / file.relative_to(original).with_suffix(self.suffix)


def make(file: Path, copy: Copy, target: Path, work: Path) -> float:
    """Writes a 16-bit copy of an audio file to ``target``, at the same sample rate, unless ``target`` exists or
    ``copy`` is plain. Returns the length of ``target`` in seconds.

    An incomplete copy lies in the folder ``work``. Raises PrepareError, which names a file that cannot be read.
    """
    try:
        if not copy.plain and not target.exists():
            rate = soundfile.info(str(file)).samplerate
            samples = audio.change_speed(audio.load(file, rate), copy.speed)
            content = io.BytesIO()  # libsndfile does not say why it cannot write to a disk
            soundfile.write(content, samples, rate, subtype="PCM_16", format=copy.suffix[1:].upper())
            with whole(target, work) as temporary:
                temporary.write_bytes(content.getbuffer())
        return audio.duration(target)
    except (AudioError, soundfile.LibsndfileError) as error:
        raise PrepareError(f"{file}: {error}") from error


def in_parallel(
    work: Callable[[Any], Any], items: Sequence[Any], jobs: int, what: str, progress: Progress
) -> Iterator[Any]:
    """Yields the result of ``work`` for each item, in order, computed by ``jobs`` threads (0: one per core). Threads
    suffice, because decoding and resampling release Python's global lock. Unlike processes, they end with a killed
    run."""
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        try:
            for done, result in enumerate(pool.map(work, items), 1):
                progress(what, done, len(items))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
