"""Look-alikes of NVIDIA's and NeMo's Jasper, for the tests of fuse and convert.

They have the class names, attributes, signatures and state-dict keys of the originals, but were written from a
description. A block is given as a dictionary with the keys of NVIDIA's configuration files.
"""

from collections.abc import Iterator

import torch


def with_panes(blocks: list[dict], c_in: int) -> Iterator[tuple[int, dict, list[int]]]:
    """Yields (input channels, block, channels of each pane) for every block."""
    dense: list[int] = []
    for b in blocks:
        if b["residual"]:
            dense = [*dense, c_in] if b["residual_dense"] else []
        yield c_in, b, (dense or [c_in]) if b["residual"] else []
        c_in = b["filters"]


def frames(conv: torch.nn.Conv1d, lens: torch.Tensor) -> torch.Tensor:
    """Returns the number of frames of the conv's output for inputs of `lens` frames."""
    (k,), (s,), (p,), (d,) = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return torch.div(lens + 2 * p - d * (k - 1) - 1, s, rounding_mode="floor") + 1
