"""Splits a command over the processes that torchrun started: each does its share, and the first one reports."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """This process's rank among ``world`` processes: 0 of 1 if it is the only one."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def of(self, sizes: Sequence[float]) -> list[int]:
        """Returns the indices of this process's items, in order. Every process gets a similar mix of sizes."""
        order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
        return sorted(order[self.rank :: self.world])

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by rank, on every process."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Share]:
    """Joins the process group that torchrun describes, if there is one, and yields this process's share.

    In ``arguments`` it sets the device to the GPU of the process's rank, and turns off progress in all processes but
    the first.
    """
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world == 1:
        yield Share()
        return
    import torch
    import torch.distributed as dist

    if arguments.device in ("auto", "cuda") and torch.cuda.is_available():
        arguments.device = f"cuda:{local}"
    arguments.quiet = arguments.quiet or rank > 0
    dist.init_process_group("gloo")  # only texts and numbers are exchanged, on the CPU
    try:
        yield Share(rank, world)
    finally:
        dist.destroy_process_group()
