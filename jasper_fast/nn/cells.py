"""Lists the distinct convs and norms of a Jasper as cells of the tables of measured times.

A cell is an op in one dtype, at one shape, with about 2**rows_log2 rows.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch

from jasper_fast.kernels import tables
from jasper_fast.kernels.tables import Cell
from jasper_fast.nn.config import JasperConfig

MODES = ("training", "evaluation", "inference")  # an InferenceEngine is in mode "inference"

# A norm op moves about 8 bytes per element of 16 bits. An H100 needs 2.4 ps for them at 3.35 TB/s. In that time it does
# 1,200 multiply-adds at its peak of 989 TFLOP/s, and this many at two thirds of the peak.
PRODUCTS_OF_NORM = 800


class Conv(NamedTuple):
    """A conv of the network: `shape` (c_in, c_out, taps, stride, dilation), and how many `frames` its output has.

    `place`: "first" (of the network), "opening" (the first of a later block, or another conv with a stride), "inner" (a
    later conv of a block) or "decoder". The conv of a separable sub-block is always "opening".
    """

    shape: tuple[int, int, int, int, int]
    frames: int
    place: str


def convs(config: JasperConfig, t: int = 2) -> Iterator[Conv]:
    """Yields the main convs in order, for `t` frames of features, and the decoder if there is one. Panes are left out,
    because they are matrix products of PyTorch."""
    c = config.encoder.in_feats
    for number, b in enumerate(config.encoder.blocks):
        for r in range(b.repeat):
            t = max(1, b.out_length(t))
            place = "inner" if r and b.s == 1 else "opening" if number or r else "first"
            # A separable sub-block counts as its pointwise conv. That conv's backward is never fused with batch norm's.
            shape, place = ((1, 1, 1), "opening") if b.separable else ((b.k, b.s, b.d), place)
            yield Conv((c, b.filters, *shape), t, place)
            c = b.filters
    if config.decoder is not None:
        yield Conv((c, config.decoder.n_classes, 1, 1, 1), t, "decoder")


def cells(config: JasperConfig, n: int, t: int, dtype: torch.dtype, mode: str) -> list[Cell]:
    """Returns the cells that `n` utterances of `t` frames of features need in `mode`, one of MODES. The cells with the
    most work come first.

    The list is empty for a dtype that no table has.
    """
    if dtype not in tables.DTYPES:
        return []
    work: Counter[Cell] = Counter()
    for conv in convs(config, t):
        rows_log2 = tables.bucket(n * conv.frames)
        products = math.prod(conv.shape[:3])  # multiply-adds per frame of the output
        named = [(op, conv.shape, products) for op in _ops(conv, mode)]
        if mode == "training" and conv.place != "decoder":
            c = conv.shape[1]
            named += [(op, tuple(tables.shape_of_norm(c).values()), c * PRODUCTS_OF_NORM) for op in tables.NORM_OPS]
        for op, shape, amount in named:
            work[Cell(op, tables.DTYPES[dtype], *shape, rows_log2)] += amount
    return sorted(work, key=lambda cell: (-work[cell], cell))


def _ops(conv: Conv, mode: str) -> tuple[str, ...]:
    if mode == "inference":
        return ("conv1d.fused",)
    if conv.place == "decoder":  # the decoder is a matrix product of PyTorch
        return ()
    if mode == "evaluation":
        return ("conv1d.forward",)
    if conv.place == "first" or conv.shape[3] > 1:
        return ("conv1d.forward_stats", "conv1d.wgrad")
    return ("conv1d.forward_stats", "conv1d.dgrad" if conv.place == "opening" else "conv1d.dgrad_bn", "conv1d.wgrad")
