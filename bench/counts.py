"""Floating-point operations and bytes that a computation must do and move, whatever the kernel.

Legend: N batch, C channels, T frames, K taps, M = N*T rows. A multiply-add is two operations. Bytes are the least
traffic of an op whose operands each cross the memory bus once per pass that the algebra forces.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Conv:
    """One convolution of a network at a batch: names as in the state dict, T frames in, T_out frames out."""

    name: str
    N: int
    C_in: int
    C_out: int
    K: int
    T: int
    T_out: int
    bias: bool = False
    batch_norm: bool = True

    @property
    def flops(self) -> int:
        """Operations of the forward pass as the definition counts them (no FFT, no fast FIR)."""
        return 2 * self.N * self.T_out * self.C_out * self.C_in * self.K + (
            self.N * self.T_out * self.C_out if self.bias else 0
        )

    @property
    def weights(self) -> int:
        """Parameters of the convolution alone."""
        return self.C_out * self.C_in * self.K + (self.C_out if self.bias else 0)

    @property
    def parameters(self) -> int:
        """Parameters of the convolution and its batch norm."""
        return self.weights + (2 * self.C_out if self.batch_norm else 0)

    def nbytes(self, itemsize: int) -> int:
        """Input once, weights once, output once."""
        return itemsize * (self.N * (self.C_in * self.T + self.C_out * self.T_out) + self.weights)


def conv_out(T: int, K: int, stride: int, dilation: int) -> int:
    """Frames that come out of a convolution padded as Jasper pads, (K // 2) * dilation on either side."""
    return (T + 2 * (K // 2) * dilation - dilation * (K - 1) - 1) // stride + 1


def convs(config, N: int, T: int) -> Iterator[Conv]:
    """All convolutions of a Jasper in order: each block's main ones, then its panes; last the decoder's."""
    C = _get(config.encoder, "in_feats")
    history: list[int] = [C]
    for b, block in enumerate(_get(config.encoder, "blocks")):
        filters, repeat = int(_get(block, "filters")), int(_get(block, "repeat"))
        K, stride, dilation = (_first(_get(block, f)) for f in ("kernel_size", "stride", "dilation"))
        dense, plain = bool(_get(block, "residual_dense")), bool(_get(block, "residual"))
        block_in, T_in = C, T
        for r in range(repeat):
            T_out = conv_out(T, K, stride, dilation)
            yield Conv(f"encoder.layers.{b}.conv.{4 * r}", N, C, filters, K, T, T_out)
            C, T = filters, T_out
        for k, width in enumerate((history if dense else [block_in]) if plain else []):
            yield Conv(f"encoder.layers.{b}.res.{k}.0", N, width, filters, 1, T_in, T)
        history = [*history, filters] if plain and dense else [filters]
    yield Conv("decoder.layers.0", N, C, int(_get(config.decoder, "n_classes")), 1, T, T, bias=True, batch_norm=False)


def parameters(config) -> int:
    """Parameters of the whole network."""
    return sum(conv.parameters for conv in convs(config, 1, 2))


def forward_flops(config, N: int, T: int) -> int:
    """Operations of one forward pass: the convolutions'; everything else is below half a per cent."""
    return sum(conv.flops for conv in convs(config, N, T))


def training_flops(config, N: int, T: int) -> int:
    """Forward, gradients of the weights, gradients of the inputs (none is needed for the features)."""
    all_convs = list(convs(config, N, T))
    return 3 * sum(c.flops for c in all_convs) - all_convs[0].flops


def forward_bytes(config, N: int, T: int, itemsize: int) -> int:
    """Weights once, and every convolution's input and output once: what a network of fully fused sub-blocks moves."""
    return sum(conv.nbytes(itemsize) for conv in convs(config, N, T))


def training_bytes(config, N: int, T: int, itemsize: int) -> int:
    """Three convolutions' traffic a layer and the two passes of each batch norm in either direction."""
    norms = sum(
        bn_relu_dropout_bytes(c.N, c.C_out, c.T_out, itemsize, "both") for c in convs(config, N, T) if c.batch_norm
    )
    return 3 * forward_bytes(config, N, T, itemsize) + norms


def bn_relu_dropout_bytes(N: int, C: int, T: int, itemsize: int, mode: str, residual: bool = False) -> int:
    """Training traffic: forward reads y for the statistics, reads it again and writes z; backward reads dz and y to
    reduce, reads both again and writes dy. A residual is read in forward, z is read in backward for its sign, and its
    gradient is written."""
    tensors = {"forward": 3 + residual, "backward": 5 + 3 * residual}
    tensors["both"] = tensors["forward"] + tensors["backward"]
    return tensors[mode] * N * C * T * itemsize


def bn_relu_dropout_flops(N: int, C: int, T: int, mode: str) -> int:
    """Arithmetic per element as the formula writes it, the random numbers not counted: statistics 4, apply 5;
    backward reduce 6, apply 7."""
    per_element = {"forward": 9, "backward": 13, "both": 22}
    return per_element[mode] * N * C * T


def _get(thing, field: str):
    return thing[field] if isinstance(thing, dict) else getattr(thing, field)


def _first(value) -> int:
    return int(value[0]) if isinstance(value, list | tuple) else int(value)
