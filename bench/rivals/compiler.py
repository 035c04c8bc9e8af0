"""torch.compile as a rival, never eager in its place."""

import copy
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.rivals.eager_layouts import Model

VARIANTS = 64  # of a compiled function


def fresh_compiler() -> None:
    """torch.compile with nothing compiled yet, and never eager in its place: beyond 8 variants of a function, which
    Jasper's twelve blocks are, or a grid's shapes, it would go on in eager with a warning, and eager would be timed."""
    needs_compiler()
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def needs_compiler() -> None:
    """torch.compile on a CPU writes C++."""
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
            if features.shape in ready:  # the compiler's setting, which takes the host's time, is for compiling alone
                return frozen(features, lengths)
            with inductor.patch(freezing=True):
                found = frozen(features, lengths)
        ready.add(features.shape)
        return found

    return call


def max_autotuned(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """torch.compile in max-autotune. Its CUDA graphs do not allow one forward's backward to run again and again, so
    where the backward pass is timed alone they are off."""
    fresh_compiler()
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a backward that donates its buffers runs only once; read in every call
    tuned = "max-autotune-no-cudagraphs" if mode == "backward" else "max-autotune"
    return torch.compile(function, mode=tuned, dynamic=False)
