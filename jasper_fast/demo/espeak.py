"""Calls the speech synthesiser espeak-ng through ctypes.

The library (GPLv3) is loaded at run time from the package `espeakng-loader`. No part of it is in this project.
"""

import ctypes
import functools
import os
import tempfile
from pathlib import Path

import numpy as np

AUDIO_OUTPUT_SYNCHRONOUS = 2  # `espeak_Synth` returns only when the callback has received all samples
INITIALIZE_DONT_EXIT = 0x8000
CHARS_UTF8 = 1
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4
MAX_DATA_PATH = 140  # bytes; espeak-ng copies the path to a buffer of 160 bytes and truncates a longer path

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class SynthError(RuntimeError):
    """Raised if the synthesiser is missing, does not start, or cannot speak a text. The message says what to do."""


class Espeak:
    """Speaks text. The library has global state, so make one object per process, and use it in one thread at a time.

    Raises `SynthError` if the package `espeakng-loader` is missing or its library does not start.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise SynthError(
                "the demo needs the speech synthesiser espeak-ng: pip install espeakng-loader"
                " (or, for all the demo's extras, pip install 'jasper-fast[demo]')"
            ) from error
        library = espeakng_loader.get_library_path()
        try:
            self._lib = ctypes.CDLL(library)
        except OSError as error:
            raise SynthError(
                f"cannot load {library}: {error}; reinstall it: pip install --force-reinstall espeakng-loader"
            ) from error
        data = self._short_path(espeakng_loader.get_data_path())
        self.sample_rate: int = self._lib.espeak_Initialize(
            AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), INITIALIZE_DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise SynthError(
                f"espeak-ng did not start with the data in {data}: pip install --force-reinstall espeakng-loader"
            )
        self._chunks: list[np.ndarray] = []
        self._callback = _Callback(self._collect)  # the library holds no reference to it, so keep one here
        self._lib.espeak_SetSynthCallback(self._callback)

    def _short_path(self, path: str) -> str:
        if len(os.fsencode(path)) <= MAX_DATA_PATH:
            return path
        self._link_dir = tempfile.TemporaryDirectory(prefix="espeak-")
        link = Path(self._link_dir.name) / "espeak-ng-data"
        link.symlink_to(path)
        return str(link)

    def _collect(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # 0 continues the synthesis

    def say(
        self, text: str, voice: str = "en-us", *, rate: int = 175, pitch: int = 50, pitch_range: int = 50
    ) -> np.ndarray:
        """Returns the spoken text as float32 samples in [-1, 1) at `self.sample_rate` Hz, with silence around it.

        `voice` is an espeak-ng language with an optional variant ("en-us+f3"). `rate` is in words per minute (80 to
        450); `pitch` and `pitch_range` are 0 to 99. Raises `SynthError` for an unknown voice and if nothing was spoken.
        """
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SynthError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, pitch_range), (VOLUME, 100)):
            self._lib.espeak_SetParameter(parameter, int(value), 0)
        self._chunks.clear()
        data = text.encode()
        status = self._lib.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, CHARS_UTF8, None, None)
        self._lib.espeak_Synchronize()
        if status != 0 or not self._chunks:
            raise SynthError(f"espeak-ng spoke nothing for {text!r} with voice {voice!r} (status {status})")
        return np.concatenate(self._chunks).astype(np.float32) / 32768.0


start = functools.cache(Espeak)  # returns this process's synthesiser; the first call starts it
