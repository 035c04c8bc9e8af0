"""Waiting for a device, testing whether it still works, and freeing its memory."""

import gc
import sys

import torch

from jasper_fast.bench.harness.errors import first_line


def lost(device: torch.device | None) -> str:
    """Why the device no longer works in this process; empty if it works or no device is given."""
    if device is None:
        return ""
    try:
        synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return ""


def tidy(device: torch.device) -> None:
    """Frees unused memory: reference cycles, compiled graphs and their pools, free blocks of the allocator."""
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
