"""Inference: batch norm folded, weights packed once, each sub-block one fused conv, panes read from a history buffer.

All block outputs that panes take lie side by side in one (N, T', sum C) buffer: the panes of a block are its first
channels, so its last conv and all its panes are a single sum of GEMMs with one bias (DESIGN 4.2).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import backends
from jasper_fast.config import BlockConfig
from jasper_fast.model import Jasper, check_features, mask
from jasper_fast.modules import JasperBlock, fold
from jasper_fast.ops.conv1d import conv_face


class InferenceEngine:
    """Runs a Jasper for evaluation: `engine(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V) fp32, lengths)`.

    The engine copies the model's weights, folded and packed, when it is made: call `refresh()` after they change. It
    owns its activation buffers and reuses them between calls; the log-probabilities are returned in memory of their
    own and depend on nothing but this call's input. Any number of threads may call one engine: a lock runs them one
    at a time (make an engine a thread for more; they share nothing). No gradient flows through it.

    Equivalent to `model.eval()(features, lengths)` under `torch.no_grad()`, on rows t < length.
    """

    def __init__(self, model: Jasper):
        self._model = model
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Fold and pack the model's weights as they are now, on the device and in the dtype that they have now."""
        with self._lock, torch.no_grad():
            model = self._model
            weight = model.decoder.layers[0].weight
            face = conv_face(weight, 1, model.backend)
            conv = _AtenConv if face == "aten" else partial(_PackedConv, face)
            self._device, self._dtype = weight.device, weight.dtype
            self._masks = model.config.encoder.use_conv_masks
            self._input, self._plan = _make_plan(model, conv)
            self._head = conv(weight, model.decoder.layers[0].bias, None, _POINTWISE, relu=False)
            self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, features: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, _, t = check_features(features, lengths, self._model.config)
        if lengths is None:
            lengths = torch.full((n,), t, dtype=torch.int64, device=features.device)
        if features.device != self._device:
            raise ValueError(f"features are on {features.device}, the engine's weights on {self._device}: move either")
        with self._lock:
            return self._run(features.to(self._dtype), lengths)

    def _run(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        n, _, t = features.shape
        x, lens = self._slice(self._input, n, t), lengths
        x.copy_((mask(features, lens) if self._masks else features).transpose(1, 2))
        for step in self._plan:
            lens_in, lens = lens, step.b.out_length(lens)
            t = step.b.out_length(t)
            out = self._slice(step.out, n, t)
            panes = self._slice(step.panes, n, t) if step.panes else None
            step.conv(x, panes, lens_in if self._masks else None, lens if self._masks else None, out)
            x = out
        logits = x.new_empty((n, t, self._model.config.decoder.n_classes))
        self._head(x, None, None, None, logits)
        return logits.float().log_softmax(dim=2), lens

    def _slice(self, place: _Place, n: int, t: int) -> Tensor:
        """The channels of a buffer that `place` names, (N, T, C); the buffer grows where it is too small."""
        held, size = self._buffers.get(place.buffer), n * t * place.width
        if held is None or held.numel() < size:
            held = self._buffers[place.buffer] = torch.empty(size, dtype=self._dtype, device=self._device)
        return held[:size].view(n, t, place.width)[:, :, place.begin : place.end]


@dataclass(frozen=True)
class _Place:
    """Channels [begin, end) of a buffer that is `width` channels wide."""

    buffer: str
    width: int
    begin: int
    end: int


@dataclass(frozen=True)
class _Step:
    """One sub-block: its folded conv, where it writes, and the channels that its panes take, if it has any."""

    b: BlockConfig
    conv: _AtenConv | _PackedConv
    out: _Place
    panes: _Place | None


# Taps from which the nested fast FIR with 1.7 times fewer multiplications outweighs its 2.3 times larger weights.
FAST_FIR_TAPS = 5
_POINTWISE = BlockConfig(filters=1, kernel_size=(1,), residual=False)


def _make_plan(model: Jasper, conv_type) -> tuple[_Place, list[_Step]]:
    """Where the features go, and the sub-blocks in order."""
    layers: list[JasperBlock] = list(model.encoder.layers)
    places = _places(layers, model.config.encoder.in_feats)
    steps = []
    for i, layer in enumerate(layers):
        b, source = layer.b, places[i]
        for r, (conv, bn) in enumerate(layer.sub_blocks()):
            scale, bias = fold(bn)
            out, panes, joined = _Place(f"flip{r % 2}", b.filters, 0, b.filters), None, None
            if r == b.repeat - 1:
                out = places[i + 1]
                if layer.panes():
                    panes = _Place(source.buffer, source.width, 0 if b.residual_dense else source.begin, source.end)
                    folded = [(fold(pane_bn), pane.weight.flatten(1)) for pane, pane_bn in layer.panes()]
                    joined = torch.cat([pane_scale[:, None] * weight for (pane_scale, _), weight in folded], 1)
                    bias = bias + sum(shift for (_, shift), _ in folded)
            steps.append(
                _Step(b, conv_type(scale[:, None, None] * conv.weight, bias, joined, b, relu=True), out, panes)
            )
    return places[0], steps


def _places(layers: list[JasperBlock], in_feats: int) -> list[_Place]:
    """Where the features (index 0) and each block's output live.

    The blocks of a dense run and the input of the first of them share one history buffer; others have one of their own.
    """
    spans: list[tuple[str, int, int]] = [("history0", 0, in_feats)]
    for i, layer in enumerate(layers):
        dense = layer.b.residual and layer.b.residual_dense
        buffer, begin = (spans[i][0], spans[i][2]) if dense else (f"history{i + 1}", 0)
        spans.append((buffer, begin, begin + layer.b.filters))
    width = {buffer: end for buffer, _, end in spans}  # spans of a buffer come in order: the last one ends it
    return [_Place(buffer, width[buffer], begin, end) for buffer, begin, end in spans]


class _AtenConv:
    """A folded sub-block through ATen, on any device and in any dtype."""

    def __init__(self, weight: Tensor, bias: Tensor, panes: Tensor | None, b: BlockConfig, *, relu: bool):
        self.weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        self.bias, self.panes, self.b, self.relu = bias.clone(), panes, b, relu

    def __call__(self, x: Tensor, panes: Tensor | None, lens_in: Tensor | None, lens: Tensor | None, out: Tensor):
        """`x` (N, T, C_in), zero in its padding, and `panes` (N, T', C) to `out` (N, T', C_out), masked by `lens`."""
        b = self.b
        x = x.transpose(1, 2).unsqueeze(2)
        y = F.conv2d(x, self.weight, self.bias, (1, b.s), (0, b.padding), (1, b.d)).squeeze(2).transpose(1, 2)
        if panes is not None:
            y = y + F.linear(panes, self.panes)
        if self.relu:
            y = y.relu_()
        out.copy_(y if lens is None else mask(y.transpose(1, 2), lens).transpose(1, 2))


class _PackedConv:
    """A folded sub-block through our own kernel: weights packed once, bias, panes, ReLU and mask inside."""

    def __init__(self, face: str, weight: Tensor, bias: Tensor, panes: Tensor | None, b: BlockConfig, *, relu: bool):
        self.impl = backends.face("conv1d", face)
        fast = face == "cpu" and b.s == 1 and b.k >= FAST_FIR_TAPS
        self.packed = self.impl.pack(weight, **({"algorithm": "fast_fir_2"} if fast else {}))
        self.packed_panes = None if panes is None else self.impl.pack(panes.unsqueeze(2))
        self.bias, self.b, self.relu = bias.float().clone(), b, relu

    def __call__(self, x: Tensor, panes: Tensor | None, lens_in: Tensor | None, lens: Tensor | None, out: Tensor):
        """As _AtenConv; rows of `x` at t >= `lens_in` are not read, rows beyond their reach not computed."""
        self.impl.fused(
            x,
            self.packed,
            stride=self.b.s,
            padding=self.b.padding,
            dilation=self.b.d,
            in_lengths=lens_in,
            bias=self.bias,
            relu=self.relu,
            out_lengths=lens,
            x2=panes,
            packed2=self.packed_panes,
            out=out,
        )
