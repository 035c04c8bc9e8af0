"""The cases of conv1d in training, and of sub_block in training and inference, layer by layer."""

import functools
from collections.abc import Iterator

from jasper_fast.bench.cases import common, sub_block_inference, sub_blocks
from jasper_fast.bench.cases.layers import Layer, layers
from jasper_fast.bench.harness.case import Case
from jasper_fast.bench.harness.run import Run


def layer_cases(run: Run, op: str, N: int, T: int, layer: Layer, modes: tuple[str, ...]) -> list[Case]:
    """Returns one case of the layer per mode. The cases of training share their inputs."""
    inputs = functools.cache(lambda: sub_blocks.Inputs(N, T, layer, run.dtype, run.device))
    return [
        sub_block_inference.case(run, N, T, layer)
        if mode == "inference"
        else sub_blocks.case(run, op, N, T, layer, mode, inputs)
        for mode in modes
    ]


def cases(op: str, run: Run, mode: str | None = None) -> Iterator[list[Case]]:
    """Yields the cases of one layer after another, so that only one layer's tensors are in memory.

    Each layer has one case per mode. `sub_block` also has the mode "inference". If the run is `quick` or `brief`, there
    are only two layers.
    """
    every = (*common.MODES, "inference") if op == "sub_block" else common.MODES
    for layer in (Layer(768, 768, 25), Layer(256, 256, 11)) if run.quick or run.brief else layers():
        yield layer_cases(run, op, *common.batch(run, layer), layer, common.chosen(run, mode, every))
