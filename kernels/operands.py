"""Tuples of arguments that several ops take: the vectors of a batch norm, a mask, a conv's geometry, lengths."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """The vectors of a batch norm, (C,) each: yhat = (y - mean)*rstd, and the output is gamma*yhat + beta."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


class Mask(NamedTuple):
    """What is set to zero after a ReLU: frames t >= `lengths` (N,), and elements dropped with probability `p`.

    If lengths is None, there is no padding. `seed` (1,) is the key of the dropout's random bits (`kernels/philox.py`).
    The seed is not needed if p is 0.
    """

    lengths: Tensor | None = None
    seed: Tensor | None = None
    p: float = 0.0


class Geometry(NamedTuple):
    """The stride, padding and dilation of a conv."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def frames(self, t: int | Tensor, taps: int) -> int | Tensor:
        """Returns the number of output frames of a conv with `taps` taps for `t` input frames. `t` may be a tensor."""
        return (t + 2 * self.padding - self.dilation * (taps - 1) - 1) // self.stride + 1


class Lengths(NamedTuple):
    """The lengths of the utterances `before` a conv and `after` it, (N,) int64, in frames. None: each fills the tensor.

    made: a tensor into which the kernel writes the output lengths, computed from `before` clamped to [0, T]. It takes
    the place of `after`: with `made`, `before` must be given and `after` must be None. masked: if False, nothing is
    masked. `made` and `masked` are for inference on a GPU, where the host does not compute lengths between kernels.
    """

    before: Tensor | None = None
    after: Tensor | None = None
    made: Tensor | None = None
    masked: bool = True


FULL = Lengths()
