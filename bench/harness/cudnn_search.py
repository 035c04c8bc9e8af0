"""Sets how cuDNN chooses the algorithm of a convolution: by timing several, or by its heuristics.

Contenders are timed with `cudnn.benchmark`, as NVIDIA's Jasper runs, so that cuDNN times its algorithms. PyTorch
remembers the choice for a shape, however it was made, so the setting affects only the first call with a shape.
"""

import contextlib
from collections.abc import Iterator

import torch


def on(device: torch.device) -> None:
    """Makes cuDNN time its algorithms from now on, if the device is a GPU."""
    torch.backends.cudnn.benchmark = device.type == "cuda"


@contextlib.contextmanager
def off() -> Iterator[None]:
    """A context in which cuDNN's heuristics choose. It is for calls whose speed does not matter, such as those for fp64
    answers, because timing ten algorithms takes long, above all in fp64."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
