"""The bench harness: no number for a wrong result, honest counts, results that survive being cut off."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_face
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as cli
from bench import (
    correct,
    counts,
    goals,
    gpu,
    harness,
    kernels,
    launches,
    limits,
    memory,
    models,
    profiles,
    report,
    rivals,
    sub_block_inference,
    sub_blocks,
)
from bench.harness import Case, Contender, Runner
from jasper_fast.eager import EagerJasper

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
FAST = harness.Effort(seconds=0.05, min_rounds=3, max_rounds=4)


def make_run(tmp_path: Path, backend: str = "reference", **kwargs) -> harness.Run:
    header = {"command": "kernels", "machine": {"name": "m", "commit": "c", "dirty": False, "device": "cpu"}}
    results = harness.Results(tmp_path / "run.json", header)
    return harness.Run(CPU, torch.float32, backend, True, results, FAST, **kwargs)


# ------------------------------------------------------------------ no number for a wrong result


def softplus_case(contenders: dict) -> Case:
    """x (8, 16) -> softplus(x); each contender is a function of x."""
    x = torch.empty(8, 16)

    def build(function):
        return lambda: Runner(lambda: function(x), lambda: {"y": function(x)})

    return Case(
        "test",
        {"op": "softplus"},
        [Contender("jasper_fast", build(F.softplus)), *(Contender(n, build(f)) for n, f in contenders.items())],
        refill=lambda seed: x.copy_(torch.randn(8, 16, generator=harness.seeded(seed, CPU))),
        reference=lambda: {"y": F.softplus(x.double())},
        low=lambda: {"y": F.softplus(x)},
        flops=1.0,
        nbytes=1.0,
    )


def skipped_row(x):
    y = torch.empty_like(x)
    y[:-1] = F.softplus(x[:-1])  # the last row keeps whatever the allocator left there
    return y


def stale_buffer():
    first = []

    def call(x):
        if not first:
            first.append(F.softplus(x))
        return first[0]

    return call


def stale_after(calls: int):
    """Right while it is checked, and then the same answer for ever: only a check after the timing sees it."""
    seen = []

    def call(x):
        if len(seen) < calls:
            seen.append(F.softplus(x))
        return seen[-1]

    return call


WRONG = {
    "scaled": lambda: lambda x: F.softplus(x) * 1.001,
    "one element": lambda: lambda x: F.softplus(x).index_fill(0, torch.tensor([3]), 0.5),
    "skipped row": lambda: skipped_row,
    "stale buffer": stale_buffer,
    "stale after the check": lambda: stale_after(3),
    "NaN": lambda: lambda x: F.softplus(x).masked_fill(x == x.max(), math.nan),
    "shape": lambda: lambda x: F.softplus(x)[:, :8],
    "nothing written": lambda: torch.empty_like,
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_kernel_gets_no_number(fault, tmp_path):
    run = make_run(tmp_path)
    rows = {
        r["contender"]: r for r in run.cases("test", [softplus_case({"wrong": WRONG[fault](), "eager": F.softplus})])
    }
    assert rows["wrong"]["status"] == "wrong" and rows["wrong"]["why"].startswith("y:")
    assert not {"time_s", "ratio", "flops_per_s", "bytes_per_s"} & set(rows["wrong"])
    assert rows["eager"]["status"] == rows["jasper_fast"]["status"] == "ok"
    assert rows["eager"]["ratio"]["low"] <= rows["eager"]["ratio"]["median"] <= rows["eager"]["ratio"]["high"]


def test_absent_and_failing_rivals_are_rows_that_say_so(tmp_path):
    def absent():
        raise harness.Absent("get it so")

    def broken(x):
        raise RuntimeError("no kernel for this shape")

    case = softplus_case({"broken": broken})
    case.contenders = [*case.contenders, Contender("absent", absent)]
    rows = {r["contender"]: r for r in make_run(tmp_path).cases("test", [case])}
    assert (rows["absent"]["status"], rows["absent"]["why"]) == ("absent", "get it so")
    assert rows["broken"]["status"] == "failed" and "no kernel for this shape" in rows["broken"]["why"]
    assert rows["jasper_fast"]["status"] == "ok"


FAULTY_CHAINS = {
    "scaled": lambda z, y: z * 1.001,
    "no mask": lambda z, y: z + 0.25 * (z == 0),
    "skipped row": lambda z, y: z * (torch.arange(z.shape[2]) != 5),
}


@pytest.mark.parametrize("fault", FAULTY_CHAINS)
def test_faulty_bn_relu_dropout_is_refused(fault, tmp_path):
    def chain(y, gamma, beta, running, residual, lengths, p):
        return FAULTY_CHAINS[fault](kernels.eager_chain(y, gamma, beta, running, residual, lengths, p), y)

    run = make_run(tmp_path)
    case = kernels.bn_relu_dropout(run, (2, 8, 40), "both", False, False)
    inputs = kernels.Inputs(2, 8, 40, torch.float32, CPU, False)
    case.refill, case.reference = inputs.refill, lambda: kernels.answer(inputs, torch.float64)
    case.low = lambda: kernels.answer(inputs, torch.float32)
    case.contenders = [
        Contender("jasper_fast", lambda: kernels.runner(chain, inputs, "nct", "both", 0.2)),
        Contender("eager", lambda: kernels.runner(kernels.eager_chain, inputs, "nct", "both", 0.2)),
    ]
    rows = {r["contender"]: r for r in run.cases("test", [case])}
    assert rows["jasper_fast"]["status"] == "wrong"
    assert rows["eager"]["status"] == "ok" and "ratio" not in rows["eager"]


@pytest.mark.parametrize("fault", ["rate", "scale", "gradient"])
def test_faulty_dropout_is_refused(fault):
    inputs = kernels.Inputs(4, 64, 200, torch.float32, CPU, False)

    def chain(y, gamma, beta, running, residual, lengths, p):
        if p == 0 or fault == "gradient":
            z = kernels.eager_chain(y, gamma, beta, running, residual, lengths, 0.0)
        if p == 0:
            return z
        if fault == "rate":
            return kernels.eager_chain(y, gamma, beta, running, residual, lengths, 0.15) * (0.85 / 0.8)
        if fault == "scale":
            return kernels.eager_chain(y, gamma, beta, running, residual, lengths, p) * (1 - p)
        dropped = F.dropout(z.detach(), p, True)
        return dropped + (z - z.detach())  # values right, the gradient ignores the mask

    runner = kernels.runner(chain, inputs, "nct", "both", 0.2)
    assert not correct.complaints(
        runner.outputs(),
        kernels.answer(inputs, torch.float32),
        kernels.answer(inputs, torch.float64),
        kernels.TOLERANCE,
    )
    found = runner.extra()
    assert found and all(line.startswith("dropout on: ") for line in found)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_contenders_of_bn_relu_dropout_are_right(residual, dtype, tmp_path):
    run = make_run(tmp_path)
    run.dtype = dtype
    rows = run.cases(
        "test", [kernels.bn_relu_dropout(run, (3, 16, 57), mode, residual, False) for mode in kernels.MODES]
    )
    assert len(rows) == 9 and all(r["status"] == "ok" for r in rows), [r.get("why") for r in rows]


LAYERS = [
    sub_blocks.Layer(16, 24, 11),
    sub_blocks.Layer(8, 8, 5, dilation=2),
    sub_blocks.Layer(16, 29, 1, head=True),
    sub_blocks.Layer(16, 24, 11, stride=2),
]


@pytest.mark.parametrize("op", ["conv1d", "sub_block"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_all_contenders_of_convs_are_right(op, backend, tmp_path):
    make_face(backend)
    run = make_run(tmp_path, backend=backend)
    modes = (*sub_blocks.MODES, "inference") if op == "sub_block" else sub_blocks.MODES
    rows = [row for layer in LAYERS for row in run.cases("test", sub_blocks.layer_cases(run, op, 2, 40, layer, modes))]
    assert len(rows) == len(LAYERS) * len(modes) * 3
    assert all(r["status"] == "ok" for r in rows), [(r["id"], r.get("why")) for r in rows if r["status"] != "ok"]
    assert len({r["id"] for r in rows}) == len(rows)


@pytest.mark.parametrize("mode", ["both", "inference"])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.bfloat16), ("triton", torch.float16)])
def test_sub_blocks_under_amp_are_right(mode, backend, dtype, tmp_path):
    """fp32 master weights beside 16-bit activations, eager under autocast; the prologue reads fp32 features."""
    make_face(backend)
    run = make_run(tmp_path, backend=backend)
    run.dtype = dtype
    rows = [r for a in LAYERS for r in run.cases("test", sub_blocks.layer_cases(run, "sub_block", 2, 40, a, (mode,)))]
    assert len(rows) == 12 and all(r["status"] == "ok" for r in rows), [(r["id"], r.get("why")) for r in rows]


def test_a_wrong_sub_block_is_refused_in_every_mode(tmp_path, monkeypatch):
    """An output scaled by 1.01 is no sub-block, in training or in inference."""
    right, folded = sub_blocks.fused_sub_block, sub_block_inference.fused
    monkeypatch.setattr(sub_blocks, "fused_sub_block", lambda b: lambda *a: right(b)(*a) * 1.01)
    monkeypatch.setattr(sub_block_inference, "fused", lambda i, b: lambda *a: folded(i, b)(*a) * 1.01)
    run = make_run(tmp_path)
    modes = (*sub_blocks.MODES, "inference")
    rows = run.cases("test", sub_blocks.layer_cases(run, "sub_block", 2, 40, LAYERS[0], modes))
    assert {r["key"]["mode"]: r["status"] for r in rows if r["ours"]} == dict.fromkeys(modes, "wrong")
    assert all(r["status"] == "ok" and "ratio" not in r for r in rows if not r["ours"])


def test_rivals_of_sub_blocks_that_this_machine_lacks_are_rows_that_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "needs_compiler", lambda: (_ for _ in ()).throw(harness.Absent("no compiler")))
    run = make_run(tmp_path, rivals="all")
    rows = run.cases("test", sub_blocks.layer_cases(run, "sub_block", 2, 40, LAYERS[0], ("forward", "inference")))
    by_name = {(r["key"]["mode"], r["contender"]): r for r in rows}
    for mode in ("forward", "inference"):
        assert by_name[mode, "compile_max_autotune"]["why"] == "no compiler"
        assert by_name[mode, "cudnn"]["status"] == "absent" and "NVIDIA GPU" in by_name[mode, "cudnn"]["why"]
        assert by_name[mode, "jasper_fast"]["status"] == by_name[mode, "eager"]["status"] == "ok"


def test_conv_shapes_are_jasper_10x5s():
    shapes = sub_blocks.layers()
    assert len(shapes) == 13 and shapes[:2] == [
        sub_blocks.Layer(768, 896, 29, dilation=2),
        sub_blocks.Layer(768, 768, 25),
    ]
    assert sub_blocks.Layer(64, 256, 11, stride=2) in shapes
    assert shapes[-1] == sub_blocks.Layer(1024, 29, 1, head=True)
    lengths = torch.tensor([1, 2, 7, 33])
    for layer in shapes:
        assert layer.out_lengths(lengths).tolist() == [layer.frames(t) for t in lengths.tolist()]


# ------------------------------------------------------------------ statistics


def test_ratio_is_pair_by_pair_and_its_interval_holds_the_truth():
    g = torch.Generator().manual_seed(0)
    drift = torch.linspace(1.0, 3.0, 60)  # the machine slows down threefold during the run
    ours = (drift * (1 + 0.02 * torch.randn(60, generator=g))).tolist()
    rival = (1.5 * drift * (1 + 0.02 * torch.randn(60, generator=g))).tolist()
    found = harness.ratio(rival, ours)
    assert found["low"] <= 1.5 <= found["high"] and found["high"] - found["low"] < 0.05 and found["pairs"] == 60


def test_a_second_visit_widens_the_interval_to_what_both_would_have_said():
    first = {"ours": [1.0, 1.0, 1.0, 1.0], "eager": [2.0, 2.0, 2.0, 2.0]}
    second = {"ours": [1.0, 1.0], "eager": [2.4, 2.4]}  # the machine in another mood
    assert harness.ratio_of_visits([first], "eager", "ours") == harness.ratio(first["eager"], first["ours"])
    found = harness.ratio_of_visits([first, second], "eager", "ours")
    assert (found["low"], found["median"], found["high"]) == (2.0, 2.0, pytest.approx(2.4))
    assert (found["pairs"], found["visits"]) == (6, 2)


def test_a_run_comes_back_to_its_cases(tmp_path):
    run = make_run(tmp_path, revisits=True)
    released, broken = [], []
    later = lambda x: F.softplus(x) * (1.001 if broken else 1.0)  # noqa: E731
    cases = [softplus_case({"twin": F.softplus}), softplus_case({"scaled later": later})]
    cases[1].key["op"] = "again"
    run.cases("test", cases)
    run.close(lambda: released.append(True))
    once = {r["id"]: r for r in run.results.data["rows"]}
    assert all(r["status"] == "ok" for r in once.values()) and not released and len(run.kept) == 2
    broken.append(True)
    run.revisit()
    twice = {r["id"]: r for r in run.results.data["rows"]}
    assert twice.keys() == once.keys() and released and not run.kept and not any(case.runners for case in cases)
    twin = twice["test op=softplus / twin"]
    assert twin["ratio"]["visits"] == 2 and "visits" not in once["test op=softplus / twin"]["ratio"]
    assert twin["time_s"]["samples"] > once["test op=softplus / twin"]["time_s"]["samples"]
    # right in the first visit and wrong in the second: no number stays
    assert twice["test op=again / scaled later"]["status"] == "wrong"


def test_backward_alone_is_timed_in_both_visits(tmp_path):
    run = make_run(tmp_path, revisits=True)
    run.cases("test", [kernels.bn_relu_dropout(run, (2, 8, 16), "backward", False, False)])
    run.revisit()
    found = run.results.data["rows"]
    assert len(found) == 3 and [r["status"] for r in found] == ["ok"] * 3, [r.get("why") for r in found]
    assert all(r["ratio"]["visits"] == 2 for r in found if not r["ours"])


def test_quantiles():
    assert harness.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert harness.quantile([5.0], 0.99) == 5.0
    s = harness.summary([1.0, 2.0, 3.0, 4.0, 5.0], 1)
    assert s["median"] == s["p50"] == 3.0 and s["p20"] == pytest.approx(1.8) and s["min"] == 1.0


# ------------------------------------------------------------------ counts


@pytest.fixture(scope="module")
def jasper10x5():
    config = models.config("jasper10x5")
    with torch.device("meta"):
        model = EagerJasper(config).eval()
    return config, model


def test_every_conv_of_jasper_10x5_is_counted_as_pytorch_counts_it(jasper10x5):
    config, model = jasper10x5
    N, T, seen = 3, 416, {}

    def hook(name):
        def record(module, inputs, output):
            tensors = (inputs[0], *module.parameters(), output)
            seen[name] = (
                sum(p.numel() for p in module.parameters()),
                4 * sum(t.numel() for t in tensors),
                output.shape[2],
            )

        return record

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_hook(hook(name))
    flops = FlopCounterMode(display=False, depth=8)
    with flops, torch.device("meta"):
        model(torch.empty(N, 64, T), torch.empty(N, dtype=torch.int64))
    by_module = {k.removeprefix("EagerJasper."): v for k, v in flops.get_flop_counts().items()}
    ours = {conv.name: conv for conv in counts.convs(config, N, T)}
    assert list(ours) == list(seen) and len(ours) == 109
    for name, conv in ours.items():
        bias = conv.N * conv.T_out * conv.C_out if conv.bias else 0  # PyTorch leaves the bias out
        assert sum(by_module[name].values()) == conv.flops - bias, name
        assert (conv.weights, conv.nbytes(4), conv.T_out) == seen[name], name


def test_jasper_10x5_totals(jasper10x5):
    config, model = jasper10x5
    assert counts.parameters(config) == sum(p.numel() for p in model.parameters()) == 332_632_349
    assert counts.forward_flops(config, 1, 1680) / 840 == pytest.approx(0.665e9, rel=1e-3)
    assert counts.forward_flops(config, 1, 208) == pytest.approx(69e9, rel=0.01)


def test_training_flops_are_pytorchs(jasper10x5):
    config = models.config("small")
    model = EagerJasper(config)
    flops = FlopCounterMode(display=False)
    x, lengths = models.features(config, 2, 64, CPU, 0, ragged=True)
    with flops:
        model(x, lengths)[0].square().sum().backward()
    bias = 2 * 32 * models.VOCABULARY
    assert counts.training_flops(config, 2, 64) == flops.get_total_flops() + 3 * bias


# ------------------------------------------------------------------ memory


class Keeper(torch.autograd.Function):
    """Saves one tensor for backward, stashes another on itself, and lets a third go."""

    stash: list = []

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 2)
        Keeper.stash.append(torch.zeros(100))
        return (x + torch.ones_like(x)).sum()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def test_kept_bytes_are_counted_however_held():
    x = torch.randn(1000, requires_grad=True)
    Keeper.stash.clear()
    nbytes, births, loss = memory.kept(lambda: Keeper.apply(x), CPU)
    assert nbytes == 4 * (1000 + 100 + 1)  # saved, stashed, the loss
    assert births.peak >= 4 * 3000
    loss.backward()
    Keeper.stash.clear()


def test_kept_bytes_of_a_plain_graph():
    layer = torch.nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8)
    nbytes, _, _ = memory.kept(lambda: layer(x).relu().exp().sum(), CPU)
    assert nbytes == 4 * (2 * 4 * 16 + 1)  # relu's and exp's outputs, and the loss; x and the weight are older


# ------------------------------------------------------------------ rivals and inputs


def test_rivals_compute_what_eager_computes():
    config = models.config("small")
    model = models.eager(config, models.weights(config, CPU, 64)).eval()
    x, lengths = models.features(config, 2, 64, CPU, 1)
    with torch.no_grad():
        want, out_lengths = model(x, lengths)
        for build in (rivals.eager_no_masks, rivals.ChannelsLast2d):
            got, got_lengths = build(model)(x, lengths)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
            assert torch.equal(got_lengths, out_lengths)
    assert want.std() > 0.3, "activations vanished: a wrong layer would not show"
    assert model.config.encoder.use_conv_masks


def test_dropout_off_and_on_again():
    model = EagerJasper(models.config("small")).train()
    x, lengths = models.features(model.config, 2, 64, CPU, 1)
    with models.dropout_off(model):
        assert torch.equal(model(x, lengths)[0], model(x, lengths)[0])
    assert not torch.equal(model(x, lengths)[0], model(x, lengths)[0])


def test_unknown_rival_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no rival 'nobody'"):
        rivals.choose("inference", CPU, "nobody")
    assert rivals.only("training", "eager,cuda_graph") == rivals.only("training", "cuda_graph") == "eager"
    assert rivals.only("inference", "eager,cuda_graph") == "eager,cuda_graph"
    with pytest.raises(ValueError, match="no rival 'nobody'"):
        rivals.only("training", "eager,nobody")
    monkeypatch.setattr(limits, "measure", lambda *_: {})
    with pytest.raises(SystemExit, match="--rivals: no rival 'nobody' for training; known: eager"):
        cli.main(["train", "--device", "cpu", "--rivals", "nobody", "--out", str(tmp_path)])


# ------------------------------------------------------------------ results on disk


def test_run_cut_off_keeps_its_rows_and_resumes(tmp_path):
    def cases(later):
        made = [softplus_case({"eager": F.softplus}) for _ in range(3)]
        for i, case in enumerate(made):
            case.key = {"op": f"softplus{i}"}
        made[1].contenders = [*made[1].contenders, Contender("later", later)]
        return made

    def cut():
        raise KeyboardInterrupt

    run = make_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.cases("test", [cases(None)[0]]), run.cases("test", cases(cut))
    on_disk = json.loads(run.results.path.read_text())
    assert {r["key"]["op"] for r in on_disk["rows"]} == {"softplus0"} and not on_disk["finished"]

    header = {k: on_disk[k] for k in ("command", "machine")}
    again = harness.Run(
        CPU, torch.float32, "reference", True, harness.Results(run.results.path, header, resume=True), FAST
    )
    built = []
    rows = again.cases("test", cases(lambda: built.append(1) or Runner(lambda: None, lambda: {})))
    assert {r["key"]["op"] for r in rows} == {"softplus1", "softplus2"} and built == [1]
    assert {r["key"]["op"] for r in json.loads(run.results.path.read_text())["rows"]} == {
        "softplus0",
        "softplus1",
        "softplus2",
    }
    again.results.data["arguments"] = {"backend": "reference", "dtype": "None"}
    again.results.write()
    for other in (
        header | {"machine": header["machine"] | {"commit": "another"}},
        header | {"arguments": {"backend": "cpu", "dtype": "None"}},
    ):
        assert not harness.unfinished(run.results.path, other)
        assert not harness.Results(run.results.path, other, resume=True).data["rows"]


def test_deadline_stops_the_run(tmp_path):
    run = make_run(tmp_path, deadline=0.0)
    assert run.out_of_time() and run.cases("test", [softplus_case({})]) == []


# ------------------------------------------------------------------ everything in nine minutes


def measured(op):
    def part(run):
        case = softplus_case({"eager": F.softplus})
        case.key = {"op": op}
        run.cases("test", [case])

    return part


def endless_compiler(run):
    while True:
        time.sleep(0.01)


def failing(run):
    raise ValueError("no such kernel")


def test_gpu_plan_is_bounded_written_as_it_goes_and_resumed(tmp_path, monkeypatch):
    whole = gpu.BUDGET
    plan = [
        gpu.Part("first", whole, measured("a")),
        gpu.Part("failing", whole, failing),
        gpu.Part("compile", 0.1 * whole, endless_compiler),
        gpu.Part("second", whole, measured("b")),
        gpu.Part("endless too", whole, endless_compiler),
        gpu.Part("last", whole, measured("c")),
    ]
    monkeypatch.setattr(gpu, "plan", lambda run: plan)
    monkeypatch.setattr(gpu, "GOOD", 0.5)
    monkeypatch.setattr(harness, "tidy", lambda device: None)  # a collection takes its time in a process full of tests
    run = make_run(tmp_path)
    gpu.main(run, time.monotonic() - run.started + 10.0)
    parts = json.loads(run.results.path.read_text())["parts"]
    assert parts == {
        "first": "finished",
        "failing": "failed: ValueError: no such kernel",
        "compile": "cut off",  # by its own share of the time: the next one still had its turn
        "second": "finished",
        "endless too": "cut off",
        "last": "no time left",
    }

    header = {k: run.results.data[k] for k in ("command", "machine")}
    again = dataclasses.replace(
        run, results=harness.Results(run.results.path, header, resume=True), started=time.monotonic()
    )
    plan[0] = gpu.Part("first", whole, failing)  # finished before: must not run again
    plan[2] = gpu.Part("compile", whole, measured("compiled"))
    plan[4] = gpu.Part("endless too", whole, measured("d"))
    gpu.main(again)
    on_disk = json.loads(run.results.path.read_text())
    assert {title for title, how in on_disk["parts"].items() if how != "finished"} == {"failing"}
    assert {r["key"]["op"] for r in on_disk["rows"]} == {"a", "b", "c", "d", "compiled"}


def test_a_part_that_was_cut_off_goes_on_when_the_others_are_done(tmp_path, monkeypatch):
    calls = []

    def slow_at_first(run):
        calls.append(run.deadline - time.monotonic())
        if len(calls) == 1:
            endless_compiler(run)
        measured("slow")(run)

    plan = [gpu.Part("slow", 0.05 * gpu.BUDGET, slow_at_first), gpu.Part("other", gpu.BUDGET, measured("other"))]
    monkeypatch.setattr(gpu, "plan", lambda run: plan)
    monkeypatch.setattr(gpu, "GOOD", 0.1)
    run = make_run(tmp_path)
    gpu.main(run, time.monotonic() - run.started + 20.0)
    data = json.loads(run.results.path.read_text())
    assert data["parts"] == {"slow": "finished", "other": "finished"}
    assert [r["key"]["op"] for r in data["rows"]][::2] == ["other", "slow"]
    assert calls[0] < 1.5 < calls[1]


def test_the_self_check_s_verdict_is_in_the_result(tmp_path, monkeypatch):
    from jasper_fast import selfcheck

    row = {"op": "conv1d", "face": "triton", "function": "forward", "variant": "", "configuration": "t128", "id": "1"}
    row |= {"shape": "(1, 2, 3)", "dtype": "float16", "detail": "error 2.0", "status": "wrong"}

    def supervise(device, quick, report):
        report.planned, report.found = [row], {row["id"]: row}

    monkeypatch.setattr(selfcheck, "supervise", supervise)
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    run = make_run(tmp_path)
    gpu.selfcheck(run, quick=True)
    told = json.loads(run.results.path.read_text())["selfcheck"]
    assert told["verdicts"][0]["quick"] and told["verdicts"][0]["status"] == "bad"
    assert "error 2.0" in told["failures"][0]


def test_gpu_run_killed_in_the_middle_leaves_its_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--quick", "--backend", "reference"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not any(
            json.loads(p.read_text())["rows"] for p in tmp_path.glob("gpu_*.json")
        ):
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    (path,) = tmp_path.glob("gpu_*.json")
    data = json.loads(path.read_text())
    assert data["rows"] and data["limits"] and not data["finished"]
    assert all(row["status"] == "ok" for row in data["rows"]), [row.get("why") for row in data["rows"]]
    assert harness.unfinished(path, data)


# ------------------------------------------------------------------ launches and profiles


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


# ------------------------------------------------------------------ command line and report


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A real, tiny run of the command line."""
    out = tmp_path_factory.mktemp("bench")
    shapes, kernels.CPU_SHAPES = kernels.CPU_SHAPES, ((2, 8, 40), (2, 16, 40))
    try:
        arguments = [
            "kernels",
            "--op",
            "bn_relu_dropout",
            "--device",
            "cpu",
            "--quick",
            "--backend",
            "reference",
            "--seconds",
            "0.05",
        ]
        assert cli.main([*arguments, "--out", str(out)]) == 0
    finally:
        kernels.CPU_SHAPES = shapes
    (path,) = out.glob("kernels_*.json")
    return path


def test_result_says_how_to_repeat_it(result):
    data = json.loads(result.read_text())
    assert data["finished"] and data["schema"] == 1
    assert data["machine"]["packages"]["torch"] and data["machine"]["threads"] and data["machine"]["cpu"]["cores"]
    assert data["limits"]["matmul_flops_per_s"]["float32"] > 1e9 and data["limits"]["copy_bytes_per_s"] > 1e8
    for row in data["rows"]:
        assert row["status"] == "ok" and row["limit"]["share"] > 0 and row["time_s"]["samples"] >= 3, row
    assert len({row["id"] for row in data["rows"]}) == len(data["rows"]) == 9


def test_report_is_one_page_that_needs_nothing_else(result, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["report", str(result), str(result), "--html", str(page)]) == 0
    html = page.read_text()
    assert not re.search(r'(?:src|href)="|url\(|@import|https?://', html)
    for part in (
        "<svg",
        "viewport",
        "prefers-color-scheme: dark",
        "Comparison",
        "Every timed row",
        "Not measured here",
    ):
        assert part in html
    assert html.count("<table>") == html.count("</table>") and html.count("<svg") == html.count("</svg>")
    assert "nan" not in re.findall(r'="([^"]*)"', html)


def test_report_refuses_what_is_no_result(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(SystemExit, match="not a result"):
        report.main([other], None, False)


def goal_rows() -> list[dict]:
    rows = []
    for goal, value in zip(goals.CPU_GOALS, (4.5, 3.0, 1.1, 1.2, 0.3), strict=True):
        for name in ("jasper_fast", "eager"):
            row = {
                "id": f"{goal.name} / {name}",
                "bench": goal.bench,
                "key": dict(goal.key),
                "contender": name,
                "ours": name != "eager",
                "status": "ok",
            }
            row["dtype"], row["bytes"], row["flops"] = "float32", 1, 1
            if goal.bench == "memory":
                row["memory"] = {"kept_bytes": 2**20, "peak_bytes": 2**20} | (
                    {"ours_over_kept": value} if name == "eager" else {}
                )
            else:
                row["time_s"] = harness.summary([0.001, 0.002], 1)
                if name == "eager":
                    row["ratio"] = {"median": value, "low": value - 0.1, "high": value + 0.1}
            rows.append(row)
    return rows


def test_goals_are_judged_from_the_rows():
    found = goals.judge(goal_rows(), "cpu")
    assert [g["met"] for g in found] == [True, False, True, True, True]
    assert goals.judge([], "cpu") == goals.judge([], "cuda") == []


def gpu_row(goal: goals.Goal, contender: str, **more) -> dict:
    case = goal.bench + " " + " ".join(f"{k}={v}" for k, v in goal.key.items())
    key = {"shape": "any"} | goal.key
    row = {"id": f"{case} / {contender}", "bench": goal.bench, "key": key, "contender": contender}
    return row | {"ours": contender == "jasper_fast", "status": "ok", "time_s": harness.summary([0.001], 1)} | more


def test_gpu_goals_hold_shares_of_the_limit_and_the_best_rival():
    by_name = {g.name: g for g in goals.gpu_goals()}
    assert len(by_name) == 11 and sum(isinstance(g, goals.ShareOfLimit) for g in by_name.values()) == 7
    conv = next(g for n, g in by_name.items() if n.startswith("conv1d 768->896"))
    rows = [gpu_row(conv, "jasper_fast", limit={"bound": "compute", "share": 0.74}), gpu_row(conv, "eager")]
    (found,) = goals.judge(rows, "cuda")
    assert found["measured"] == 0.74 and not found["met"] and found["row"] == rows[1]["id"]
    rows[0]["limit"]["share"] = 0.76
    assert goals.judge(rows, "cuda")[0]["met"]

    race = next(g for n, g in by_name.items() if n.startswith("sub-blocks, backward"))
    ratio = {"median": 1.5, "low": 1.4, "high": 1.6}
    rows = [gpu_row(race, "jasper_fast"), gpu_row(race, "eager", ratio=ratio)]
    (found,) = goals.judge(rows, "cuda")
    assert found["met"] and found["measured"] == 1.5
    rows.append(gpu_row(race, "cudnn", ratio=ratio | {"median": 0.9}))
    (found,) = goals.judge(rows, "cuda")
    assert not found["met"] and found["measured"] == 0.9 and found["row"].endswith("/ cudnn")
    rows[0]["status"] = "wrong"
    (found,) = goals.judge(rows, "cuda")
    assert found["measured"] is None and not found["met"]


def test_gpu_goals_are_about_cases_that_the_plan_measures(tmp_path):
    """A goal whose key no case has would never be judged."""
    run = make_run(tmp_path)
    run.device, run.dtype = torch.device("cuda"), torch.float16
    cases = [kernels.bn_relu_dropout(run, s, "both", False, False) for s in kernels.GPU_SHAPES[:2]]
    for layer in sub_blocks.layers():
        N, T = sub_blocks.batch(run, layer)
        modes = ("forward", "backward", "inference")
        cases += sub_blocks.layer_cases(run, "sub_block", N, T, layer, modes)
        cases += sub_blocks.layer_cases(run, "conv1d", N, T, layer, ("forward",))
    for goal in goals.gpu_goals():
        about = [c for c in cases if goal.matches({"bench": c.bench, "key": c.key})]
        wanted = 13 if isinstance(goal, goals.NeverSlower) else 0 if goal.bench == "memory" else 1
        assert len(about) == wanted, goal.name


def test_readme_table_goes_between_its_markers(result, tmp_path):
    data = json.loads(result.read_text())
    data["rows"] = goal_rows()
    path, readme = tmp_path / "r.json", tmp_path / "README.md"
    path.write_text(json.dumps(data))
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    assert report.write_readme([path], readme) == 0
    once = readme.read_text()
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "old" not in once
    assert once.count("\n|---") == 1 and "4.50x [4.40, 4.60]" in once and "0.30 of eager's" in once
    report.write_readme([path], readme)
    assert readme.read_text() == once
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="markers"):
        report.write_readme([path], readme)


@pytest.mark.parametrize("command", [*cli.SUBCOMMANDS, "compile", "report"])
def test_every_subcommand_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out
