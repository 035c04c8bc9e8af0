"""The cases of bench make their networks and answers only once, and channels_last rivals never reorder memory."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, CUDA, make_run
from conftest import assert_raises
from standins import spied

from jasper_fast.bench.cases import by_layer, latency, models, sub_blocks, train
from jasper_fast.bench.cases.layers import Layer
from jasper_fast.bench.rivals.eager_layouts import ChannelsLast2d


def test_networks_are_made_where_they_run_and_only_once(monkeypatch):
    def made(*_, **__):
        raise RuntimeError(f"made on {torch.empty(0).device.type}")

    monkeypatch.setattr(models, "EagerJasper", made)
    monkeypatch.setattr(models, "Jasper", made)
    config = models.config("small")
    assert_raises(
        [
            (lambda: models._weights(config, torch.device("meta"), 64), "made on meta"),
            (lambda: models.fused(config, {}, "reference"), "made on meta"),
        ],
        RuntimeError,
    )


def test_weights_are_shared_and_models_are_copies():
    config = models.config("small")
    state = models.weights(config, CPU, 64)
    again = models.weights(models.config("small"), CPU, 64)
    name = "encoder.layers.0.conv.0.weight"
    assert again is not state and again[name] is state[name]
    before = state[name].clone()
    for model in (models.fused(config, state, "reference"), models.eager(config, state)):
        assert all(p.requires_grad and p.device == CPU for p in model.parameters())
        for t in model.state_dict().values():
            t.zero_()
    assert torch.equal(state[name], before)
    x, lengths = models.features(config, 2, 64, CPU, 1)
    with torch.no_grad():
        got = models.fused(config, state, "reference").eval()(x, lengths)[0]
        want = models.eager(config, state).eval()(x, lengths)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_models_go_when_nobody_holds_them(run):
    gc.collect()
    gc.disable()  # so that objects in reference cycles are not freed
    try:
        shared = latency.Models(run, "small")
        refs = weakref.ref(shared), weakref.ref(shared.inputs(1, 2.0)[0])
        del shared
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_large_step_is_compared_on_a_small_batch(tmp_path, monkeypatch):
    large, small = models.config("jasper10x5"), models.config("small")
    assert train.judged_size(CUDA, large, 64, 1680) == (2, 1680)
    assert train.judged_size(CUDA, small, 64, 1680) == train.judged_size(CPU, large, 64, 1680) == (64, 1680)

    monkeypatch.setattr(train, "judged_size", lambda device, cfg, N, T: (1, T))
    sizes = spied(monkeypatch, train, "answer", lambda module, call, batch, *_: batch.features.shape[0])
    run = make_run(tmp_path, rivals="eager")
    case = train.case(run, "small", 3, 64, "forward+backward")
    assert case.seeds == (1,)
    rows = run.cases("test", [case])
    assert [r["status"] for r in rows] == ["ok", "ok"], [r.get("why") for r in rows]
    assert set(sizes) == {1} and len(sizes) == 2 * 4, "two contenders, low and reference, before and after the timing"


@pytest.mark.parametrize(("order", "made"), [(("forward",), 0), (("forward", "both"), 1), (("both", "forward"), 1)])
def test_answers_are_made_once_and_gradients_only_where_they_are_asked_for(order, made, tmp_path, monkeypatch):
    """An fp64 answer takes longer than everything that is timed, so it must not be computed twice."""
    conv, forwards = sub_blocks.eager_conv, []
    monkeypatch.setitem(sub_blocks.OPS, "conv1d", (None, lambda *of: forwards.append(1) or conv(*of), None))
    backwards = spied(monkeypatch, sub_blocks, "results")
    i = sub_blocks.Inputs(2, 20, Layer(8, 8, 3), torch.float32, CPU)
    for mode in (*order, *order):
        found = sub_blocks.answer("conv1d", i, torch.float64, mode)
        assert set(found) == ({"y"} if mode == "forward" else {"y", "dx", "dweight"})
        assert torch.equal(found["y"], conv(i.nct["x"].double(), i, i.weight.double(), None, None, 0.0))
    assert len(backwards) == made and len(forwards) == 1 + (order[0] == "forward") * made
    i.refill(5)
    assert not torch.equal(sub_blocks.answer("conv1d", i, torch.float64, "forward")["y"], found["y"])


# ------------------------------------------------------------------ channels_last


@pytest.fixture
def seen(monkeypatch) -> list[bool]:
    """Records for every call of conv2d whether input and weight are in channels_last memory."""

    def ordered(x, weight, *_):
        return all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))

    return spied(monkeypatch, F, "conv2d", ordered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["forward", "both", "inference"])
def test_the_2d_rival_never_reorders_a_weight(mode, dtype, tmp_path, seen):
    run = make_run(tmp_path, dtype=dtype)
    for layer in (Layer(16, 24, 11), Layer(16, 24, 11, stride=2), Layer(8, 8, 1)):
        (case,) = by_layer.layer_cases(run, "sub_block", 2, 40, layer, (mode,))
        rival = next(c for c in case.contenders if c.name == "eager_2d_channels_last").build()
        rival.run()
        rival.outputs()
    assert len(seen) == 6 and all(seen)


def test_the_2d_network_never_leaves_channels_last_memory(seen):
    config = models.config("small")
    state = models.weights(config, CPU, 64)
    model = ChannelsLast2d(models.eager(config, state))
    train.restore(model, state)
    model(*models.features(config, 2, 64, CPU, 1, ragged=True))
    assert len(seen) == sum(isinstance(m, torch.nn.Conv1d) for m in model.modules()) and all(seen)
