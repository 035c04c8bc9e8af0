"""The small benchmark for CI, `pytest bench/quick`: times the panes of a dense block in both our forms and in eager
PyTorch.

No test fails because of a time. `extra_info["of_eager"]` is the ratio to eager's time.
"""

import functools

import pytest
import torch

from jasper_fast.bench.cases import panes
from jasper_fast.bench.harness import correct

CPU = torch.device("cpu")
BLOCK, N, T = panes.Block((128, 128), 192), 2, 200
shortest: dict[str, float] = {}
inputs = functools.cache(lambda: panes.Inputs(N, T, BLOCK, torch.float32, CPU))


@pytest.mark.parametrize("contender", ["eager", *panes.FORMS])
@pytest.mark.benchmark(group="panes forward + backward (2, 128 + 128->192, 200) fp32", min_rounds=5, max_time=0.5)
def test_panes(benchmark, contender):
    if contender == "eager":
        runner = panes.runner(panes.eager, inputs(), "nct", "both")
    else:
        function = panes.fused(contender, "auto")
        runner = panes.runner(function, inputs(), "ntc", "both", gram=contender == "gram")
    inputs().refill(1)
    low, exact = (panes.answer(inputs(), dtype, "both") for dtype in (torch.float32, torch.float64))
    assert not correct.complaints(runner.outputs(), low, exact, panes.TOLERANCE)
    benchmark(runner.run)
    if benchmark.enabled:
        shortest[contender] = benchmark.stats.stats.min
        if "eager" in shortest:
            benchmark.extra_info["of_eager"] = shortest[contender] / shortest["eager"]
