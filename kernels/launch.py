"""The one place where Triton kernels are launched: on the device of their data, on its current stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def run(kernel: object, grid: Sequence[int], like: Tensor, *args: object, **meta: object) -> None:
    """Launch `kernel` on `grid` programs on the device of `like`; `args` and `meta` are the kernel's own.

    Triton launches on the current device, so that one is changed for the call where it is another.
    """
    if not like.is_cuda or like.device.index == torch.cuda.current_device():
        kernel[tuple(grid)](*args, **meta)
        return
    with torch.cuda.device(like.device):
        kernel[tuple(grid)](*args, **meta)
