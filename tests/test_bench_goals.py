"""Goals are judged from a run's rows, and every goal refers to a case that a run measures."""

from __future__ import annotations

import torch
from bench_runs import goal_rows, make_run

from jasper_fast.bench.cases import bn_relu_dropout, by_layer, common
from jasper_fast.bench.cases.layers import layers
from jasper_fast.bench.harness import ratios
from jasper_fast.bench.report import goals


def test_goals_are_judged_from_the_rows():
    found = goals.judge(goal_rows(), "cpu")
    assert [g["met"] for g in found] == [True, False, True, True, True, True, True, False, True]
    assert goals.judge([], "cpu") == goals.judge([], "cuda") == []


def gpu_row(goal: goals.Goal, contender: str, **more) -> dict:
    case = goal.bench + " " + " ".join(f"{k}={v}" for k, v in goal.key.items())
    key = {"shape": "any"} | goal.key
    row = {"id": f"{case} / {contender}", "bench": goal.bench, "key": key, "contender": contender}
    return row | {"ours": contender == "jasper_fast", "status": "ok", "time_s": ratios.summary([0.001], 1)} | more


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
    """Shows that the key of every GPU goal belongs to a case of the plan. Otherwise the goal would never be judged."""
    run = make_run(tmp_path)
    run.device, run.dtype = torch.device("cuda"), torch.float16
    cases = [bn_relu_dropout.case(run, s, "both", False, False) for s in bn_relu_dropout.GPU_SHAPES[:2]]
    for layer in layers():
        N, T = common.batch(run, layer)
        modes = ("forward", "backward", "inference")
        cases += by_layer.layer_cases(run, "sub_block", N, T, layer, modes)
        cases += by_layer.layer_cases(run, "conv1d", N, T, layer, ("forward",))
    for goal in goals.gpu_goals():
        about = [c for c in cases if goal.matches({"bench": c.bench, "key": c.key})]
        wanted = 13 if isinstance(goal, goals.NeverSlower) else 0 if goal.bench == "memory" else 1
        assert len(about) == wanted, goal.name
