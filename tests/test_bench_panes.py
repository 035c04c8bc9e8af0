"""Panes in `python -m bench kernels`: which answers are wrong, what their time includes, and which cases run."""

import collections
import dataclasses
import functools
import itertools

import pytest
import torch
from bench_runs import CPU, make_run
from conftest import make_face
from standins import wrap
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast import ops
from jasper_fast.bench.cases import common, panes
from jasper_fast.bench.cases.layers import layers
from jasper_fast.bench.commands import kernels
from jasper_fast.bench.gpu import warm
from jasper_fast.bench.rivals import choice

BLOCK = panes.Block((16, 24, 9), 20)


def statuses(rows: list[dict]) -> dict[tuple[str, str], str]:
    return {(r["key"]["mode"], r["contender"]): r["status"] for r in rows}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_forms_and_the_eager_rivals_are_right_in_every_mode(dtype, tmp_path):
    """At this size the plain form in 16 bits would fail if its backward rounded dy before scaling it by gamma*rstd."""
    make_face("cpu")
    run = make_run(tmp_path, backend="auto", dtype=dtype)
    rows = run.cases("test", panes.block_cases(run, dataclasses.replace(BLOCK, C_out=64), common.MODES, 4, 400))
    names = ("jasper_fast", "jasper_fast_gram", "eager", "eager_2d_channels_last")
    expected = {(mode, name): "ok" for mode in common.MODES for name in names}
    assert statuses(rows) == expected, [(r["id"], r["why"]) for r in rows if r["status"] != "ok"]
    assert all(r["dtype"] == str(dtype).removeprefix("torch.") for r in rows)


def wide_matrices(gram, x):
    return gram(x)._replace(cov=gram(x).cov * 1.05)


def a_wide_pane(panes_plain, xs, weights, gammas, betas, **more):
    return panes_plain(xs, weights, [*gammas[:-1], 1.02 * gammas[-1]], betas, **more)


def swapped_statistics(panes_plain, *of, **more):
    out, mean, var = panes_plain(*of, **more)
    return out, mean.flip(0), var


@pytest.mark.parametrize(("op", "fault", "form", "why"), [
    ("gram", wide_matrices, "jasper_fast_gram", "sum"),
    ("panes_plain", a_wide_pane, "jasper_fast", "sum"),
    ("panes_plain", swapped_statistics, "jasper_fast", "running_mean 0"),
])  # fmt: skip
def test_a_wrong_form_has_no_time_in_any_mode(op, fault, form, why, run, monkeypatch):
    wrap(monkeypatch, ops, op, fault)
    rows = run.cases("test", panes.block_cases(run, BLOCK, common.MODES, 2, 40))
    assert all(row["why"].startswith(why) for row in rows if row["status"] == "wrong")
    for (_, name), status in statuses(rows).items():
        assert status == ("wrong" if name == form else "ok"), name


class Calls(TorchDispatchMode):
    """Records the calls of our Gram ops with the number of channels, and of `_foreach_add_` with the number of
    tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith("gram"):
            self.seen.append((name, args[0].shape[1]))
        if name == "_foreach_add_":
            self.seen.append((name, len(args[0])))
        return func(*args, **(kwargs or {}))


CHARGED = {
    "forward": [("gram", 9)],
    "backward": [("gram_backward", 9), ("_foreach_add_", 4)],
    "both": [("gram", 9), ("gram_backward", 9), ("_foreach_add_", 4)],
}


@pytest.mark.parametrize("mode", common.MODES)
def test_a_run_pays_for_the_newest_matrix_and_adds_the_gradients_of_the_older(mode):
    """Four gradients are added to their sums: those of the mean and the covariance of each of the two older inputs."""
    i = panes.Inputs(2, 40, BLOCK, torch.float32, CPU)
    runner = panes.runner(functools.partial(panes.fused, "gram", "auto"), i, "ntc", mode, gram=True)
    runner.run()  # computes the Gram matrices of the older inputs, and the graph for backward
    with Calls() as calls:
        runner.run()
    assert calls.seen == CHARGED[mode]


def test_over_a_network_every_block_output_has_one_matrix():
    found = panes.blocks()
    assert [len(b.widths) for b in found] == list(range(1, 11))
    assert found[-1] == panes.Block((256, 256, 256, 384, 384, 512, 512, 640, 640, 768), 768)
    for before, block in itertools.pairwise(found):
        assert block.widths == (*before.widths, before.C_out), "the newest input is the output of the block before"
    assert panes.ends_and_middle() == [found[9], found[4], found[0]]


@pytest.mark.parametrize("form", panes.FORMS)
def test_a_retained_graph_is_of_the_inputs_as_they_are(form):
    """After a refill, backward must not use the graph and the matrices of the old inputs."""
    i = panes.Inputs(2, 40, BLOCK, torch.float32, CPU)
    made: list[list[torch.Tensor]] = []

    def spying(leaves, lengths, running, older):
        made.append([x.detach().clone() for x in leaves.xs] + [g.mean.detach().clone() for g in older])
        return panes.fused(form, "auto", leaves, lengths, running, older)

    runner = panes.runner(spying, i, "ntc", "backward", gram=form == "gram")
    runner.run()
    runner.run()
    assert len(made) == 1
    i.refill(7)
    runner.run()
    xs, (_, seen) = i.xs("ntc"), made
    assert all(torch.equal(old, x) for old, x in zip(seen, xs, strict=False))
    for mean, x in zip(seen[len(xs) :], xs, strict=False):
        torch.testing.assert_close(mean, x.detach().mean((0, 2)))


# ------------------------------------------------------------------ which cases run


@pytest.fixture
def collect(run):
    def collected(device: str = "cpu", op: str = "all", mode: str | None = None, **changes) -> list:
        collector = warm.Collector(torch.device(device), torch.float32, "triton", False, run.results)
        collector = dataclasses.replace(collector, **changes)
        kernels.main(collector, op, mode)
        return collector.found

    return collected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_shape_of_every_op_is_measured_in_every_mode(device, collect):
    cases, found = collect(device), collections.defaultdict(set)
    for case in cases:
        found[case.key["op"], case.key["shape"]].add(case.key["mode"])
    assert len({case.id for case in cases}) == len(cases)
    for (op, shape), asked in found.items():
        assert asked == {*common.MODES, *(["inference"] if op in ("sub_block", "depthwise") else [])}, (op, shape)
    assert len({case.key["shape"] + case.key["taps"] for case in cases if case.key["op"] == "conv1d"}) == len(layers())
    count = collections.Counter(op for op, _ in found)
    assert (count["bn_relu_dropout"], count["panes"]) == ((7, 3) if device == "cpu" else (9, 10))
    assert count["bn_relu_dropout+residual"] == 1


@pytest.mark.parametrize("op", ["all", "bn_relu_dropout", "conv1d", "sub_block", "panes", "depthwise"])
@pytest.mark.parametrize("mode", [*common.MODES, "inference"])
@pytest.mark.parametrize("quick", [True, False])
def test_one_mode_alone(op, mode, quick, collect):
    cases = collect(op=op, mode=mode, quick=quick)
    assert {case.key["mode"] for case in cases} <= {mode}
    assert bool(cases) == (mode != "inference" or op in ("all", "sub_block", "depthwise"))


def test_a_brief_run_measures_few_cases(collect):
    """`make bench` makes such a run, which may take only ten minutes."""
    assert collections.Counter(case.key["op"] for case in collect(brief=True)) == {
        "bn_relu_dropout": 9,
        "bn_relu_dropout+residual": 1,
        "sub_block": 2,
        "panes": 1,
        "depthwise": 2,
    }
    assert len(collect(quick=True)) == 2 + 1 + 2 + 2 + 1 + 2
    assert collect(rivals="onnxruntime", brief=True), "a brief run may name the rivals of models"


@pytest.mark.parametrize(
    ("wanted", "brief"), [("nonsense", False), ("eager,nonsense", False), ("onnxruntime", False), ("nonsense", True)]
)
def test_a_rival_that_no_op_has_is_an_error_that_names_those_there_are(wanted, brief, collect):
    with pytest.raises(choice.UnknownRival, match=r"(?s)no rival '(nonsense|onnxruntime)'.*known: eager,.*compile"):
        collect(rivals=wanted, brief=brief)


@pytest.mark.parametrize("wanted", ["default", "all", "eager", "eager,compile", "cudnn,compile_max_autotune"])
def test_known_rivals_are_taken(wanted, collect):
    norms, sums = (
        {contender.name for case in collect(rivals=wanted, op=op) for contender in case.contenders}
        for op in ("bn_relu_dropout", "panes")
    )
    assert ("compile" in norms) == (wanted in ("default", "all", "eager,compile"))
    assert ("compile_max_autotune" in sums) == (wanted == "all" or "max_autotune" in wanted)
