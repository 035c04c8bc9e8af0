"""What a Jasper asks of the tables of measured choices: its distinct convs and norms, as cells to tune."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from jasper_fast.kernels import tables
from jasper_fast.kernels.tables import Cell
from jasper_fast.nn.config import JasperConfig

MODES = ("training", "evaluation", "inference")  # the last is an InferenceEngine's

PRODUCTS_OF_NORM = 2400  # multiply-adds that take as long as eight bytes: what a norm moves of an element, both ways


class Conv(NamedTuple):
    """A conv of the network: `shape` (c_in, c_out, taps, stride, dilation), frames of its output; `place`: "first" of
    the network, "opening" a block, "inner", or the "decoder"."""

    shape: tuple[int, int, int, int, int]
    frames: int
    place: str

    @property
    def products(self) -> int:
        """Multiply-adds a frame of its output."""
        c_in, c_out, taps, *_ = self.shape
        return c_in * c_out * taps


def convs(config: JasperConfig, t: int = 2) -> Iterator[Conv]:
    """The main convs in order, of `t` frames of features, and the decoder where there is one; panes are matrix products
    of PyTorch."""
    c = config.encoder.in_feats
    for number, b in enumerate(config.encoder.blocks):
        for r in range(b.repeat):
            t = max(1, b.out_length(t))
            place = "inner" if r and b.s == 1 else "opening" if number or r else "first"
            # of a separable sub-block the pointwise conv, whose gradients are never part of batch norm's
            shape, place = ((1, 1, 1), "opening") if b.separable else ((b.k, b.s, b.d), place)
            yield Conv((c, b.filters, *shape), t, place)
            c = b.filters
    if config.decoder is not None:
        yield Conv((c, config.decoder.n_classes, 1, 1, 1), t, "decoder")


def engine_convs(config: JasperConfig) -> tuple[tuple[tuple[int, ...], int], ...]:
    """The distinct convs of an engine, the decoder's too, each with how often it comes."""
    count: dict[tuple[int, ...], int] = {}
    for conv in convs(config):
        count[conv.shape] = count.get(conv.shape, 0) + 1
    return tuple(count.items())


def cells(config: JasperConfig, n: int, t: int, dtype: torch.dtype, mode: str) -> list[Cell]:
    """The cells of `n` utterances of `t` frames of features in `mode`, one of MODES, those with the most work first.

    Empty for a dtype that no table has.
    """
    if dtype not in tables.DTYPES:
        return []
    work: dict[Cell, float] = {}
    for conv in convs(config, t):
        rows_log2 = tables.bucket(n * conv.frames)
        named = [(op, conv.shape, conv.products) for op in _ops(conv, mode)]
        if mode == "training" and conv.place != "decoder":
            c = conv.shape[1]
            named += [(op, tuple(tables.shape_of_norm(c).values()), c * PRODUCTS_OF_NORM) for op in tables.NORM_OPS]
        for op, shape, products in named:
            cell = Cell(op, tables.DTYPES[dtype], *shape, rows_log2)
            work[cell] = work.get(cell, 0.0) + products
    return sorted(work, key=lambda cell: (-work[cell], cell))


def _ops(conv: Conv, mode: str) -> tuple[str, ...]:
    if mode == "inference":
        return ("conv1d.fused",)
    if conv.place == "decoder":  # a matrix product of PyTorch
        return ()
    if mode == "evaluation":
        return ("conv1d.forward",)
    dx = () if conv.place == "first" or conv.shape[3] > 1 else ("conv1d.dgrad_bn",)
    dx = ("conv1d.dgrad",) if dx and conv.place == "opening" else dx
    return ("conv1d.forward_stats", *dx, "conv1d.wgrad")
