"""Groups of arguments that the functions of all faces take: a batch norm's vectors, a mask, a conv's geometry,
lengths."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A batch norm's vectors, (C,) each: yhat = (y - mean)*rstd, and the output is gamma*yhat + beta."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


class Mask(NamedTuple):
    """What is zeroed after a ReLU: frames t >= `lengths` (N,), and elements dropped at rate `p` by `seed` (1,).

    lengths None: there is no padding. The seed is the key of the dropout's random bits (`kernels/philox.py`); p = 0
    needs no seed.
    """

    lengths: Tensor | None = None
    seed: Tensor | None = None
    p: float = 0.0


class Geometry(NamedTuple):
    """Stride, padding and dilation of a conv."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def frames(self, t: int | Tensor, taps: int) -> int | Tensor:
        """Frames of the output of a conv with `taps` taps for an input of `t` frames; `t` may be a tensor of
        lengths."""
        return (t + 2 * self.padding - self.dilation * (taps - 1) - 1) // self.stride + 1


class Lengths(NamedTuple):
    """Frames (N,) int64 of each utterance `before` a conv and `after` it; None: every utterance fills the tensor.

    made: a tensor that receives the output lengths of `before`, clamped to [0, T], and is then used instead of `after`.
    masked: False masks nothing. These two are for faces whose kernels run without the host in between.
    """

    before: Tensor | None = None
    after: Tensor | None = None
    made: Tensor | None = None
    masked: bool = True


FULL = Lengths()
