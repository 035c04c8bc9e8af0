"""Splits a command over the processes that torchrun started: each does its share, and the first one reports."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jasper_fast.training.runs import Ranks


def share(sizes: Sequence[float], rank: int, world: int) -> list[int]:
    """Returns the indices of one process's items, in order. Every process gets a similar mix of sizes."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    return sorted(order[rank::world])


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Ranks]:
    """Joins the process group that torchrun describes, if there is one, and yields this process's place in it.

    In ``arguments`` it sets the device to the GPU of the process's rank, and turns off progress in all processes but
    the first.
    """
    import torch

    from jasper_fast.training import runs

    rank, world, local = runs.launched()
    if world == 1:
        yield runs.Ranks(0, 1, torch.device("cpu"))
        return
    if arguments.device in ("auto", "cuda") and torch.cuda.is_available():
        arguments.device = f"cuda:{local}"
    arguments.quiet = arguments.quiet or rank > 0
    torch.distributed.init_process_group("gloo")  # only texts and numbers are exchanged, on the CPU
    try:
        yield runs.Ranks(rank, world, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
