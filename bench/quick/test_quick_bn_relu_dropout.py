"""The small benchmark for CI, `pytest bench/quick`: times bn_relu_dropout with our implementations and in eager
PyTorch.

No test fails because of a time. `extra_info["of_reference"]` is the ratio to the time of our `reference`
implementation, which hardly depends on the speed of the machine.
"""

import pytest
import torch

from jasper_fast.bench.cases import bn_relu_dropout, common
from jasper_fast.bench.harness import correct
from jasper_fast.dispatch import backends

CPU = torch.device("cpu")
SHAPE = (2, 256, 400)
FACES = ("reference", "cpu", "eager")
shortest: dict[str, float] = {}


@pytest.fixture(scope="module")
def inputs() -> bn_relu_dropout.Inputs:
    """Tensors of SHAPE, which all tests share."""
    made = bn_relu_dropout.Inputs(*SHAPE, torch.float32, CPU, False)
    made.refill(1)
    return made


@pytest.mark.parametrize("face", FACES)
@pytest.mark.benchmark(group="bn_relu_dropout forward + backward (2, 256, 400) fp32", min_rounds=5, max_time=0.5)
def test_bn_relu_dropout(benchmark, inputs, face):
    if face != "eager" and (reason := backends.why_missing(face, "cpu")):
        pytest.skip(reason)
    chain, memory = (common.eager_chain, "nct") if face == "eager" else (bn_relu_dropout.fused(face), "ntc")
    runner = bn_relu_dropout.runner(chain, inputs, memory, "both", common.P)
    low, exact = (bn_relu_dropout.answer(inputs, dtype) for dtype in (torch.float32, torch.float64))
    assert not correct.complaints(runner.outputs(), low, exact, bn_relu_dropout.TOLERANCE)
    assert not runner.extra()
    benchmark(runner.run)
    if benchmark.enabled:
        shortest[face] = benchmark.stats.stats.min
        if "reference" in shortest:
            benchmark.extra_info["of_reference"] = shortest[face] / shortest["reference"]
