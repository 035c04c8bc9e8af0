"""Which algorithm cuDNN takes for a convolution: the fastest of those it times, or the one its heuristics name.

The reference system times them (`cudnn.benchmark`), so its rivals here do too. PyTorch keeps what it found for a shape,
whichever way: only the first call of a shape asks.
"""

import contextlib
from collections.abc import Iterator

import torch


def on(device: torch.device) -> bool:
    """Has cuDNN time its algorithms, from now on; returns whether it does, for the result."""
    torch.backends.cudnn.benchmark = device.type == "cuda"
    return torch.backends.cudnn.benchmark


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Leaves it to the heuristics: for answers that nobody times, in fp64 above all, where to try ten takes long."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
