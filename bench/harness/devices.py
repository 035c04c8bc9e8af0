"""Waiting for a device, whether it still runs anything, and giving back its memory."""

import gc
import sys

import torch

from jasper_fast.bench.harness.errors import first_line


def lost(device: torch.device | None) -> str:
    """Why the device runs nothing more in this process; empty where it does, or where none is told."""
    if device is None:
        return ""
    try:
        synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return ""


def tidy(device: torch.device) -> None:
    """Give back what no one holds any more: cycles, compiled graphs and their pools, the allocator's free blocks."""
    if device.type == "cuda":
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()
        if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
            trees.reset_cudagraph_trees()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
