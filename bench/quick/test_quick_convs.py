"""The small benchmark for CI, `pytest bench/quick`: times conv1d and sub_block with our implementations and in eager
PyTorch.

No test fails because of a time. `extra_info["of_reference"]` is the ratio to the time of our `reference`
implementation.
"""

import functools

import pytest
import torch

from jasper_fast.bench.cases import common, sub_blocks
from jasper_fast.bench.cases.layers import Layer
from jasper_fast.bench.harness import correct
from jasper_fast.dispatch import backends

CPU = torch.device("cpu")
LAYER, N, T = Layer(128, 128, 11), 2, 200
FACES = ("reference", "cpu", "eager")
OPS = {
    "conv1d": (sub_blocks.fused_conv, sub_blocks.eager_conv),
    "sub_block": (sub_blocks.fused_sub_block, sub_blocks.eager_sub_block),
}
shortest: dict[tuple[str, str], float] = {}
inputs = functools.cache(lambda: sub_blocks.Inputs(N, T, LAYER, torch.float32, CPU))


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.benchmark(min_rounds=5, max_time=0.5)
def test_conv(benchmark, op, face):
    if face != "eager" and (reason := backends.why_missing(face, "cpu")):
        pytest.skip(reason)
    benchmark.group = f"{op} forward + backward ({N}, {LAYER.C_in}->{LAYER.C_out}, {T}), K = {LAYER.K} fp32"
    fused, eager = OPS[op]
    function, memory = (eager, "nct") if face == "eager" else (fused(face), "ntc")
    runner = sub_blocks.runner(op, function, inputs(), memory, "both", amp=False)
    inputs().refill(1)
    low, exact = (sub_blocks.answer(op, inputs(), dtype, "both") for dtype in (torch.float32, torch.float64))
    assert not correct.complaints(runner.outputs(), low, exact, common.CONV_TOLERANCE)
    benchmark(runner.run)
    if benchmark.enabled:
        shortest[op, face] = benchmark.stats.stats.min
        if (op, "reference") in shortest:
            benchmark.extra_info["of_reference"] = shortest[op, face] / shortest[op, "reference"]
