"""Launches are counted, and a profile names layers and ops."""

from __future__ import annotations

import json

import torch
from bench_runs import CPU

from bench import launches, models, profiles
from bench.harness import Runner
from jasper_fast.eager import EagerJasper


def test_launches_are_counted():
    x = torch.randn(4, 4)
    found = launches.count(Runner(lambda: x.t().relu().exp().reshape(16).sum(), dict), CPU)
    assert found == {"ops": 4}


def test_profile_names_layers_and_ops(tmp_path):
    model = EagerJasper(models.config("small")).eval()
    inputs = models.features(model.config, 1, 64, CPU, 0)
    with profiles.ranges(model, CPU), torch.no_grad():
        records = profiles.profile(lambda: model(*inputs), CPU, tmp_path / "trace.json")
    layers = {r["name"]: r for r in records if r["kind"] == "layer"}
    assert set(layers) == {*(f"encoder.layers.{i}" for i in range(5)), "decoder.layers.0"}
    assert all(r["calls"] == 1 and r["seconds"] > 0 for r in layers.values())
    assert any("conv" in r["name"] for r in records if r["kind"] == "op")
    names = {e.get("name") for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "layer encoder.layers.3" in names
    assert not model.encoder.layers[0]._forward_hooks
