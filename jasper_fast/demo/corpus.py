"""Makes the demo's synthetic corpus of spoken commands. No voice is in both the training and the test part."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr
from rich.progress import track

from jasper_fast.data.manifest import entry
from jasper_fast.data.prepare.writing import write_manifest
from jasper_fast.demo import espeak

SAMPLE_RATE = 16000

# Accents and voices of espeak-ng, without the voices that imitate robots, whisper or are meant as a joke.
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-gb-x-gbcwmd", "en-029")
_WOMEN = {
    "train": "f1 f2 f3 f5 Alicia anika aunty belinda grandma shelby steph steph2 Nguyen",
    "test": "f4 Andrea Annie linda",
}
_MEN = {
    "train": "Alex Denis Diogo Gene Gene2 Hugo Lee Marco Mario Mike Reed RicishayMax adam announcer benjamin boris"
    " david ed edward grandpa ian iven3 john klatt2 klatt5 m1 m2 m4 m6 m7 m8 marcelo michel norbert pablo pedro quincy"
    " rob robert sandro travis victor",
    "test": "m3 Andy Michael gustave klatt3 paul",
}
VOICES = {split: f"{_WOMEN[split]} {_MEN[split]}".split() for split in ("train", "test")}

COMMANDS = (
    "<turn> <on> the <room> <thing>",
    "set the <clock> to <number> <time>",
    "make the <light> <colour>",
    "<open> the <room> <hole>",
    "<number> <plus> <number>",
)
WORDS = {
    "turn": ("turn", "switch"),
    "on": ("on", "off"),
    "room": ("kitchen", "bedroom", "garden", "office"),
    "thing": ("light", "lamp", "fan", "heater", "radio"),
    "clock": ("timer", "alarm"),
    "time": ("minutes", "hours"),
    "light": ("light", "lamp"),
    "colour": ("red", "green", "blue", "yellow"),
    "open": ("open", "close"),
    "hole": ("door", "window"),
    "plus": ("plus", "minus", "times"),
}
UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number(rng: random.Random) -> str:
    """Draws a number in words: below ten or from ten to nineteen with a probability of 1/4 each, else 20 to 99."""
    style = rng.randrange(4)
    if style < 2:
        return rng.choice((UNITS, TEENS)[style])
    return rng.choice(TENS) if rng.random() < 0.3 else f"{rng.choice(TENS)} {rng.choice(UNITS[1:])}"


def sentence(rng: random.Random) -> str:
    """Draws a command."""
    return re.sub(
        r"<(\w+)>", lambda m: number(rng) if m[1] == "number" else rng.choice(WORDS[m[1]]), rng.choice(COMMANDS)
    )


def trim(samples: np.ndarray, sample_rate: int, keep: float = 0.08, level: float = 0.01) -> np.ndarray:
    """Cuts the silence at the start and at the end, but leaves `keep` seconds of it on each side."""
    loud = np.flatnonzero(np.abs(samples) > level * np.abs(samples).max())
    pad = int(keep * sample_rate)
    return samples[max(0, loud[0] - pad) : loud[-1] + pad]


def record(path: Path, samples: np.ndarray, rate: int, uniform: Callable, noise: np.random.Generator) -> None:
    """Writes samples as a WAV file, at a random loudness and with a little noise, as in real recordings.
    `uniform(low, high)` draws a number."""
    samples = samples * (uniform(0.2, 0.6) / np.abs(samples).max())
    samples += noise.standard_normal(len(samples), dtype=np.float32) * 10 ** uniform(-4, -2.5)
    soundfile.write(path, samples, rate, subtype="PCM_16")


def synthesise(out: Path, split: str, count: int, seed: int = 0, progress: bool = True) -> Path:
    """Synthesises `count` commands as 16 kHz WAV files in `out/split` and returns the manifest's path.

    The manifest is JSON lines with `audio_filepath` (relative to `out`), `duration` in seconds, `text` and `speaker`.
    The voices of the split speak in turn. Accent, speed, pitch, loudness and noise are random.
    Raises `SynthError` if the synthesiser is missing.
    """
    speaker = espeak.start()
    rng = random.Random(f"{seed} {split}")
    noise = np.random.default_rng([seed, len(split)])
    (out / split).mkdir(parents=True, exist_ok=True)
    cast, lines = VOICES[split], []
    for index in track(range(count), description=f"speaking {split} ({len(cast)} voices)", disable=not progress):
        voice = cast[index % len(cast)]
        text = sentence(rng)
        samples = speaker.say(
            text,
            f"{rng.choice(ACCENTS)}+{voice}",
            rate=rng.randint(140, 200),
            pitch=rng.randint(30, 70),
            pitch_range=rng.randint(30, 70),
        )
        samples = soxr.resample(trim(samples, speaker.sample_rate), speaker.sample_rate, SAMPLE_RATE)
        name = f"{split}/{index:04d}_{voice}.wav"
        record(out / name, samples, SAMPLE_RATE, rng.uniform, noise)
        lines.append(entry(name, round(len(samples) / SAMPLE_RATE, 4), text, speaker=voice))
    write_manifest(out / f"{split}.jsonl", lines)
    return out / f"{split}.jsonl"
