"""torch.compile as a rival, so that it never silently falls back to eager."""

import copy
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.rivals.eager_layouts import Model

VARIANTS = 64  # most variants of one compiled function


def fresh_compiler() -> None:
    """torch.compile with an empty cache and no fallback to eager. Beyond 8 variants of a function it would warn and
    continue in eager, and eager would be timed. Jasper's twelve blocks, or a grid of shapes, are more than 8."""
    needs_compiler()
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def needs_compiler() -> None:
    """Raises Absent if torch.compile lacks the C++ compiler that it needs on a CPU."""
    import shutil

    if not any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++") if c):
        raise Absent("torch.compile needs a C++ compiler: apt install g++")


def compiled(mode: str) -> Callable[[nn.Module], Model]:
    """torch.compile over the whole model."""

    def build(model: nn.Module) -> Model:
        fresh_compiler()
        return torch.compile(model, mode=mode, dynamic=False)

    return build


def compiled_blocks_frozen(model: nn.Module) -> Model:
    """torch.compile in max-autotune with freezing, block by block (inference only)."""
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
            if features.shape in ready:  # setting compiler options takes host time: only the first call does it
                return frozen(features, lengths)
            with inductor.patch(freezing=True):
                found = frozen(features, lengths)
        ready.add(features.shape)
        return found

    return call


def max_autotuned(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """torch.compile in max-autotune. With its CUDA graphs the backward of one forward cannot run repeatedly, so they
    are off where the backward pass is timed alone."""
    fresh_compiler()
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a backward that donates its buffers runs only once; read in every call
    tuned = "max-autotune-no-cudagraphs" if mode == "backward" else "max-autotune"
    return torch.compile(function, mode=tuned, dynamic=False)
