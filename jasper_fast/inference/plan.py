"""Folds a model into steps, one per sub-block (two if it is separable), and places their outputs in buffers.

Panes are the 1x1 convs of residual connections. The block outputs that the panes of a block read lie side by side in
one (N, T', sum C) buffer. So the block's last conv and all its panes are a single sum of GEMMs with one bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels.operands import FULL, Geometry, Lengths
from jasper_fast.nn.block import fold, refuse_hooks
from jasper_fast.nn.config import BlockConfig
from jasper_fast.nn.recognise import SubBlock


class Network(Protocol):
    """A model, as an engine reads it: a Jasper, or an encoder of another project, whose `decoder` is None.

    `encoder.layers` are blocks with the attributes `b`, `sub_blocks` and `panes` of a JasperBlock.
    """

    config: Any
    encoder: Any
    decoder: Any
    backend: str
    tune: bool


def weight_of(model: Network) -> Tensor:
    """Returns one of the model's weights. Its dtype and device are those of the model."""
    conv = model.decoder.layers[0] if model.decoder is not None else model.encoder.layers[0].sub_blocks[0].conv
    return conv.weight


POINTWISE = BlockConfig(filters=1, kernel_size=(1,), residual=False)  # settings of the decoder and of pointwise convs


@dataclass(frozen=True)
class Place:
    """Channels [begin, end) of a buffer that is `width` channels wide."""

    buffer: str
    width: int
    begin: int
    end: int


@dataclass(frozen=True)
class Folded:
    """A sub-block with its batch norms folded in: `weight` (C_out, C_in, K) and `bias` (C_out,) of the conv, and
    `panes` (C_out, C2), the weights of all panes side by side."""

    weight: Tensor
    bias: Tensor
    panes: Tensor | None
    b: BlockConfig
    relu: bool


class FoldedConv(Protocol):
    """A folded sub-block, ready to run."""

    def __call__(
        self, x: Tensor, out: Tensor, panes: Tensor | None = None, lengths: Lengths = FULL, **how: object
    ) -> None:
        """Computes `out` (N, T', C_out) from `x` (N, T, C_in) and `panes` (N, T', C2). Beyond `lengths.before`, `x`
        and `panes` count as zero. To some classes the caller must pass zeros there, because they do not mask.

        how: further arguments that depend on the face.
        """


class KernelConv:
    """A FoldedConv that is one kernel of `face`, with bias, panes, ReLU and mask. Weights are packed once.

    Inputs may have any values beyond `lengths.before`, unless `clean=True` is passed. `more`: further arguments of
    `fused`, for every call.
    """

    def __init__(self, folded: Folded, dtype: torch.dtype, face: str, **more: object):
        impl = backends.face("conv1d", face)
        self.geometry = Geometry(folded.b.s, folded.b.padding, folded.b.d)
        self.packed = impl.pack_once(folded.weight, dtype, folded.b.s)
        self.packed_panes = None if folded.panes is None else impl.pack_once(folded.panes.unsqueeze(2), dtype)
        self._fused = partial(impl.fused, bias=folded.bias.to(torch.float32, copy=True), relu=folded.relu, **more)

    def __call__(
        self, x: Tensor, out: Tensor, panes: Tensor | None = None, lengths: Lengths = FULL, **how: object
    ) -> None:
        panes = None if panes is None else (panes, self.packed_panes)
        self._fused(x, self.packed, self.geometry, lengths=lengths, panes=panes, out=out, **how)

    @property
    def packs(self) -> tuple[Tensor, ...]:
        """The packed weights that the kernel reads."""
        return tuple(pack.data for pack in (self.packed, self.packed_panes) if pack is not None)


class DepthwiseConv:
    """A FoldedConv that is the depthwise conv of a separable sub-block. It masks its input and output, and has neither
    bias nor ReLU."""

    def __init__(self, conv: nn.Conv1d, b: BlockConfig, dtype: torch.dtype, backend: str):
        face = choose.depthwise_face(backend, conv.weight.device, dtype)
        impl = backends.face("depthwise", "aten" if face == "reference" else face)
        self._geometry, self._packed = Geometry(b.s, b.padding, b.d), impl.pack_once(conv.weight, dtype)
        self._into = impl.into

    def __call__(
        self, x: Tensor, out: Tensor, panes: Tensor | None = None, lengths: Lengths = FULL, **how: object
    ) -> None:
        self._into(out, x, self._packed, self._geometry, lengths)


@dataclass(frozen=True)
class Step:
    """One sub-block, or one of the two convs of a separable sub-block: its conv, the place `out` of its output, and the
    place that its panes read (None without panes)."""

    b: BlockConfig
    conv: FoldedConv
    out: Place
    panes: Place | None


@dataclass(frozen=True)
class Plan:
    """A model for inference: its `steps`, and `source`, the place of the features if a step reads them from a buffer.

    head: the decoder's conv, or None for an encoder alone. channels: the number of output channels, which are the
    symbols if there is a head.
    """

    source: Place
    steps: tuple[Step, ...]
    head: FoldedConv | None
    masks: bool
    channels: int

    def frames(self, t: int) -> list[int]:
        """Returns the numbers of frames at the input (index 0) and after each step, for `t` frames of features."""
        return list(accumulate(self.steps, lambda before, step: step.b.out_length(before), initial=t))

    def span(self, bucket: int) -> int:
        """Returns a unit of frames. T is rounded up to a multiple of this unit, so that T' is a multiple of `bucket`.
        Without masks the unit is 1, because more padding would change the results."""
        return bucket * prod(step.b.s for step in self.steps) if self.masks else 1

    @cached_property
    def _resizing(self) -> list[BlockConfig]:
        return [step.b for step in self.steps if step.b.resizes]

    def out_frames(self, t: int | Tensor) -> int | Tensor:
        """Returns the number of frames of the log-probabilities for `t` frames of features; `t` may be a tensor."""
        for b in self._resizing:
            t = b.out_length(t)
        return t

    @cached_property
    def reads_source(self) -> bool:
        """Whether the features must be copied to a buffer: for panes, or for a depthwise conv, which needs NTC
        memory."""
        return self.panes_read_source or isinstance(self.steps[0].conv, DepthwiseConv)

    @cached_property
    def panes_read_source(self) -> bool:
        """Whether panes read the features."""
        return any(step.panes is not None and step.panes.buffer == self.source.buffer for step in self.steps)

    def sizes(self, n: int, t: int, *, source: bool = True) -> dict[str, int]:
        """Returns the number of elements of each buffer for `n` utterances of `t` frames. Without `source` the features
        need no buffer."""
        places = [self.source, *(step.out for step in self.steps)]
        sizes: dict[str, int] = {}
        for place, frames in list(zip(places, self.frames(t), strict=True))[0 if source else 1 :]:
            sizes[place.buffer] = max(sizes.get(place.buffer, 0), n * frames * place.width)
        return sizes

    def nothing(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the results for a batch without utterances or without frames."""
        shape = (features.shape[0], self.out_frames(features.shape[2]), self.channels)
        return features.new_zeros(shape, dtype=torch.float32), self.out_frames(lengths).clone()


def make_plan(model: Network, conv: Callable[[Folded], FoldedConv], dtype: torch.dtype) -> Plan:
    """Folds `model` in fp32 or wider, even if its weights have 16 bits, and makes the conv of each sub-block by calling
    `conv`.

    dtype: that of the activations.
    """
    layers = list(model.encoder.layers)
    precise = torch.promote_types(weight_of(model).dtype, torch.float32)
    places = _places(layers, model.config.encoder.in_feats)
    steps = []
    for layer, (source, to) in zip(layers, pairwise(places), strict=True):
        b = layer.b
        read = Place(source.buffer, source.width, 0 if b.residual_dense else source.begin, source.end)
        for r, sub in enumerate(layer.sub_blocks):
            last = r == b.repeat - 1
            panes = layer.panes if last else []
            if sub.taps is not None:
                c = sub.taps.in_channels
                taps = DepthwiseConv(sub.taps, b, dtype, model.backend)
                steps.append(Step(b, taps, Place("depthwise", c, 0, c), None))
            folded = _folded(sub, panes, POINTWISE if b.separable else b, precise)
            out = to if last else Place(f"flip{r % 2}", b.filters, 0, b.filters)
            steps.append(Step(folded.b, conv(folded), out, read if panes else None))
    head, channels = None, layers[-1].b.filters
    if model.decoder is not None:
        last = model.decoder.layers[0]
        refuse_hooks(last)
        head, channels = conv(Folded(last.weight, last.bias, None, POINTWISE, relu=False)), last.out_channels
    return Plan(places[0], tuple(steps), head, model.config.encoder.use_conv_masks, channels)


def _folded(sub: SubBlock, panes: list[tuple[nn.Conv1d, nn.BatchNorm1d]], b: BlockConfig, dtype: torch.dtype) -> Folded:
    """Returns the conv of `sub`, whose settings are `b`, and the `panes` that are added to it, folded in `dtype`."""
    scale, bias = fold(sub.bn, dtype)
    joined = None
    if panes:
        folded = [(fold(bn, dtype), conv.weight.flatten(1)) for conv, bn in panes]
        joined = torch.cat([pane_scale[:, None] * weight for (pane_scale, _), weight in folded], 1)
        bias = bias + sum(shift for (_, shift), _ in folded)
    return Folded(scale[:, None, None] * sub.conv.weight, bias, joined, b, relu=True)


def _places(layers: list[Any], in_feats: int) -> list[Place]:
    """Returns the places of the features (index 0) and of each block's output.

    The outputs of consecutive dense blocks, and the input of the first of them, share one history buffer. Every other
    output has a buffer of its own.
    """
    spans: list[tuple[str, int, int]] = [("history0", 0, in_feats)]
    for i, layer in enumerate(layers):
        buffer, begin = (spans[i][0], spans[i][2]) if layer.b.dense else (f"history{i + 1}", 0)
        spans.append((buffer, begin, begin + layer.b.filters))
    width = {buffer: end for buffer, _, end in spans}  # the last span of a buffer gives its width
    return [Place(buffer, width[buffer], begin, end) for buffer, begin, end in spans]


class Buffers:
    """Activation buffers by name, which calls reuse. They grow when a call needs more, and never shrink."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self.held: dict[str, Tensor] = {}

    def reserve(self, sizes: dict[str, int]) -> list[Tensor]:
        """Makes each buffer at least as large as `sizes` (name: elements) says. Returns the old buffers that larger
        ones have replaced."""
        small = {k: size for k, size in sizes.items() if k not in self.held or self.held[k].numel() < size}
        replaced = [self.held[name] for name in small if name in self.held]
        for name, size in small.items():
            step = 1 << max(0, size.bit_length() - 3)  # round up by at most a quarter, so that buffers rarely grow
            with torch.inference_mode(False):  # otherwise calls outside inference mode could not write to the buffer
                self.held[name] = torch.empty(-(-size // step) * step, dtype=self._dtype, device=self._device)
        return replaced

    def view(self, place: Place, n: int, t: int) -> Tensor:
        """Returns the channels of `place`, (N, T, C), as a view of their buffer."""
        rows = self.held[place.buffer][: n * t * place.width].view(n, t, place.width)
        return rows[:, :, place.begin : place.end]
