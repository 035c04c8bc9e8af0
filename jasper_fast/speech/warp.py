"""Imitates other speakers and microphones by changing features, on their device and without synchronising with it.

Shapes: N utterances, F mel bands, T frames.
"""

import math

import torch
from torch import Tensor, nn

from jasper_fast.speech.features import _hz_to_mel, _mel_to_hz


class SpeakerWarp(nn.Module):
    """Stretches the frequency axis and colours the spectrum of each utterance at random, in training only.

    Takes features (N, F, T) and lengths (N,) in frames. In training it returns features of the same shape, dtype and
    memory order, which are 0 at and beyond the length; in evaluation it returns the features themselves.

    To imitate another vocal tract, frequencies are multiplied by a factor between 1 / ``max_warp`` and ``max_warp``
    (log-uniform). ``f_max`` is the upper edge of the highest band. Above about ``knee`` times ``f_max`` the map has
    another slope, so that ``f_max`` is mapped to itself.

    To imitate another microphone, four cosines over the bands are added to every frame. The amplitude of cosine j is
    normal with standard deviation ``equalize`` / sqrt(j). This helps mainly with ``normalize: all_features``, because
    the normalisation of each band already removes what a microphone adds to every frame.

    Raises ValueError for arguments out of range. Source: N. Jaitly and G. Hinton, Vocal Tract Length Perturbation
    improves speech recognition, 2013. They warp the filters; here the mel bands are interpolated. Equivalent, for one
    utterance ``x`` (F, T) and its factor ``a``::

        position = bands_of(frequency / a)             # for each band, the fractional band to read
        y = interpolate(x, position)
    """

    def __init__(
        self, max_warp: float = 1.15, equalize: float = 0.0, f_max: float = 8000.0, knee: float = 0.85
    ) -> None:
        super().__init__()
        for fits, wrong in (
            (1 <= max_warp < 2, f"max_warp must lie in [1, 2), not {max_warp}"),
            (equalize >= 0, f"equalize must not be negative, not {equalize}"),
            (f_max > 0 and 0 < knee < 1, f"need f_max > 0 and 0 < knee < 1, not {f_max} and {knee}"),
        ):
            if not fits:
                raise ValueError(f"speaker_warp: {wrong}")
        self.max_warp, self.equalize, self.f_max, self.knee = max_warp, equalize, float(f_max), knee

    def matrices(self, factors: Tensor, bands: int) -> Tensor:
        """Returns (N, F, F) fp32. Row f has the weights of the source bands for band f; each row sums to 1."""
        f_max, device = self.f_max, factors.device
        step = _hz_to_mel(torch.full((), f_max, dtype=torch.float32, device=device)) / (bands + 1)
        hz = _mel_to_hz(step * torch.arange(1, bands + 1, device=device, dtype=torch.float32))
        a = factors.float()[:, None]
        bend = self.knee * f_max * a.clamp(max=1)  # up to this frequency, the value at hz is read at hz / a
        above = bend / a + (hz - bend) * (f_max - bend / a) / (f_max - bend)
        position = (_hz_to_mel(torch.where(hz <= bend, hz / a, above)) / step - 1).clamp(0, bands - 1)
        return (1 - (position[..., None] - torch.arange(bands, device=device)).abs()).clamp(min=0)

    @torch.no_grad()
    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        if not self.training:
            return features
        n, bands, frames = features.shape
        x = features.transpose(1, 2)  # (N, T, F), the memory order
        if self.max_warp > 1:
            factors = torch.exp((2 * torch.rand(n, device=x.device) - 1) * math.log(self.max_warp))
            x = x @ self.matrices(factors, bands).to(x.dtype).transpose(1, 2)
        if self.equalize:
            angle = torch.linspace(0, math.pi, bands, device=x.device)
            waves = torch.stack([torch.cos(j * angle) / math.sqrt(j) for j in range(1, 5)])
            x = x + (self.equalize * torch.randn(n, 4, device=x.device) @ waves)[:, None].to(x.dtype)
        beyond = torch.arange(frames, device=x.device) >= lengths[:, None]
        return x.masked_fill(beyond[..., None], 0).transpose(1, 2)
