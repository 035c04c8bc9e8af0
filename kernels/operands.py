"""What the faces' functions take together: vectors of a batch norm, what is zeroed after it, how a conv slides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A batch norm's vectors, (C,) each: yhat = (y - mean)*rstd is normalised, gamma*yhat + beta comes out."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


class Mask(NamedTuple):
    """What is zeroed after a ReLU: frames t >= `lengths` (N,), and elements dropped at rate `p` by `seed` (1,).

    None of the lengths: there is no padding. The seed keys the dropout (`kernels/philox.py`); p = 0 needs none.
    """

    lengths: Tensor | None = None
    seed: Tensor | None = None
    p: float = 0.0


class Geometry(NamedTuple):
    """How a conv's taps lie over its input."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def frames(self, t: int | Tensor, taps: int) -> int | Tensor:
        """Frames that come out of `t` frames (or of lengths of that many) under `taps` taps."""
        return (t + 2 * self.padding - self.dilation * (taps - 1) - 1) // self.stride + 1


class Lengths(NamedTuple):
    """Frames (N,) int64 that the utterances have `before` a conv and `after` it; None: they fill the tensor.

    made: receives the output lengths of `before`, clamped to [0, T], which then take the place of `after`; with
    `masked` False nothing is masked by any of them. Those two are for faces that run without a host between kernels.
    """

    before: Tensor | None = None
    after: Tensor | None = None
    made: Tensor | None = None
    masked: bool = True


FULL = Lengths()
