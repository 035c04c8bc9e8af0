"""Reads the audio of utterances from files, shards or memory."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from jasper_fast.data import shards
from jasper_fast.data.manifest import Utterance
from jasper_fast.data.shards import Packed
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError, Memory, ShortAudio

_ROUNDING = 0.1  # seconds; the duration in a manifest may exceed the file's by this and 1 %


class AudioReader:
    """Reads utterances at ``sample_rate`` Hz; ``trim`` cuts the silence at both ends."""

    def __init__(self, sample_rate: int, trim: bool = False) -> None:
        self.sample_rate, self.trim = sample_rate, trim
        self._memory: dict[Utterance, tuple[np.ndarray, float]] = {}
        self._fetched: dict[Packed, bytes] = {}

    def fetch(self, utterances: Iterable[Utterance]) -> None:
        """Fetches the bytes of these utterances from object stores, all at the same time, for the next calls of
        ``read``. Replaces what was fetched before."""
        self._fetched = shards.fetch(u.packed for u in utterances if u.packed and u not in self._memory)

    def read(self, utterance: Utterance, variant: float | None = None) -> tuple[np.ndarray, float]:
        """Returns the samples (S,) fp32, which callers must not change, and the seconds that trimming removed from
        their beginning.

        ``variant``, from 0 to 1, chooses among the utterance's alternatives, if it has any. Raises ShortAudio, which
        has the available samples, if the audio is shorter than its header or the manifest says, and AudioError if it
        cannot be read.
        """
        if utterance in self._memory:
            return self._memory[utterance]
        if utterance.alternatives and variant is not None:
            path = utterance.alternatives[int(variant * len(utterance.alternatives))]
            # An alternative has another duration than the utterance. 0 reads to the end of the file.
            utterance = replace(utterance, path=path, duration=0.0)
        path, seconds = utterance.path, utterance.seconds
        try:
            fetched = self._fetched.get(utterance.packed)
            source = utterance.source() if fetched is None else Memory(path, fetched)
            samples = audio.load(source, self.sample_rate, utterance.offset, seconds)
            held = len(samples) / self.sample_rate
            if seconds > held * 1.01 + _ROUNDING:
                cause = f"the manifest says {seconds:.3f} s, but the file has {held:.3f} s"
                raise ShortAudio(path, cause, "wrong_duration", samples)
        except ShortAudio as short:
            short.samples, short.start = self._trimmed(short.samples)
            raise
        return self._trimmed(samples)

    def _trimmed(self, samples: np.ndarray) -> tuple[np.ndarray, float]:
        if not self.trim:
            return samples, 0.0
        first, end = audio.silence_bounds(samples)
        return samples[first:end], first / self.sample_rate

    def preload(self, utterances: Sequence[Utterance], max_gib: float = 4.0) -> None:
        """Reads all audio into memory, trimmed and resampled, for corpora that are read many times.

        This takes 4 bytes per sample. Worker processes that are forked later share the memory. A file that cannot be
        read is reported when it is used. Utterances with alternatives are not preloaded. Raises ValueError if more
        than ``max_gib`` would be needed.
        """
        plain = [u for u in utterances if not u.alternatives]
        gib = sum(u.seconds for u in plain) * self.sample_rate * 4 / 2**30
        if gib > max_gib:
            raise ValueError(f"{gib:.1f} GiB of audio exceed the {max_gib} GiB allowed; do not preload this corpus")

        def read(utterance: Utterance) -> tuple[np.ndarray, float] | None:
            try:
                return self.read(utterance)
            except AudioError:
                return None

        with ThreadPoolExecutor() as pool:
            self._memory = {u: found for u, found in zip(plain, pool.map(read, plain), strict=True) if found}
