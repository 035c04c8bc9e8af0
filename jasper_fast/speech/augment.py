"""Masks features at random for training, for all utterances of a batch together and without a device synchronisation.

SpecAugment and SpecCutout take features (N, F, T) and lengths (N,) in frames. They return features of the same shape,
dtype and memory order, in which the masked cells are 0 (the mean, if features are normalised). In evaluation mode they
return their input. Random numbers come from torch's generator of the features' device. Semantics: SpecAugment and
CutoutAugment of NVIDIA's Jasper for PyTorch, except that masks in time are drawn within the utterance's own length, not
within the padded batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from jasper_fast.speech.warp import SpeakerWarp


def _uniform_int(low: int, high: Tensor | int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draws integers from low..high, both included. ``high`` may be a tensor that broadcasts to ``shape``."""
    return low + (torch.rand(shape, device=device) * (high - low + 1)).long()


def _spans(count: Tensor | int, masks: int, low: int, high: Tensor | int, cells: int, like: Tensor) -> Tensor:
    """Draws ``masks`` spans of low..high cells for each utterance. A span that fits lies within cells 0..count-1.
    Returns (N, masks, cells) bool: whether the cell lies in the span."""
    shape = (like.shape[0], masks)
    width = _uniform_int(low, high, shape, like.device)
    first = _uniform_int(0, (count - width).clamp(min=1) - 1, shape, like.device)
    at = torch.arange(cells, device=like.device)
    return (at >= first[..., None]) & (at < (first + width)[..., None])


def _check_range(what: str, masks: int, low: int, high: int) -> None:
    if masks < 0 or not 0 <= low <= high:
        raise ValueError(f"{what}: need masks >= 0 and 0 <= min <= max, got {masks} masks, min {low} and max {high}")


class SpecAugment(nn.Module):
    """Zeroes ``freq_masks`` spans of min_freq..max_freq mel bands, and ``time_masks`` spans of min_time..max_time
    frames.

    For corpora with very short utterances, ``max_time_ratio`` limits a span in time to this fraction of the utterance,
    or to min_time if that is more. With 1.0 there is no such limit, as in NVIDIA's Jasper. Raises ValueError for an
    empty or negative range, a negative number of masks, and a ratio outside (0, 1].
    """

    def __init__(
        self,
        freq_masks: int = 0,
        max_freq: int = 10,
        time_masks: int = 0,
        max_time: int = 10,
        min_freq: int = 0,
        min_time: int = 0,
        max_time_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        _check_range("SpecAugment frequency", freq_masks, min_freq, max_freq)
        _check_range("SpecAugment time", time_masks, min_time, max_time)
        if not 0 < max_time_ratio <= 1:
            raise ValueError(f"SpecAugment: max_time_ratio must be in (0, 1], got {max_time_ratio}")
        self.freq_masks, self.min_freq, self.max_freq = freq_masks, min_freq, max_freq
        self.time_masks, self.min_time, self.max_time = time_masks, min_time, max_time
        self.max_time_ratio = max_time_ratio

    @torch.no_grad()
    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        if not self.training:
            return features
        _, bands, frames = features.shape
        features = features.clone()  # a clone keeps the memory order; masked_fill without _ would not
        if self.freq_masks:
            masked = _spans(bands, self.freq_masks, self.min_freq, self.max_freq, bands, features)
            features.masked_fill_(masked.any(1)[:, :, None], 0)
        if self.time_masks:
            longest: Tensor | int = self.max_time
            if self.max_time_ratio < 1:
                longest = (lengths * self.max_time_ratio).long().clamp(self.min_time, self.max_time)[:, None]
            masked = _spans(lengths[:, None], self.time_masks, self.min_time, longest, frames, features)
            features.masked_fill_(masked.any(1)[:, None, :], 0)
        return features


class SpecCutout(nn.Module):
    """Zeroes ``masks`` rectangles of min_freq..max_freq mel bands by min_time..max_time frames.

    Raises ValueError for an empty or negative range, and for a negative number of masks.
    """

    def __init__(
        self, masks: int = 0, max_freq: int = 20, max_time: int = 5, min_freq: int = 20, min_time: int = 5
    ) -> None:
        super().__init__()
        _check_range("SpecCutout frequency", masks, min_freq, max_freq)
        _check_range("SpecCutout time", masks, min_time, max_time)
        self.masks, self.freq, self.time = masks, (min_freq, max_freq), (min_time, max_time)

    @torch.no_grad()
    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        if not self.training or not self.masks:
            return features
        _, bands, frames = features.shape
        in_freq = _spans(bands, self.masks, *self.freq, bands, features)
        in_time = _spans(lengths[:, None], self.masks, *self.time, frames, features)
        return features.clone().masked_fill_((in_freq[:, :, :, None] & in_time[:, :, None, :]).any(1), 0)


class Augment(nn.Module):
    """Applies speaker warp, then cutout, then SpecAugment. Each may be None."""

    def __init__(
        self,
        cutout: SpecCutout | None = None,
        spec_augment: SpecAugment | None = None,
        speaker_warp: SpeakerWarp | None = None,
    ) -> None:
        super().__init__()
        self.cutout, self.spec_augment, self.speaker_warp = cutout, spec_augment, speaker_warp

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        for step in (self.speaker_warp, self.cutout, self.spec_augment):
            if step is not None:
                features = step(features, lengths)
        return features


def from_config(input_train: dict[str, Any]) -> Augment:
    """Builds the augmentations for which ``input_train`` has a key: spec_augment, cutout_augment or speaker_warp, at
    the top level or in filterbank_features. Raises ValueError for a wrong or unknown setting."""
    places = (input_train, input_train.get("filterbank_features") or {})
    kinds, built = {"cutout_augment": SpecCutout, "spec_augment": SpecAugment, "speaker_warp": SpeakerWarp}, []
    for name, kind in kinds.items():
        settings = next((place[name] for place in places if place.get(name)), None)
        try:
            built.append(settings and kind(**settings))
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error
    return Augment(*built)
