"""torch.compile as a rival, set to raise an error instead of falling back to eager."""

import copy
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.rivals.eager_layouts import Model

VARIANTS = 64  # maximum number of compiled variants of one function


def fresh_compiler() -> None:
    """Empties torch.compile's cache and switches off its fallback to eager.

    By default torch.compile makes at most 8 variants of a function. It runs further variants in eager, with only a
    warning. The 13 blocks of Jasper 10x5, or a grid of shapes, need more than 8.
    """
    needs_compiler()
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def needs_compiler() -> None:
    """Raises Absent if there is no C++ compiler, which torch.compile needs on a CPU."""
    if not any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c):
        raise Absent("torch.compile needs a C++ compiler: apt install g++")


def compiled(model: nn.Module, mode: str = "default") -> Model:
    """Returns the whole model compiled in this mode of torch.compile."""
    fresh_compiler()
    return torch.compile(model, mode=mode, dynamic=False)


def compiled_blocks_frozen(model: nn.Module) -> Model:
    """Returns the model with each block compiled by torch.compile with max-autotune and freezing, for inference."""
    fresh_compiler()
    import torch._inductor.config as inductor

    frozen = copy.copy(model)
    frozen._modules = dict(model._modules)
    frozen.encoder = nn.Module()
    frozen.encoder.layers = nn.ModuleList(
        torch.compile(block, mode="max-autotune", dynamic=False) for block in model.encoder.layers
    )

    ready: set[torch.Size] = set()

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            # Compiler options are set only for the first call with a shape, because setting them takes host time.
            if features.shape in ready:
                return frozen(features, lengths)
            with inductor.patch(freezing=True):
                found = frozen(features, lengths)
        ready.add(features.shape)
        return found

    return call


def max_autotuned(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """Returns the function compiled with max-autotune.

    The mode "backward" times many backward passes of one forward pass, which is impossible with CUDA graphs. So that
    mode uses none.
    """
    fresh_compiler()
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # because a backward that donates its buffers can run only once
    tuned = "max-autotune-no-cudagraphs" if mode == "backward" else "max-autotune"
    return torch.compile(function, mode=tuned, dynamic=False)
