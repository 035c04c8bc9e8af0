"""The small benchmark for CI, `pytest bench/quick`: times ops and the small Jasper, ours and eager PyTorch's.

No test fails because of a time. `extra_info` has the shortest time, divided by that of the first contender of the same
case (our `reference` implementation or eager). This ratio hardly depends on the speed of the machine.
"""

import dataclasses

import pytest
import torch

from jasper_fast.bench.cases import bn_relu_dropout, latency, panes, sub_blocks, train
from jasper_fast.bench.cases.layers import Layer
from jasper_fast.bench.harness.run import Run
from jasper_fast.dispatch import backends

pytest_plugins = ["ratios_summary"]  # not a conftest.py, so that pytest can collect this folder together with tests
RUN = Run(torch.device("cpu"), torch.float32, "auto", quick=False, results=None, rivals="eager")
LAYER = Layer(128, 128, 11)
CASES = {
    "bn_relu_dropout": lambda run: bn_relu_dropout.case(run, (2, 256, 400), "both", False, False),
    "conv1d": lambda run: sub_blocks.case(run, "conv1d", 2, 200, LAYER, "both"),
    "sub_block": lambda run: sub_blocks.case(run, "sub_block", 2, 200, LAYER, "both"),
    "panes": lambda run: panes.case(run, 2, 200, panes.Block((128, 128), 192), "both"),
    "training": lambda run: train.case(run, "small", 2, 200, "forward+backward"),
    "inference": lambda run: latency.case(latency.Models(run, "small"), "small", 1, 2.0),
}
FACES = ("reference", "cpu")
CONTENDERS = dict.fromkeys(("bn_relu_dropout", "conv1d", "sub_block"), (*FACES, "eager"))
CONTENDERS |= {"panes": ("eager", "jasper_fast", "jasper_fast_gram")}
CONTENDERS |= dict.fromkeys(("training", "inference"), ("eager", "jasper_fast"))
shortest: dict[tuple[str, str], float] = {}


@pytest.mark.parametrize(("name", "contender"), [(name, one) for name, all_ in CONTENDERS.items() for one in all_])
@pytest.mark.benchmark(min_rounds=5, max_time=0.5)
def test_contender(benchmark, name, contender):
    backend, wanted = (contender, "jasper_fast") if contender in FACES else ("auto", contender)
    if contender in FACES and (reason := backends.why_missing(contender, "cpu")):
        pytest.skip(reason)
    case = CASES[name](dataclasses.replace(RUN, backend=backend))
    runner = next(one for one in case.contenders if one.name == wanted).build()
    case.refill(2)
    assert not case.complaints(runner.outputs(), case.low(), case.reference())
    assert not runner.extra()
    benchmark.group = case.label()
    benchmark(runner.run)
    first = CONTENDERS[name][0]
    if benchmark.enabled:
        shortest[name, contender] = benchmark.stats.stats.min
        if (name, first) in shortest:
            benchmark.extra_info[f"of_{first}"] = shortest[name, contender] / shortest[name, first]
