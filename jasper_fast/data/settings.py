"""Settings for reading, filtering and perturbing a data set, by the keys of NVIDIA's ``audio_dataset``."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from jasper_fast.data import perturb
from jasper_fast.data.join import Join
from jasper_fast.data.perturb import Perturb

# For each perturbation: its default Chance, and a dict from keys of the configuration to fields of Chance.
_P = {"p": "p"}
_RATES = {"min_rate": "low", "max_rate": "high"} | _P
_PERTURBATIONS = {
    "speed": (perturb.SPEED, _RATES | {"discrete": "discrete"}),
    "gain": (perturb.GAIN, {"min_gain_dbfs": "low", "max_gain_dbfs": "high"} | _P),
    "shift": (perturb.SHIFT, {"min_shift_ms": "low", "max_shift_ms": "high"} | _P),
    "noise": (perturb.NOISE, {"min_snr_db": "low", "max_snr_db": "high"} | _P),
    "tempo": (perturb.TEMPO, _RATES),
}
_PLAIN = {name: name for name in ("sample_rate", "trim_silence", "min_duration", "max_duration", "preload")} | {
    "normalize_transcripts": "normalize_text",
    "max_utts": "max_utterances",
}
_ELSEWHERE = {"pad_to_max_duration", "sort_by_duration"}  # not used here: LogMelFeatures pads, BatchSampler sorts


@dataclass(frozen=True)
class AudioSettings:
    """Sample rate, trimming, the shortest and longest training utterance in seconds, and random perturbations.

    With ``offline_speeds`` the files of an utterance at other speeds are also used. Only the first ``max_utterances``
    are used (0: all). ``preload`` keeps all audio in memory.
    """

    sample_rate: int = 16000
    trim_silence: bool = False
    normalize_text: bool = True
    min_duration: float = 0.1
    max_duration: float = math.inf
    perturb: Perturb = field(default_factory=Perturb)
    join: Join | None = None
    offline_speeds: bool = False
    max_utterances: int = 0
    preload: bool = False

    @classmethod
    def from_config(cls, audio_dataset: dict[str, Any] | None) -> Self:
        """Makes the settings from an ``audio_dataset`` of NVIDIA's Jasper. The dict may also have the keys
        ``noise_perturbation``, ``tempo_perturbation``, ``join`` and ``preload``. Raises ValueError, which names an
        unknown key or a setting out of range."""
        left = dict(audio_dataset or {})
        parts = {
            name: _built(default, left.pop(f"{name}_perturbation", None), keys, f"{name}_perturbation")
            for name, (default, keys) in _PERTURBATIONS.items()
        }
        settings = cls(
            perturb=Perturb(**parts),
            join=_built(Join(), left.pop("join", None), {f.name: f.name for f in fields(Join)}, "join"),
            offline_speeds=not left.pop("ignore_offline_speed_perturbation", True),
        )
        return _built(settings, {k: v for k, v in left.items() if k not in _ELSEWHERE}, _PLAIN, "audio_dataset")


def _built(default: Any, given: dict[str, Any] | None, keys: dict[str, str], where: str) -> Any:
    """Returns the dataclass ``default`` with the fields that ``given`` sets, or None if ``given`` is None."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"{where} must have settings by name, got {given!r}")
    if unknown := given.keys() - keys.keys():
        raise ValueError(f"{where}.{min(unknown)} is unknown; known keys: {', '.join(sorted(keys))}")
    for key, value in given.items():
        if isinstance(getattr(default, keys[key]), int | float) and not isinstance(value, int | float):
            raise ValueError(f"{where}.{key} must be a number, true or false, got {value!r}")
    try:
        return replace(default, **{keys[key]: value for key, value in given.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
