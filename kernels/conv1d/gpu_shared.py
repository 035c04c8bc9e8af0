"""Types and helpers that the Triton and the CUDA face of conv1d share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jasper_fast.kernels.operands import Geometry


class Chain(NamedTuple):
    """What a launch of `fused` is told about the launches before and after it in its stream.

    early: it may begin while the launch before it still runs. The caller promises that the launch before it is of the
    same face and began after the weights of this launch were packed. ahead: up to two packed weights that the launch
    after it reads; this launch fetches them into L2.
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
        self.device = self.part.device  # includes the index, because the current device may change
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, elements: int, tiles: int) -> None:
        """Grows to at least `elements` partial sums and `tiles` counters."""
        if self.part.numel() < elements:
            self.part = torch.empty(elements, dtype=torch.float32, device=self.device)
        if self.arrived.numel() < tiles:
            self.arrived = torch.zeros(tiles, dtype=torch.int32, device=self.device)


def out_frames(t: int, taps: int, geometry: Geometry) -> int:
    """Returns the number of frames of the conv's result. Raises ValueError if there are none."""
    t_out = geometry.frames(t, taps)
    if t_out < 1:
        span = geometry.dilation * (taps - 1) + 1
        raise ValueError(f"{t} frames with padding {geometry.padding} are too few: the taps span {span} frames")
    return t_out
