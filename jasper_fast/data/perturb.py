"""Random perturbations of an utterance: how they are drawn, and how they change the samples."""

import math
from dataclasses import dataclass

import numpy as np

from jasper_fast.speech import audio


@dataclass(frozen=True)
class Change:
    """The perturbation drawn for one utterance; the default values change nothing.

    ``speed`` and ``tempo`` are factors, ``gain`` is in decibels, ``shift`` in milliseconds to the left. The mean power
    of the noise is ``snr_db`` decibels below that of the speech. The noise's power at each frequency is proportional to
    frequency ** ``slope`` (0 white, -2 brown). ``noise_seed`` is the seed of the noise. ``variant``, from 0 to 1,
    chooses among the alternatives of an utterance.
    """

    speed: float = 1.0
    gain: float = 0.0
    shift: float = 0.0
    variant: float = 0.0
    snr_db: float = math.inf
    slope: float = 0.0
    noise_seed: int = 0
    tempo: float = 1.0

    def apply(self, samples: np.ndarray, sample_rate: int) -> np.ndarray:
        """Returns the samples after speed, tempo, noise, gain and shift, in this order."""
        samples = audio.change_speed(samples, self.speed)
        samples = audio.change_tempo(samples, self.tempo, sample_rate)
        if self.snr_db < math.inf and len(samples):
            samples = add_noise(samples, self.snr_db, self.slope, self.noise_seed)
        samples = samples * np.float32(10 ** (self.gain / 20))
        shift = int(self.shift * sample_rate // 1000)
        if 0 < abs(shift) < len(samples):
            samples = np.roll(samples, -shift)
            samples[slice(-shift, None) if shift > 0 else slice(-shift)] = 0
        return samples


def add_noise(samples: np.ndarray, snr_db: float, slope: float, seed: int) -> np.ndarray:
    """Returns (samples,) fp32 with added noise. The mean power of the noise is ``snr_db`` decibels below that of the
    samples, and its power at each frequency is proportional to frequency ** ``slope``. Digital silence stays as it
    is."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(len(samples), np.float32))
    spectrum *= np.linspace(0.01, 1, len(spectrum)) ** (slope / 2)  # not from 0, because 0 ** -1 is infinite
    noise = np.fft.irfft(spectrum, len(samples))
    speech, power = (np.mean(np.square(x, dtype=np.float64)) for x in (samples, noise))
    return (samples + noise * np.sqrt(speech / power * 10 ** (-snr_db / 10))).astype(np.float32)


@dataclass(frozen=True)
class Chance:
    """The distribution of one perturbation: with probability ``p`` a number from ``low`` to ``high``, else ``nothing``,
    the value that leaves the samples unchanged.

    The distribution is uniform, or log-uniform with ``log``. With ``discrete`` the number is low, nothing or high.
    Raises ValueError for an empty range, for factors (``nothing`` is 1) that are not positive, and for a ``p``
    outside [0, 1].
    """

    low: float
    high: float
    p: float = 1.0
    nothing: float = 0.0
    log: bool = False
    discrete: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.high or (self.nothing == 1 and self.low <= 0):
            least = "0 < min <= max" if self.nothing == 1 else "min <= max"
            raise ValueError(f"need {least}, got min {self.low} and max {self.high}")
        if not 0 <= self.p <= 1:
            raise ValueError(f"the probability p must lie in [0, 1], got {self.p}")

    def draw(self, rng: np.random.Generator) -> float:
        applied, uniform = rng.random() < self.p, rng.random()
        if not applied:
            return self.nothing
        if self.discrete:
            return (self.low, self.nothing, self.high)[int(uniform * 3)]
        if self.log:
            return self.low * (self.high / self.low) ** uniform
        return self.low + uniform * (self.high - self.low)


# The default range of each perturbation.
SPEED = Chance(0.85, 1.15, nothing=1.0)
GAIN = Chance(-10.0, 10.0, p=0.1)
SHIFT = Chance(-5.0, 5.0, p=0.1)
NOISE = Chance(5.0, 60.0, nothing=math.inf)
TEMPO = Chance(0.8, 1.25, nothing=1.0, log=True)


@dataclass(frozen=True)
class Perturb:
    """The perturbations of a data set, from which a Change is drawn. A perturbation that is None is not applied."""

    speed: Chance | None = None
    gain: Chance | None = None
    shift: Chance | None = None
    noise: Chance | None = None
    tempo: Chance | None = None

    def draw(self, rng: np.random.Generator) -> Change:
        """Draws the Change of one utterance. The order of the draws must not change: a seed must always give the same
        data."""
        drawn = {name: part.draw(rng) for name in ("speed", "gain", "shift") if (part := getattr(self, name))}
        drawn["variant"] = rng.random()
        if self.noise:
            drawn |= {"snr_db": self.noise.draw(rng), "slope": -2 * rng.random()}
            drawn["noise_seed"] = int(rng.integers(2**32)) if drawn["snr_db"] < math.inf else 0
        if self.tempo:
            drawn["tempo"] = self.tempo.draw(rng)
        return Change(**drawn)
