"""Functions that wait for a device, test whether it still works, and free its memory."""

import gc
import sys

import torch

from jasper_fast.bench.harness.errors import first_line


def lost(device: torch.device) -> str:
    """Returns why the device no longer works in this process, or an empty text if it works."""
    try:
        synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return ""


def tidy(device: torch.device) -> None:
    """Frees reference cycles and, on a GPU, also compiled functions, memory pools of CUDA graphs and cached blocks."""
    if device.type == "cuda":
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()
        if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
            trees.reset_cudagraph_trees()
    gc.collect()
    torch.cuda.empty_cache()  # does nothing if no GPU is in use


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
