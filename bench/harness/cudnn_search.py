"""Sets how cuDNN chooses the algorithm of a convolution: by timing several, or by its heuristics.

NVIDIA's Jasper lets cuDNN time them (`cudnn.benchmark`), so cuDNN does so here for all contenders. PyTorch remembers
the choice for a shape, however it was made, so the setting affects only the first call with a shape.
"""

import contextlib
from collections.abc import Iterator

import torch


def on(device: torch.device) -> bool:
    """Makes cuDNN time its algorithms from now on; returns whether it does, for the result file."""
    torch.backends.cudnn.benchmark = device.type == "cuda"
    return torch.backends.cudnn.benchmark


@contextlib.contextmanager
def off() -> Iterator[None]:
    """A context in which cuDNN's heuristics choose. It is for untimed answers, above all those in fp64, where timing
    ten algorithms takes long."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
