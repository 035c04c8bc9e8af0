"""The model compiled for the training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jasper_fast.training.runs import RunError


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` as `torch.compile` runs it, for batches of any length; it has the same parameters, and draws the same
    dropout.

    `model` itself stays as it is, for validation and checkpoints, whose names have no prefix then. Raises RunError
    where PyTorch finds no compiler.
    """

    def small(x: Tensor) -> Tensor:
        return torch.sin(x) + 1

    try:
        torch.compile(small)(torch.zeros(8, device=device))
    except RuntimeError as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
        raise RunError(f"--compile: PyTorch cannot compile here ({said}): install {what}, or leave it out") from error
    return torch.compile(model, dynamic=True, options={"fallback_random": True})


def inner(model: nn.Module) -> nn.Module:
    """The module within DistributedDataParallel and `torch.compile`."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)
