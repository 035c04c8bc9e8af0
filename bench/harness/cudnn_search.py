"""Sets how cuDNN chooses the algorithm of a convolution: by timing several, or by its heuristics.

NVIDIA's Jasper times them (`cudnn.benchmark`), so all contenders here do too. PyTorch remembers the choice for a shape,
however it was made, so the setting affects only the first call with a shape.
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
    """A context in which the heuristics choose. It is for answers that are not timed, above all in fp64, where timing
    ten algorithms takes long."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
