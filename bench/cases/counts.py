"""Counts the floating-point operations of a computation, and the bytes that our best kernels move for it.

Legend: N batch, C channels, T frames, K taps. A multiply-add is two operations. The operations are those of the
definition, whichever kernel runs. kernels/README.md lists the passes of our kernels over memory; each pass moves each
of its operands once. Vectors of length C do not count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jasper_fast.nn.architecture import block_shapes
from jasper_fast.nn.config import JasperConfig

DIRECTIONS = {"forward": 1, "backward": 2, "both": 3}  # a backward pass has the gradients of the input and the weight

# How many tensors of the size of y (a conv's output) the passes of a norm read or write in training, by the place of
# the norm. No pass computes its statistics, because the conv does. The passes are:
#
#     inner    inside a block: y -> z in forward, and again in backward; dgrad reads y and z; dz, y -> dy
#     end      at the end of a block: y -> z; the sums of backward read dz and y; dz, y -> dy
#     joined   at the end of a block with a residual r: y, r -> z; the sums read dz, y and z; dz, y, z -> dy, dr
#     pane     none, because the panes of a block are one sum of GEMMs, and their statistics come from their inputs
#     head     none, because no norm follows the decoder
#     taps     none, because no norm follows a depthwise conv
NORM_PASSES = {"inner": 2 + 2 + 2 + 3, "end": 2 + 2 + 3, "joined": 3 + 3 + 5, "pane": 0, "head": 0, "taps": 0}


@dataclass(frozen=True)
class Conv:
    """One convolution of a network at a batch: its name in the state dict, T input frames, T_out output frames.

    `place` is the place of the norm after it (see NORM_PASSES).
    """

    name: str
    N: int
    C_in: int
    C_out: int
    K: int
    T: int
    T_out: int
    bias: bool = False
    batch_norm: bool = True
    place: str = "inner"
    groups: int = 1

    @property
    def flops(self) -> int:
        """Operations of the forward pass by the definition, without FFT and fast FIR."""
        return 2 * self.N * self.T_out * self.C_out * self.C_in // self.groups * self.K + (
            self.N * self.T_out * self.C_out if self.bias else 0
        )

    @property
    def weights(self) -> int:
        """Parameters of the convolution without its norm."""
        return self.C_out * self.C_in // self.groups * self.K + (self.C_out if self.bias else 0)

    def nbytes(self, itemsize: int) -> int:
        """Returns the bytes of the input, the weights and the output, each counted once."""
        return itemsize * (self.input + self.weights + self.output)

    @property
    def input(self) -> int:
        """Elements of the input."""
        return self.N * self.C_in * self.T

    @property
    def output(self) -> int:
        """Elements of the output."""
        return self.N * self.C_out * self.T_out


def convs(config: JasperConfig, N: int, T: int) -> Iterator[Conv]:
    """Yields all convolutions of a Jasper in order: for each block the main ones and then its panes, and at the end the
    decoder's."""
    for number, (C, b, panes) in enumerate(block_shapes(config)):
        at, T_in = f"encoder.layers.{number}", T
        for r in range(b.repeat):
            T_out = b.out_length(T)
            place = "inner" if r < b.repeat - 1 else "joined" if b.residual else "end"
            if b.separable:
                yield Conv(f"{at}.conv.{5 * r}", N, C, C, b.k, T, T_out, batch_norm=False, place="taps", groups=C)
                yield Conv(f"{at}.conv.{5 * r + 1}", N, C, b.filters, 1, T_out, T_out, place=place)
            else:
                yield Conv(f"{at}.conv.{4 * r}", N, C, b.filters, b.k, T, T_out, place=place)
            C, T = b.filters, T_out
        for k, width in enumerate(panes):
            yield Conv(f"{at}.res.{k}.0", N, width, b.filters, 1, T_in, T, place="pane")
    yield Conv("decoder.layers.0", N, C, config.decoder.n_classes, 1, T, T, bias=True, batch_norm=False, place="head")


def parameters(config) -> int:
    """Returns the number of parameters of the network."""
    return sum(conv.weights + (2 * conv.C_out if conv.batch_norm else 0) for conv in convs(config, 1, 2))


def forward_flops(config, N: int, T: int) -> int:
    """Returns the operations of the convolutions in one forward pass. In a Jasper, all other operations together are
    less than half a per cent of them."""
    return sum(conv.flops for conv in convs(config, N, T))


def training_flops(config, N: int, T: int) -> int:
    """Returns the operations of the convolutions in a training step.

    A step consists of forward, the gradients of the weights, and the gradients of all inputs except the features.
    """
    all_convs = list(convs(config, N, T))
    return 3 * sum(c.flops for c in all_convs) - all_convs[0].flops


def forward_bytes(config, N: int, T: int, itemsize: int) -> int:
    """Returns the bytes that a network of fully fused sub-blocks moves in a forward pass.

    All weights, and the input and output of every convolution, count once. Outputs of panes do not count, because they
    are added into the sum of the block.
    """
    return itemsize * sum(_moved(conv) for conv in convs(config, N, T))


def training_bytes(config, N: int, T: int, itemsize: int) -> int:
    """Returns the bytes that a training step moves.

    Each convolution counts three times, for forward and both gradients, and the first only twice, because the features
    have no gradient. The passes of the norms also count. The panes of a block have one output, which is their sum.
    """
    total = 0
    for number, conv in enumerate(convs(config, N, T)):
        total += (3 if number else 2) * _moved(conv) + NORM_PASSES[conv.place] * conv.output
        total += 3 * conv.output if conv.place == "joined" else 0  # the sum of the panes
    return itemsize * total


def _moved(conv: Conv) -> int:
    """Returns the elements that one direction (forward or one gradient) of a convolution moves."""
    return conv.input + conv.weights + (0 if conv.place == "pane" else conv.output)


def bn_relu_dropout_bytes(N: int, C: int, T: int, itemsize: int, mode: str, residual: bool = False) -> int:
    """Returns the bytes that the op moves in training.

    Forward reads y for the statistics, reads it again and writes z. Backward reads dz and y for its sums, reads both
    again and writes dy. With a residual, forward also reads the residual. Backward then also reads z twice (its sign
    tells where the ReLU was open), and writes the gradient of the residual.
    """
    tensors = {"forward": 3 + residual, "backward": 5 + 3 * residual, "both": 8 + 4 * residual}
    return tensors[mode] * N * C * T * itemsize


def sub_block_bytes(conv: Conv, itemsize: int, mode: str, *, statistics: bool = True) -> int:
    """Returns the bytes that a sub-block moves in training, from y to the next y. `conv` is the convolution at its end.

    Forward is y -> z and then the conv. Backward is y -> z again, wgrad, dgrad (which also reads y and z), and a pass
    that reads y and the result of dgrad and writes dy. If the conv keeps the shape, these are 4 tensors forward and 11
    backward. With `statistics`, forward also reads y in a separate pass.
    """
    tensors = {"forward": 2 + statistics, "backward": 2 + 2 + 3, "both": 9 + statistics}
    return DIRECTIONS[mode] * conv.nbytes(itemsize) + tensors[mode] * conv.input * itemsize


def panes_bytes(panes: Sequence[Conv], itemsize: int, mode: str) -> int:
    """Returns the bytes that the panes of a block move in training.

    Forward and each of the two gradients move each input and weight once, and the sum of the panes or its gradient
    once. Outputs of single panes and passes for statistics do not count (see NORM_PASSES).
    """
    return DIRECTIONS[mode] * itemsize * (sum(_moved(pane) for pane in panes) + panes[0].output)


def bn_relu_dropout_flops(N: int, C: int, T: int, mode: str) -> int:
    """Returns the operations by the formula, without those of the random numbers.

    Per element, forward needs 4 operations for the statistics and 5 to compute z. Backward needs 6 for the sums and 7
    to compute dy.
    """
    return {"forward": 9, "backward": 13, "both": 22}[mode] * N * C * T
