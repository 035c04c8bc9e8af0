"""Sets how cuDNN chooses the algorithm of a convolution: by timing several, or by its heuristics.

Contenders run with `cudnn.benchmark`, as NVIDIA's Jasper does, so that cuDNN times its algorithms. PyTorch remembers
the choice for a shape, however it was made, so the setting affects only the first call with a shape.
"""

import contextlib
from collections.abc import Iterator

import torch


def on(device: torch.device) -> None:
    """Makes cuDNN time its algorithms from now on, if the device is a GPU."""
    torch.backends.cudnn.benchmark = device.type == "cuda"


@contextlib.contextmanager
def off() -> Iterator[None]:
    """A context in which cuDNN's heuristics choose. Answers that are not timed use it, because timing ten algorithms
    takes long, above all in fp64."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
