"""The small version for CI's history: `pytest bench/`. Every face beside eager and the reference face in one run.

Nothing here asserts on a time; `extra_info["of_reference"]` keeps the ratio to the reference face, which a slower
machine does not change.
"""

import pytest
import torch

from bench import correct, kernels
from jasper_fast import backends

CPU = torch.device("cpu")
SHAPE = (2, 256, 400)
FACES = ("reference", "cpu", "eager")
shortest: dict[str, float] = {}


@pytest.fixture(scope="module")
def inputs() -> kernels.Inputs:
    """The shape's tensors, shared by all faces."""
    made = kernels.Inputs(*SHAPE, torch.float32, CPU, False)
    made.refill(1)
    return made


@pytest.mark.parametrize("face", FACES)
@pytest.mark.benchmark(group="bn_relu_dropout forward + backward (2, 256, 400) fp32", min_rounds=5, max_time=0.5)
def test_bn_relu_dropout(benchmark, inputs, face):
    if face != "eager" and (reason := backends.why_missing(face, "cpu")):
        pytest.skip(reason)
    chain, memory = (kernels.eager_chain, "nct") if face == "eager" else (kernels.fused(face), "ntc")
    runner = kernels.runner(chain, inputs, memory, "both", kernels.P)
    low, exact = (kernels.answer(inputs, dtype) for dtype in (torch.float32, torch.float64))
    assert not correct.complaints(runner.outputs(), low, exact, kernels.TOLERANCE)
    assert not runner.extra()
    benchmark(runner.run)
    if benchmark.enabled:
        shortest[face] = benchmark.stats.stats.min
        if "reference" in shortest:
            benchmark.extra_info["of_reference"] = shortest[face] / shortest["reference"]
