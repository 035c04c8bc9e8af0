"""Each mistake of tests/cuda_mutants.py, made in the sources of the CUDA conv, makes a check of the conv fail."""

import ctypes
from collections.abc import Iterable
from pathlib import Path

import conv_cases
import cuda_host
import mutant_rig
import pytest
import torch
from cuda_mutants import MUTANTS, WGMMA, WGRAD, WGRAD90
from test_conv1d_cuda import CHAINED, DIRECTIONS, FUSED, check_early, check_inference, emulate

from jasper_fast.kernels.conv1d import cuda_launch, cuda_tiles

# Together these layers cover several chunks, tiles and CTAs, dilation with padding, a stride, and one tap with more
# chunks than there are buffers.
LAYERS = {
    "dilated": (1, 24, 40, 70, 3, 1, 2, [63]),  # the second tile begins at the end of the utterance, in the halo
    "long": (1, 16, 24, 1500, 3, 1, 1, [1500]),  # a share has more segments than there are stages
    "pane": (1, 328, 40, 70, 1, 1, 1, [70]),
    "wide": (2, 136, 72, 75, 5, 1, 1, [75, 20]),
    "strided": (2, 24, 32, 45, 5, 2, 1, [45, 20]),
}


def checked(
    library: Path,
    loop: int,
    directions: Iterable[str],
    seed: int,
    layers: Iterable[str] = LAYERS,
    chained: Iterable[str] = CHAINED,
) -> None:
    """Checks the `directions` of the convs `layers`; raises AssertionError if a result is wrong. `seed` sets the order
    of the threads.

    With direction "forward" it also checks inference and, except in loop 75, early launches of the layers `chained`.
    """
    functions = cuda_launch.bind(loaded := ctypes.CDLL(str(library)))
    loaded.jf_emulation(ctypes.c_int(1), ctypes.c_uint64(seed))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_tiles, "BLOCKS", {75: (64,), 80: (64,), 90: (64,)})
        patch.setattr(cuda_tiles, "plan", cuda_tiles.plan.__wrapped__)
        for layer in map(LAYERS.get, layers):
            emulate(patch, functions, loop, 2)
            for direction in directions:
                if direction != "x" or layer[5] == 1:
                    DIRECTIONS[direction](layer, torch.float16)
        if "forward" in directions:
            emulate(patch, functions, loop, 64)
            check_inference(LAYERS["wide"], 88, True, False, False, torch.float16)
            check_inference(conv_cases.LAYERS["prologue"], *FUSED["features"][1:], torch.float16)
            for layer, c2, shared in map(CHAINED.get, chained) if loop != 75 else ():
                check_early(loaded, layer, c2, shared, torch.float16)


def outcome(library: Path, loop: int, directions: tuple[str, ...]) -> str | None:
    """Runs the checks on `library` in a process of their own; returns the error, or None if they pass."""
    return mutant_rig.outcome(lambda: [checked(library, loop, directions, seed) for seed in mutant_rig.SEEDS])


def library(folder: Path, loop: int, sanitize: str | None = None) -> Path:
    return cuda_host.build(
        [folder / "cuda/emulate/conv1d.cpp"], [f"-DJF_FEW={loop}", "-Wno-error"], sanitize, folder=folder
    )


@pytest.mark.slow
@pytest.mark.parametrize("loop", [75, 80, 90])
def test_the_sources_as_they_are_pass(loop: int) -> None:
    assert outcome(library(cuda_host.CSRC, loop), loop, tuple(DIRECTIONS)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", mutant_rig.chosen(MUTANTS))
def test_a_mutant_is_found(name: str, tmp_path: Path) -> None:
    file, folder = MUTANTS[name][0], mutant_rig.mutated(MUTANTS[name], tmp_path)
    loop = 90 if file in (WGMMA, WGRAD90) else 80
    directions = ("weight",) if file in (WGRAD, WGRAD90) else ("forward", "x")
    assert outcome(library(folder, loop), loop, directions) is not None


@pytest.mark.slow
@pytest.mark.parametrize("loop", [80, 90])
def test_thread_sanitizer_finds_no_race(loop: int) -> None:
    # The long layer has more steps than the others only in the gradient of the weight.
    code = f"""from test_conv1d_cuda_mutants import *
path = {str(library(cuda_host.CSRC, loop, "thread"))!r}
checked(path, {loop}, DIRECTIONS, 0, LAYERS.keys() - {{"long"}}, ["a tile in the padding"])
checked(path, {loop}, ["weight"], 0, ["long"])"""
    assert mutant_rig.races(code) == ""
