"""What the Triton and the CUDA face of conv1d share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jasper_fast.kernels.operands import Geometry


class Chain(NamedTuple):
    """What a launch of `fused` knows of those beside it in its stream.

    early: it may begin while the launch before it still runs, which is one of this face's own, and began after this
    one's weights were packed. ahead: up to two packs that the launch after it reads, to be fetched into L2.
    """

    early: bool = False
    ahead: tuple[Tensor, ...] = ()


ALONE = Chain()


class Workspace:
    """Scratch of `fused` for shared reductions: fp32 partial sums, and counters that are zero between launches.

    Only one stream at a time may use it; its owner (an inference engine) ensures this.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.part = torch.empty(0, dtype=torch.float32, device=device)
        self.device = self.part.device  # with its index, because the current device may change
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, elements: int, tiles: int) -> None:
        """Grow to `elements` partial sums and `tiles` counters."""
        if self.part.numel() < elements:
            self.part = torch.empty(elements, dtype=torch.float32, device=self.device)
        if self.arrived.numel() < tiles:
            self.arrived = torch.zeros(tiles, dtype=torch.int32, device=self.device)


def out_frames(t: int, taps: int, geometry: Geometry) -> int:
    """Frames of the conv's result; raises ValueError where there are none."""
    t_out = geometry.frames(t, taps)
    if t_out < 1:
        span = geometry.dilation * (taps - 1) + 1
        raise ValueError(f"{t} frames with padding {geometry.padding} are fewer than {span}, the span of the taps")
    return t_out
