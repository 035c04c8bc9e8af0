"""A contender with a wrong answer gets no number, and a rival that is absent or fails gets a row with the reason. If
PyTorch may use TF32, answers of fp32 convs may have the errors of TF32, but no larger ones."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, make_run, softplus_case
from conftest import interpreted, make_face, raising
from standins import wrap

from jasper_fast.bench.cases import bn_relu_dropout, by_layer, common, depthwise, panes, sub_block_inference, sub_blocks
from jasper_fast.bench.cases.layers import Layer, layers
from jasper_fast.bench.harness import correct, limits
from jasper_fast.bench.harness.case import Contender
from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.rivals import compiler


def stale_after(calls: int):
    """Returns a function that gives `calls` right answers, and then repeats the last of them."""
    seen = []

    def call(x):
        if len(seen) < calls:
            seen.append(F.softplus(x))
        return seen[-1]

    return call


WRONG = {
    "scaled": lambda: lambda x: F.softplus(x) * 1.001,
    "one element": lambda: lambda x: F.softplus(x).index_fill(0, torch.tensor([3]), 0.5),
    "skipped row": lambda: lambda x: torch.cat([F.softplus(x[:-1]), torch.empty_like(x[-1:])]),
    "stale buffer": lambda: stale_after(1),
    "stale after the check": lambda: stale_after(3),
    "NaN": lambda: lambda x: F.softplus(x).masked_fill(x == x.max(), math.nan),
    "shape": lambda: lambda x: F.softplus(x)[:, :8],
    "nothing written": lambda: torch.empty_like,
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_kernel_gets_no_number(fault, run):
    case = softplus_case({"wrong": WRONG[fault](), "eager": F.softplus})
    rows = {r["contender"]: r for r in run.cases("test", [case])}
    assert rows["wrong"]["status"] == "wrong" and rows["wrong"]["why"].startswith("y:")
    assert not {"time_s", "ratio", "flops_per_s", "bytes_per_s"} & set(rows["wrong"])
    assert rows["eager"]["status"] == rows["jasper_fast"]["status"] == "ok"
    assert rows["eager"]["ratio"]["low"] <= rows["eager"]["ratio"]["median"] <= rows["eager"]["ratio"]["high"]


def test_absent_and_failing_rivals_are_rows_that_say_so(run):
    case = softplus_case({"broken": raising(RuntimeError("no kernel for this shape"))})
    case = dataclasses.replace(case, contenders=[*case.contenders, Contender("absent", raising(Absent("get it so")))])
    rows = {r["contender"]: r for r in run.cases("test", [case])}
    assert (rows["absent"]["status"], rows["absent"]["why"]) == ("absent", "get it so")
    assert rows["broken"]["status"] == "failed" and "no kernel for this shape" in rows["broken"]["why"]
    assert rows["jasper_fast"]["status"] == "ok"


FAULTY_CHAINS = {
    "scaled": lambda z: z * 1.001,
    "no mask": lambda z: z + 0.25 * (z == 0),
    "skipped row": lambda z: z * (torch.arange(z.shape[2]) != 5),
}


@pytest.mark.parametrize("fault", FAULTY_CHAINS)
def test_faulty_bn_relu_dropout_is_refused(fault, run, monkeypatch):
    wrap(monkeypatch, bn_relu_dropout, "fused", lambda right, *of: FAULTY_CHAINS[fault](right(*of)))
    ours, *others = run.cases("test", [bn_relu_dropout.case(run, (2, 8, 40), "both", False, False)])
    assert ours["status"] == "wrong"
    assert all(r["status"] == "ok" and "ratio" not in r for r in others)


@pytest.mark.parametrize("fault", ["rate", "scale", "gradient"])
def test_faulty_dropout_is_refused(fault):
    inputs = bn_relu_dropout.Inputs(4, 64, 200, torch.float32, CPU, False)

    def chain(*arguments):
        *of, p = arguments
        if p > 0 and fault == "rate":
            return common.eager_chain(*of, 0.15) * (0.85 / 0.8)
        if p > 0 and fault == "scale":
            return common.eager_chain(*of, p) * (1 - p)
        z = common.eager_chain(*of, 0.0)
        return F.dropout(z.detach(), p, True) + (z - z.detach())  # the gradient ignores the dropout mask

    runner = bn_relu_dropout.runner(chain, inputs, "nct", "both", 0.2)
    assert not correct.complaints(
        runner.outputs(),
        bn_relu_dropout.answer(inputs, torch.float32),
        bn_relu_dropout.answer(inputs, torch.float64),
        bn_relu_dropout.TOLERANCE,
    )
    lines = runner.extra()
    assert lines and all(line.startswith("dropout on: ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_all_contenders_of_bn_relu_dropout_are_right(residual, dtype, tmp_path):
    run = make_run(tmp_path, dtype=dtype)
    rows = run.cases("test", [bn_relu_dropout.case(run, (3, 16, 57), mode, residual, False) for mode in common.MODES])
    assert len(rows) == 9 and all(r["status"] == "ok" for r in rows), [r.get("why") for r in rows]


ALL_MODES = (*common.MODES, "inference")
LAYERS = [Layer(16, 24, 11), Layer(8, 8, 5, dilation=2), Layer(16, 29, 1, head=True), Layer(16, 24, 11, stride=2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "backend", "dtype", "modes"),
    [
        ("conv1d", "cpu", torch.float32, common.MODES),
        ("sub_block", "reference", torch.float32, ALL_MODES),
        ("sub_block", "cpu", torch.float32, ALL_MODES),
        ("sub_block", "reference", torch.bfloat16, ("both", "inference")),
        ("sub_block", "triton", torch.float16, ("both", "inference")),
    ],
)
def test_all_contenders_of_convs_are_right(op, backend, dtype, modes, tmp_path):
    interpreted() if backend == "triton" else make_face(backend)
    run = make_run(tmp_path, backend=backend, dtype=dtype)
    shapes = LAYERS[1:] if backend == "triton" else LAYERS
    rows = [row for layer in shapes for row in run.cases("test", by_layer.layer_cases(run, op, 2, 40, layer, modes))]
    assert len(rows) == len(shapes) * len(modes) * 3
    assert all(r["status"] == "ok" for r in rows), [(r["id"], r.get("why")) for r in rows if r["status"] != "ok"]
    assert len({r["id"] for r in rows}) == len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_all_contenders_of_depthwise_convs_are_right(backend, dtype, tmp_path, monkeypatch):
    interpreted() if backend == "triton" else make_face(backend)
    run = make_run(tmp_path, backend=backend, dtype=dtype)
    rows = run.cases("test", [depthwise.case(run, (2, 16, 7, 20), mode) for mode in depthwise.MODES])
    assert len(rows) == 3 * 4 and all(r["status"] == "ok" for r in rows), [r.get("why") for r in rows]
    wrap(monkeypatch, depthwise, "fused", lambda right, *of: right(*of) * (1.01 if dtype == torch.float32 else 2))
    rows = run.cases("test", [depthwise.case(run, (2, 16, 7, 21), mode) for mode in depthwise.MODES])
    assert all(r["status"] == ("wrong" if r["ours"] else "ok") for r in rows), [r.get("why") for r in rows]


@pytest.mark.slow
def test_a_wrong_sub_block_is_refused_in_every_mode(run, monkeypatch):
    ours, *others = sub_blocks.OPS["sub_block"]
    monkeypatch.setitem(sub_blocks.OPS, "sub_block", (lambda *a: ours(*a) * 1.01, *others))
    wrap(monkeypatch, sub_block_inference, "fused", lambda right, *of: lambda *a: right(*of)(*a) * 1.01)
    rows = run.cases("test", by_layer.layer_cases(run, "sub_block", 2, 40, LAYERS[0], ALL_MODES))
    assert {r["key"]["mode"]: r["status"] for r in rows if r["ours"]} == dict.fromkeys(ALL_MODES, "wrong")
    assert all(r["status"] == "ok" and "ratio" not in r for r in rows if not r["ours"])


def test_rivals_that_this_machine_lacks_are_rows_that_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "needs_compiler", raising(Absent("no compiler")))
    run = make_run(tmp_path, rivals="all")
    sub_block = by_layer.layer_cases(run, "sub_block", 2, 40, LAYERS[0], ("forward", "inference"))
    for case in (*sub_block, panes.case(run, 2, 40, panes.Block((16, 24), 20), "both")):
        named = {r["contender"]: r for r in run.cases("test", [case])}
        assert named["compile_max_autotune"]["why"] == "no compiler"
        assert named["jasper_fast"]["status"] == named["eager"]["status"] == "ok"
        if case in sub_block:  # cuDNN has no kernel for panes
            assert named["cudnn"]["status"] == "absent" and "NVIDIA GPU" in named["cudnn"]["why"]


def test_conv_shapes_are_jasper_10x5s():
    shapes = layers()
    assert len(shapes) == 13 and shapes[:2] == [Layer(768, 896, 29, dilation=2), Layer(768, 768, 25)]
    assert Layer(64, 256, 11, stride=2) in shapes and shapes[-1] == Layer(1024, 29, 1, head=True)
    lengths = torch.tensor([1, 2, 7, 33])
    for layer in shapes:
        assert layer.frames(lengths).tolist() == [layer.frames(t) for t in lengths.tolist()]


# ------------------------------------------------------------------ TF32


def cut_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Truncates fp32 to TF32 as tensor cores do: the last 13 bits of the mantissa become zero."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def conv(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.conv1d(x, w, padding=w.shape[2] // 2)


@pytest.mark.parametrize("mode", ["TF32", "IEEE"])
def test_cut_operands_pass_where_tf32_is_allowed_only(mode, run, monkeypatch):
    monkeypatch.setattr(limits, "float32_mode", lambda device: mode)
    x, w = torch.randn(2, 256, 100), torch.randn(64, 256, 11) / 53
    # `low` is not rounded to TF32, because cuDNN may choose a kernel without it.
    low, ref = {"y": conv(x, w)}, {"y": conv(x.double(), w.double())}
    cut = conv(cut_to_tf32(x), cut_to_tf32(w))
    for name, y, wrong in (("cut", cut, mode == "IEEE"), ("low", low["y"], False), ("scaled", 1.005 * cut, True)):
        assert bool(correct.complaints({"y": y}, low, ref, common.tolerance(run))) == wrong, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_have_their_own_rounding(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "float32_mode", lambda device: "TF32")
    assert common.tolerance(make_run(tmp_path, dtype=dtype)) is common.CONV_TOLERANCE
