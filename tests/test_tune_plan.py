"""What `python -m bench tune` tunes: every conv and norm of the network, in which order, with which contenders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import interpreted
from standins import spied

from jasper_fast.bench.cases import counts, models
from jasper_fast.bench.tune import builders as tune_builders
from jasper_fast.bench.tune import cases as tune_cases
from jasper_fast.dispatch import backends
from jasper_fast.kernels import tables
from jasper_fast.kernels.conv1d import triton_tiles
from jasper_fast.kernels.operands import Mask

GPU = torch.device("cuda", 0)
CPU_RUN = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(autouse=True)
def stand_in():
    interpreted()


def test_every_conv_of_the_network_is_tuned_once_and_the_heaviest_first():
    layers = tune_cases.layers(GPU)
    cfg = models.config("jasper10x5")
    convs = list(counts.convs(cfg, 1, 840))
    assert {(c.C_in, c.C_out, c.K) for c in convs} == {(layer.c_in, layer.c_out, layer.taps) for layer in layers}
    assert len({layer[:5] for layer in layers}) == len(layers)
    assert sum(layer.share for layer in layers) == pytest.approx(1.0)
    assert [layer.share for layer in layers] == sorted((layer.share for layer in layers), reverse=True)
    weight = {c.name: c.C_in * c.C_out * c.K for c in convs}
    heaviest = [c for c in convs if (c.C_in, c.C_out, c.K) == layers[0][:3]]
    assert layers[0].share == pytest.approx(sum(weight[c.name] for c in heaviest) / sum(weight.values()), rel=0.05)
    assert {
        ((64, 256, 11, 2, 1), "prologue"), ((768, 896, 29, 1, 2), "main"), ((1024, 29, 1, 1, 1), "decoder"),
        ((256, 768, 1, 1, 1), "pane"), ((896, 1024, 1, 1, 1), "main"),
    } <= {(layer[:5], layer.kind) for layer in layers}  # fmt: skip


def test_the_order_is_by_share_and_training_and_inference_both_come_early():
    todo = tune_cases.plan(GPU, tune_cases.OPS)
    assert len(set(todo)) == len(todo)
    heaviest = tune_cases.layers(GPU)[0]
    assert [layer for _, layer, _ in todo[:6]] == [heaviest] * 6
    assert {op for op, *_ in todo[:6]} == set(tune_cases.CONV_OPS)
    assert {batch for _, _, batch in todo[:6]} == {tune_cases.TRAINING[0], tune_cases.INFERENCE[0]}
    first = {layer: i for i, (_, layer, _) in reversed(list(enumerate(todo)))}
    shares = [layer.share for layer in sorted(first, key=first.__getitem__)]
    assert shares == sorted(shares, reverse=True)
    for op, layer, batch in todo:
        assert op in tune_cases.used(layer.kind)
        assert batch in (tune_cases.INFERENCE if op == "fused" else tune_cases.TRAINING)
        assert not (op.startswith("dgrad") and layer.stride > 1)


@pytest.mark.parametrize(("op", "layer"), [
    (op, layer) for layer in tune_cases.layers(GPU) for op in tune_cases.used(layer.kind)
], ids=lambda a: a if isinstance(a, str) else "-".join(map(str, a[:5])))  # fmt: skip
def test_the_candidates_of_a_gpu_can_be_rows_of_a_table(op, layer):
    """Their labels tell them apart, and every one has the form that a table wants."""
    for n, frames in tune_cases.INFERENCE if op == "fused" else tune_cases.TRAINING:
        shape = triton_tiles.Shape(*layer[:5], n * frames)
        tiles = [c._asdict() for c in triton_tiles.candidates(op, torch.bfloat16, shape, frames)]
        assert tiles and len({json.dumps(t) for t in tiles}) == len(tiles)
        faults = [tables.tile_fault(f"conv1d.{op}", "bfloat16", tile) for tile in tiles]
        assert faults[0] is None, f"the default: {faults[0]}"
        assert sum(fault is None for fault in faults) > len(tiles) / 2


def test_every_width_of_the_norms_is_tuned_both_ways_at_the_training_batches():
    widths = tune_cases.norms(GPU)
    model = models.config("jasper10x5").encoder
    assert {layer.c_in for layer in widths} == {block.filters for block in model.blocks}
    assert all(layer == (layer.c_in, layer.c_in, 1, 1, 1, "norm", layer.share) for layer in widths)
    assert [layer.share for layer in widths] == sorted((layer.share for layer in widths), reverse=True)
    rows = {c: sum(b.repeat * c for b in model.blocks if b.filters == c) for c in {b.filters for b in model.blocks}}
    most = max(rows, key=rows.__getitem__)
    assert widths[0].c_in == most and widths[0].share / widths[-1].share == pytest.approx(
        rows[most] / rows[widths[-1].c_in]
    )
    assert 0.1 < sum(layer.share for layer in widths) < 0.5, "of the bytes of a step, which are the convs' too"

    todo = tune_cases.plan(GPU, tune_cases.OPS)
    found = [(op, layer, batch) for op, layer, batch in todo if layer.kind == "norm"]
    assert len(found) == 2 * len(widths) * len(tune_cases.TRAINING)
    assert {(op, batch) for op, _, batch in found} == {(o, b) for o in tables.NORM_OPS for b in tune_cases.TRAINING}
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first[1:] == second[1:] and first[0] != second[0], "one without the other chooses nothing"
    assert todo[0][1].kind != "norm" and todo[-1][1].kind != "norm"
    assert tune_cases.plan(GPU, tables.NORM_OPS) == found, "they can be asked for alone"


@pytest.mark.parametrize(("missing", "wanted"), [
    ((), ["triton", "cuda", "reference"]), (("cuda",), ["triton", "reference"]),
])  # fmt: skip
def test_the_contenders_of_a_norm_are_the_faces_that_the_machine_has(monkeypatch, missing, wanted):
    monkeypatch.setattr(backends, "why_missing", lambda face, kind: "not built" if face in missing else None)
    run = SimpleNamespace(device=GPU, dtype=torch.bfloat16)
    op, layer, batch = tune_cases.plan(GPU, tables.NORM_OPS)[0]
    case = tune_cases.make_case(run, op, layer, batch, None)
    assert [c.name for c in case.contenders] == wanted and case.ours == "triton"
    (n, frames), c = batch, layer.c_in
    assert case.nbytes == 2 * n * frames * c * {"forward": 3, "backward": 5}[op.split(".")[1]]
    for contender in case.contenders:
        row = contender.row
        assert {k: row[k] for k in tables.SHAPE} == tables.shape_of_norm(c)
        assert (row["op"], row["face"], row["tile"]) == (op, contender.name, None)
        assert row["rows_log2"] == tables.bucket(n * frames)


@pytest.mark.parametrize(("op", "wanted"), [
    ("forward", ["stats", "forward"]), ("backward", ["backward_reduce", "backward_apply"]),
])  # fmt: skip
def test_a_norm_is_called_as_a_training_step_calls_it(monkeypatch, op, wanted):
    """Statistics and forward; reduction and gradient: with lengths, dropout, a halo and the batch's means."""
    impl, calls = backends.face("bn_relu_dropout", "triton"), []
    for name in ("stats", "forward", "backward_reduce", "backward_apply"):
        spied(monkeypatch, impl, name, lambda *args, name=name, **more: calls.append((name, args)))
    ((_, layer, batch),) = tune_cases.plan(CPU_RUN.device, (f"bn_relu_dropout.{op}",))
    case = tune_cases.make_case(CPU_RUN, f"bn_relu_dropout.{op}", layer, batch, tune_builders.Trial(Path("unused")))
    case.refill.__self__.call("triton")
    assert [name for name, _ in calls] == wanted
    for name, args in calls:
        if name == "stats":
            continue
        lengths, seed, p = next(arg for arg in args if isinstance(arg, Mask))
        assert lengths.tolist() == [batch[1]] * batch[0] and seed.numel() == 1 and p == 0.2
        if name == "backward_apply":
            assert args[4] is not None and args[7] == 2  # means of the batch, halo
