"""Compiles the model for the training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jasper_fast.training.runs import RunError


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns `model` compiled by `torch.compile` for batches of any length.

    The result shares the parameters and draws the same dropout. `model` itself does not change: use it for validation
    and checkpoints, whose names then have no prefix. Raises RunError if PyTorch finds no compiler.
    """

    def small(x: Tensor) -> Tensor:
        return torch.sin(x) + 1

    try:
        torch.compile(small)(torch.zeros(8, device=device))
    except RuntimeError as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
        raise RunError(f"--compile: PyTorch cannot compile ({said}): install {what}, or omit --compile") from error
    return torch.compile(model, dynamic=True, options={"fallback_random": True})


def inner(model: nn.Module) -> nn.Module:
    """Returns the module that DistributedDataParallel or `torch.compile` or both have wrapped, or `model` itself."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)
