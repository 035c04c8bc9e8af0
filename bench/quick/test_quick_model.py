"""The small benchmark for CI, `pytest bench/quick`: times the small Jasper, ours and eager."""

import pytest
import torch

from jasper_fast import InferenceEngine, Jasper
from jasper_fast.bench.cases import latency, models, train
from jasper_fast.bench.harness import correct

CPU = torch.device("cpu")
shortest: dict[str, float] = {}


@pytest.fixture(scope="module")
def small():
    """Configuration and weights of the small Jasper."""
    config = models.config("small")
    return config, models.weights(config, CPU)


def of_eager(benchmark, kind: str, contender: str) -> None:
    """Writes into the benchmark's results the shortest time of `contender` divided by the shortest time of eager."""
    if benchmark.enabled:
        shortest[kind + contender] = benchmark.stats.stats.min
        if kind + "eager" in shortest:
            benchmark.extra_info["of_eager"] = shortest[kind + contender] / shortest[kind + "eager"]


def plain(config, state, batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the answer of eager PyTorch in `dtype`."""
    module = models.eager(config, state, dtype)
    return train.answer(module, module, batch, state, dtype)


@pytest.mark.parametrize("contender", ["eager", "jasper_fast"])
@pytest.mark.benchmark(group="small Jasper, training forward + backward (2, 64, 200)", min_rounds=5, max_time=1.5)
def test_training(benchmark, small, contender):
    config, state = small
    batch = train.Batch(config, 2, 200, CPU)
    module = models.eager(config, state) if contender == "eager" else Jasper(config)
    runner = train.runner(module, module, batch, state, torch.float32, "forward+backward")
    low, exact = plain(config, state, batch, torch.float32), plain(config, state, batch, torch.float64)
    assert not correct.complaints(runner.outputs(), low, exact, train.TOLERANCE)
    benchmark(runner.run)
    of_eager(benchmark, "training", contender)


@pytest.mark.parametrize("contender", ["eager", "jasper_fast"])
@pytest.mark.benchmark(group="small Jasper, inference (1, 64, 208)", min_rounds=5, max_time=1.5)
def test_inference(benchmark, small, contender):
    config, state = small
    inputs = models.features(config, 1, 208, CPU, 1)
    eager = models.eager(config, state).eval()
    if contender == "eager":
        call = eager
    else:
        fused = Jasper(config)
        fused.load_state_dict(state)
        call = InferenceEngine(fused.eval())
    with torch.inference_mode():
        got, want = {"log_probs": call(*inputs)[0]}, {"log_probs": eager(*inputs)[0]}
        assert not correct.complaints(got, None, want, latency.TOLERANCES[torch.float32])
        benchmark(call, *inputs)
    of_eager(benchmark, "inference", contender)
