"""`python -m bench profile` names every layer, forward and backward, in training and in the engine. Its profiler counts
launches, adds no output and reports its errors."""

import json
import os

import pytest
import torch
from bench_runs import CPU, CUDA, make_run, written
from conftest import interpreted, make_face, raising
from standins import wrap

from jasper_fast import InferenceEngine
from jasper_fast.bench.cases import models
from jasper_fast.bench.commands import launches, profile
from jasper_fast.bench.harness import allocations, kineto
from jasper_fast.bench.harness.case import Runner
from jasper_fast.kernels import launch
from jasper_fast.nn.eager import EagerJasper

ENCODER = {f"encoder.layers.{i}" for i in range(5)}
T = 64


def names(records: list[dict], kind: str) -> dict[str, int]:
    return {r["name"]: r["calls"] for r in records if r["kind"] == kind}


def ranges_in(path) -> set[str]:
    names = (event.get("name", "") for event in json.loads(path.read_text())["traceEvents"])
    return {name.removeprefix(profile.LAYER) for name in names if name.startswith(profile.LAYER)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_both_contenders_have_tables_of_all_layers(mode, run, tmp_path):
    ours, eager = profile.main(run, "small", mode, 2, T)
    assert (ours["contender"], eager["contender"]) == ("jasper_fast", "eager")
    for found in (ours, eager):
        assert found["status"] == "ok" and found["step_s"] > 0 and found["profiled_s"] > 0
        assert set(names(found["records"], "layer")) >= ENCODER
        assert ranges_in(tmp_path / found["trace"]) >= ENCODER
        assert names(found["records"], "op")
    assert written(run)["profiles"] == [ours, eager]
    if mode == "inference":
        blocks = models.config("small").encoder.blocks
        wanted = {f"encoder.layers.{i}": block.repeat for i, block in enumerate(blocks)} | {profile.HEAD: 1}
        assert names(ours["records"], "layer") == wanted  # one range per sub-block
        assert not names(ours["records"], "backward")
        profile.main(make_run(tmp_path), "small", mode, 1, T)
        assert len(list(tmp_path.glob("trace_small_inference_eager_*.json"))) == 2, "the first run's traces are kept"
    else:
        assert set(names(ours["records"], "backward")) == ENCODER
        assert set(names(eager["records"], "backward")) == ENCODER | {profile.HEAD}


def test_layers_have_ranges_and_backward_s_nodes_belong_to_the_layer_that_made_them(tmp_path):
    """Shows that eager's backward nodes are assigned to their layers. Mask, conv, norm, ReLU and dropout have one node
    each. Only the first layer's mask has none, because the features need no gradient."""
    config = models.config("small")
    model, (x, lengths) = EagerJasper(config).train(), models.features(config, 2, T, CPU, 0, ragged=True)

    def step():
        model(x, lengths)[0].square().sum().backward()

    with profile.ranges(model, CPU):
        records = profile.profile(step, CPU, tmp_path / "trace.json")
    assert names(records, "layer") == dict.fromkeys(ENCODER | {profile.HEAD}, 1)
    assert ranges_in(tmp_path / "trace.json") == ENCODER | {profile.HEAD}
    assert any("conv" in name for name in names(records, "op"))
    assert not any("forward" in vars(layer) for layer in model.encoder.layers), "the ranges are gone"
    nodes = names(records, "backward")
    assert nodes.pop(profile.HEAD) == 1
    # block i of the middle three has i panes (1x1 convs of earlier outputs), each with mask, conv, norm and sum
    middle = {f"encoder.layers.{i}": 5 * config.encoder.blocks[i].repeat + 4 * i for i in (1, 2, 3)}
    assert nodes == {"encoder.layers.0": 4, **middle, "encoder.layers.4": 5}


@pytest.mark.slow
def test_a_wrong_contender_has_no_profile(run, tmp_path, monkeypatch):
    def scaled(fused, cfg, state, backend):
        return fused(cfg, {k: v * 1.5 if k == "decoder.layers.0.weight" else v for k, v in state.items()}, backend)

    wrap(monkeypatch, models, "fused", scaled)
    ours, eager = profile.main(run, "small", "inference", 2, T)
    assert ours["status"] == "wrong" and "log_probs" in ours["why"] and ours["records"] == []
    assert eager["status"] == "ok" and not list(tmp_path.glob("trace_*jasper_fast*"))


@pytest.mark.parametrize("model", ["small", "quartznet_small"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_an_engine_is_as_it_was_after_its_ranges(backend, model, monkeypatch):
    interpreted() if backend == "triton" else make_face(backend)
    if backend == "triton":
        monkeypatch.setattr(launch, "run", lambda *args, **meta: None)
    config = models.config(model)
    engine = InferenceEngine(models.fused(config, models.weights(config, CPU), backend).eval(), graphs=False)
    inputs, plan = models.features(config, 1, T, CPU, 0), engine._run.plan
    before = engine(*inputs)[0]
    with profile.engine_ranges(engine, CPU), torch.profiler.profile() as trace:
        inside, ranged = engine(*inputs)[0], engine._run.plan
    assert ranged.reads_source == plan.reads_source, "the engine launches the convs as before"
    assert all(isinstance(new.conv, type(old.conv)) for new, old in zip(ranged.steps, plan.steps, strict=True))
    seen = {e.key.removeprefix(profile.LAYER): e.count for e in trace.key_averages() if e.key.startswith(profile.LAYER)}
    assert sum(seen.values()) == len(plan.steps) + 1 and set(seen) == ENCODER | {profile.HEAD}
    with torch.profiler.profile() as trace:
        after = engine(*inputs)[0]
    assert engine._run.plan is plan and not any(e.key.startswith(profile.LAYER) for e in trace.key_averages())
    if backend != "triton":  # Triton's launches are replaced above by a function that does nothing
        assert torch.equal(before, inside) and torch.equal(before, after)


# ------------------------------------------------------------------ the profiler


def test_launches_are_counted():
    x = torch.randn(4, 4)
    assert launches.count(Runner(lambda: x.t().relu().exp().reshape(16).sum(), dict), CPU) == {"ops": 4}


def test_a_profile_leaves_nothing_on_the_terminal_and_hides_no_error(tmp_path, capfd):
    def step():
        os.write(2, b"USDT: of the step's own\n")
        return torch.ones(3) + 1

    assert any(r["name"] == "aten::add" for r in profile.profile(step, CPU, tmp_path / "trace.json"))
    assert allocations.peak(lambda: torch.ones(256), "cpu") == 1024
    out, err = capfd.readouterr()
    assert (out, set(err.splitlines())) == ("", {"USDT: of the step's own"})  # output of the step is kept
    with pytest.raises(RuntimeError), kineto.without_marks():
        os.write(2, b"USDT:2026 profiler_start\nERROR:2026 A.cpp:48] gpuGetDeviceCount failed with code 35\n")
        os.write(2, b"ERROR: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\n")
        raise RuntimeError
    assert capfd.readouterr().err == "ERROR: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\n"


def test_a_step_that_fails_stops_the_profiler():
    with pytest.raises(ValueError), kineto.recorded([torch.profiler.ProfilerActivity.CPU]):
        raise ValueError
    assert not torch.autograd._profiler_enabled()


def test_a_gpu_s_profile_without_kernels_is_a_failure(tmp_path, monkeypatch):
    """Without CUPTI the profiler records no kernel."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    with pytest.raises(RuntimeError, match="CUPTI"):
        profile.profile(lambda: torch.ones(3) + 1, CUDA, tmp_path / "trace.json")


def test_a_profile_that_fails_is_told_in_its_record(run, monkeypatch):
    monkeypatch.setattr(profile, "profile", raising(RuntimeError("no CUPTI")))
    found = profile.main(run, "small", "inference", 1, T)
    assert [(f["status"], f["why"], f["records"]) for f in found] == [("failed", "RuntimeError: no CUPTI", [])] * 2


def test_launches_that_cannot_be_counted_are_not_told_as_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    assert launches.count(Runner(lambda: torch.ones(4).exp(), dict), CUDA) == {"ops": 2}
    assert "CUPTI" in capsys.readouterr().err
