"""Computes log-mel features, the input of Jasper, on the device of the audio.

Shapes: N utterances, S samples, T frames, F mel bands.
"""

import math
from collections.abc import Sized
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOG_GUARDS = {"reference": 1e-20, "nemo": 2**-24}  # by convention: the value added before the logarithm
STD_GUARD = 1e-5  # added to the standard deviation before the division
_NOISE_PERIOD = 16384  # samples, after which the dither of evaluation mode repeats
_AUGMENT_KEYS = ("spec_augment", "cutout_augment", "speaker_warp")  # keys that augment.py reads

_SAME = "sample_rate window_size window_stride window n_fft dither normalize log pad_to_max_duration max_duration"
# Maps the keys of filterbank_features, in NVIDIA's, NeMo's or our configurations, to names of arguments.
_KEYS = {name: name for name in _SAME.split()} | {
    "n_filt": "n_mels",
    "pad_align": "pad_to_multiple",
    "preemph": "preemphasis",
    "lowfreq": "f_min",
    "highfreq": "f_max",
    "log_zero_guard_type": "log_guard_type",
    "log_zero_guard_value": "log_guard",
    "mag_power": "mag_power",
    "convention": "convention",
}
_WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "bartlett": torch.bartlett_window,
}


def _hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's scale: linear up to 1 kHz (200/3 Hz per mel), logarithmic above (27 mels per factor of 6.4)."""
    return torch.where(hz < 1000.0, hz * 3 / 200, 15 + 27 * torch.log(hz.clamp(min=1e-10) / 1000) / math.log(6.4))


def _mel_to_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


def mel_filterbank(
    sample_rate: int = 16000, n_fft: int = 512, n_mels: int = 64, f_min: float = 0.0, f_max: float | None = None
) -> Tensor:
    """Returns triangular mel filters of equal area, (n_mels, n_fft // 2 + 1) fp32. Frequencies are in Hz.

    Equivalent to ``librosa.filters.mel(..., htk=False, norm="slaney")``, up to 2e-9.
    Raises ValueError if f_min to f_max is empty or exceeds sample_rate / 2.
    """
    f_max = sample_rate / 2 if f_max is None else float(f_max)
    if not 0 <= f_min < f_max <= sample_rate / 2:
        raise ValueError(f"mel band {f_min} to {f_max} Hz must lie within 0 to {sample_rate / 2} Hz (half the rate)")
    bounds = _hz_to_mel(torch.tensor([f_min, f_max], dtype=torch.float64))
    steps = torch.arange(n_mels + 2, dtype=torch.float64) / (n_mels + 1)
    corners = _mel_to_hz(bounds[0] + (bounds[1] - bounds[0]) * steps)
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    low, centre, high = (corners[i : i + n_mels, None] for i in range(3))
    rise = (bins - low) / (centre - low)
    fall = (high - bins) / (high - centre)
    return (torch.minimum(rise, fall).clamp(min=0) * 2 / (high - low)).float()


class LogMelFeatures(nn.Module):
    """Audio (N, S) in [-1, 1], lengths (N,) in samples -> features (N, n_mels, T) fp32, lengths (N,) in frames.

    The steps are dither, pre-emphasis, power spectrum (centred windows), mel filters, logarithm, and normalisation of
    each band to mean 0 and standard deviation 1 over the utterance's valid frames. Frames at or beyond the length are
    exactly 0. The returned lengths are ceil(samples / hop). T is 1 + S // hop, rounded up to a multiple of
    ``pad_to_multiple``. The memory order of the features is (N, T, n_mels), as the network needs it.

    Semantics (``convention="reference"``): FilterbankFeatures of NVIDIA's Jasper for PyTorch (DeepLearningExamples),
    with these differences:
    - Samples beyond the length are taken as zero.
    - With ``batch_invariant=True`` (the default) zeros follow the end of every utterance. With False, as
      in NVIDIA's, the end of the padded batch is reflected. Then the last frame of an utterance depends on the rest of
      its batch, unless the window of that frame ends within the utterance.
    - Dither is added in training and evaluation, as in NVIDIA's. In evaluation mode every call adds the same noise, so
      that a repeated call gives the same transcript; ``dither=0`` switches it off.
    - If an utterance has one frame, its features normalised per band are zeros. (NVIDIA's are NaN, because one value
      has no variance.)
    - A batch with S <= n_fft / 2, which is too short for the reflection, is extended by zeros. (NVIDIA's raises an
      error.)

    ``convention="nemo"`` makes the features of NeMo's FilterbankFeatures instead: lengths = samples // hop, zeros
    beyond both ends of the audio even after pre-emphasis, dither only in training, and a guard of 2^-24.

    For both conventions ``log_guard`` sets the guard. It is added to the power before the logarithm, or is the lower
    bound of the power with ``log_guard_type="clamp"``. ``mag_power`` is the exponent of the magnitude. ``normalize`` is
    "per_feature", "all_features", None, or NeMo's dict of ``fixed_mean`` and ``fixed_std``, one number per band.
    ``pad_to_max_duration`` makes T at least the number of windows in ``max_duration`` seconds.

    A NaN in a valid sample stays a NaN in the features; the caller must report it. The computation is always in fp32
    and without gradient, and does not synchronise with the device. Windows are in seconds, frequencies in Hz. Raises
    ValueError for a bad argument.

    Equivalent, for one utterance ``x`` of more than 160 samples without dither::

        frames = math.ceil(len(x) / 160)
        x = F.pad(x, (0, max(frames * 160, 257) - len(x)))
        x = torch.cat([x[:1], x[1:] - 0.97 * x[:-1]])
        power = torch.stft(x, 512, 160, 320, torch.hann_window(320, periodic=False), return_complex=True).abs() ** 2
        y = torch.log(mel_filterbank() @ power + 1e-20)[:, :frames]
        y = (y - y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + 1e-5)
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 64,
        dither: float = 1e-5,
        pad_to_multiple: int = 16,
        *,
        window_size: float = 0.02,
        window_stride: float = 0.01,
        window: str = "hann",
        n_fft: int | None = None,
        f_min: float = 0.0,
        f_max: float | None = None,
        preemphasis: float | None = 0.97,
        normalize: str | dict[str, Any] | None = "per_feature",
        log: bool = True,
        log_guard: float | None = None,
        log_guard_type: str = "add",
        mag_power: float = 2.0,
        pad_to_max_duration: bool = False,
        max_duration: float = math.inf,
        batch_invariant: bool = True,
        convention: str = "reference",
    ) -> None:
        super().__init__()
        self.sample_rate, self.n_mels, self.pad_to_multiple = sample_rate, n_mels, pad_to_multiple
        self.dither, self.preemphasis, self.normalize, self.log = dither, preemphasis, normalize, log
        self.win_length, self.hop_length = int(sample_rate * window_size), int(sample_rate * window_stride)
        self.n_fft = n_fft or 1 << max(self.win_length - 1, 0).bit_length()
        self.batch_invariant, self.convention = batch_invariant, convention
        self.log_guard = LOG_GUARDS.get(convention) if log_guard is None else log_guard
        self.log_guard_type, self.mag_power = log_guard_type, mag_power
        self._window_name, self._f_min, self._f_max = window, f_min, f_max
        known = ("per_feature", "all_features", None)
        fixed = (
            isinstance(normalize, dict)
            and normalize.keys() == {"fixed_mean", "fixed_std"}
            and all(isinstance(values, Sized) and len(values) == n_mels for values in normalize.values())
            and all(isinstance(std, Real) and std > 0 for std in normalize["fixed_std"])
        )
        for fits, wrong in (
            (window in _WINDOWS, f"window={window!r} is unknown; choose one of {', '.join(_WINDOWS)}"),
            (convention in LOG_GUARDS, f"{convention=} is unknown; choose one of {', '.join(LOG_GUARDS)}"),
            (log_guard_type in ("add", "clamp"), f"{log_guard_type=} is unknown; choose add or clamp"),
            (
                fixed or normalize in known,
                f"normalize={normalize!r} is unknown; choose one of {', '.join(map(repr, known))}, or give fixed_mean "
                f"and fixed_std, {n_mels} numbers each, those of fixed_std positive",
            ),
            (
                isinstance(self.log_guard, Real) and self.log_guard >= 0,
                f"{log_guard=} must be a number that is not negative",
            ),
            ((pad_to_multiple or 0) >= 0, f"{pad_to_multiple=} must not be negative"),
            (dither >= 0, f"dither={dither} must not be negative"),
            (n_mels > 0, f"{n_mels=} must be positive"),
            (self.hop_length > 0, f"{window_stride=} is shorter than a sample"),
            (
                0 < self.win_length <= self.n_fft,
                f"a window of {self.win_length} samples is not within 1..n_fft={self.n_fft}",
            ),
            (not pad_to_max_duration or math.isfinite(max_duration), "pad_to_max_duration needs max_duration"),
        ):
            if not fits:
                raise ValueError(wrong)
        longest = max_duration if pad_to_max_duration else 0.0
        self.min_frames = 1 + math.ceil((longest * sample_rate - self.win_length) / self.hop_length)
        for name, value in self._constants().items():
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def from_config(cls, filterbank_features: dict[str, Any], **overrides: Any) -> Self:
        """Builds the features from NVIDIA's ``filterbank_features`` dict. ``overrides`` are arguments of this class.

        spec_augment, cutout_augment and speaker_warp in the dict are ignored; ``speech.augment.from_config`` reads
        them. Raises ValueError for a wrong setting, and names an unknown key.
        """
        given = {key: value for key, value in filterbank_features.items() if key not in _AUGMENT_KEYS}
        if (spliced := given.pop("frame_splicing", 1)) != 1:
            raise ValueError(f"filterbank_features.frame_splicing={spliced} is not supported; use 1")
        if unknown := given.keys() - _KEYS.keys():
            known = ", ".join(sorted([*_KEYS, "frame_splicing", *_AUGMENT_KEYS]))
            raise ValueError(f"filterbank_features.{min(unknown)} is unknown; known keys: {known}")
        return cls(**({_KEYS[key]: value for key, value in given.items()} | overrides))

    def _constants(self) -> dict[str, Tensor]:
        constants = {
            "mel": mel_filterbank(self.sample_rate, self.n_fft, self.n_mels, self._f_min, self._f_max),
            "window": _WINDOWS[self._window_name](self.win_length, periodic=False, dtype=torch.float32),
            "noise": torch.randn(_NOISE_PERIOD, generator=torch.Generator().manual_seed(0)),
        }
        if isinstance(self.normalize, dict):
            constants["fixed"] = torch.tensor([self.normalize[key] for key in ("fixed_mean", "fixed_std")]).float()
        return constants

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.mel.dtype != torch.float32 and not self.mel.is_meta:
            # A call such as model.half() must not round the filters, so they are made again in fp32.
            for name, value in self._constants().items():
                setattr(self, name, value.to(self.mel.device))
        return self

    def frames(self, samples: Tensor | int) -> Tensor | int:
        """Returns the number of valid frames of ``samples`` samples: ceil(samples / hop), or floor for NeMo."""
        return (samples + (0 if self.convention == "nemo" else self.hop_length - 1)) // self.hop_length

    @torch.no_grad()
    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if audio.dim() != 2 or lengths.shape != audio.shape[:1]:
            raise ValueError(
                f"audio must be (N, samples) and lengths (N,), got {tuple(audio.shape)} and {tuple(lengths.shape)}"
            )
        if not len(audio):  # torch.stft needs at least one utterance
            features, frames = self(audio.new_zeros(1, audio.shape[1]), lengths.new_zeros(1))
            return features[:0], frames[:0]
        with torch.autocast(audio.device.type, enabled=False):
            return self._features(audio.float(), lengths.to(audio.device, torch.int64))

    def _features(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        samples, nemo = audio.shape[1], self.convention == "nemo"
        lengths = lengths.clamp(max=samples)
        beyond = torch.arange(samples, device=audio.device) >= lengths[:, None]
        audio = audio.masked_fill(beyond, 0)
        # With these zeros no window of a valid frame reaches the reflection at the end (see batch_invariant).
        zeros = -samples % self.hop_length + max(0, (self.win_length + 1) // 2 - self.hop_length)
        extend = max(zeros if self.batch_invariant else 0, self.n_fft // 2 + 1 - samples)
        audio = F.pad(audio, (0, extend))
        if self.dither > 0 and (self.training or not nemo):
            many = -(-audio.shape[1] // _NOISE_PERIOD)
            noise = torch.randn_like(audio) if self.training else self.noise.repeat(many)[: audio.shape[1]]
            audio = audio + self.dither * noise
        if self.preemphasis is not None:
            audio = torch.cat((audio[:, :1], audio[:, 1:] - self.preemphasis * audio[:, :-1]), dim=1)
        if nemo:
            audio = audio.masked_fill(F.pad(beyond, (0, extend), value=True), 0)
        spectrum = torch.stft(
            audio, self.n_fft, self.hop_length, self.win_length, self.window,
            center=True, pad_mode="constant" if nemo else "reflect", return_complex=True,
        )  # fmt: skip
        total = 1 + samples // self.hop_length
        real, imag = torch.view_as_real(spectrum[..., :total]).unbind(-1)
        # (N, T, bins), contiguous; .sum(-1) over real and imaginary parts would give another memory order
        power = torch.addcmul(real.square(), imag, imag).transpose(1, 2)
        if self.mag_power != 2:
            power = power.pow(self.mag_power / 2)
        mel = power @ self.mel.t()  # (N, T, F): the memory order of the network
        if self.log:
            mel = torch.log(mel + self.log_guard if self.log_guard_type == "add" else mel.clamp(min=self.log_guard))

        frames = self.frames(lengths)
        invalid = (torch.arange(total, device=audio.device) >= frames[:, None])[..., None]
        mel = self._normalize(mel, frames, invalid)
        padded = max(total, self.min_frames)
        padded += -padded % (self.pad_to_multiple or 1)
        return F.pad(mel, (0, 0, 0, padded - total)).transpose(1, 2), frames

    def _normalize(self, mel: Tensor, frames: Tensor, invalid: Tensor) -> Tensor:
        if self.normalize is None:
            return mel.masked_fill(invalid, 0)
        if isinstance(self.normalize, dict):
            mean, std = self.fixed
            return ((mel - mean) / std).masked_fill(invalid, 0)
        dims = 1 if self.normalize == "per_feature" else (1, 2)
        count = (frames * (1 if self.normalize == "per_feature" else self.n_mels)).view(-1, 1, 1)
        mean = mel.masked_fill(invalid, 0).sum(dims, keepdim=True) / count.clamp(min=1)
        centred = (mel - mean).masked_fill(invalid, 0)
        std = (centred.square().sum(dims, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        return centred / (std + STD_GUARD)
