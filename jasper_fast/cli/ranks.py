"""Runs a command on several processes started by torchrun: each does its share, and the first one reports."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """This process among ``world``; alone it is 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def of(self, sizes: Sequence[float]) -> list[int]:
        """The indices of this process's items, in order; every process gets equally many of each size."""
        order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
        return sorted(order[self.rank :: self.world])

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, on every process."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Share]:
    """Joins the process group that torchrun describes, if any, and gives each process the GPU of its rank.

    ``arguments``: those of the command's options; processes beside the first show no progress.
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
