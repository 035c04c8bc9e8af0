"""Goals are judged from a run's rows, and goals for a GPU refer to cases that its plan measures."""

import pytest
import torch
from bench_runs import CUDA, RATIO, goal_rows, make_run, row

from jasper_fast.bench.cases import bn_relu_dropout, by_layer, common
from jasper_fast.bench.cases.layers import layers
from jasper_fast.bench.report import goals


def test_goals_are_judged_from_the_rows():
    met = [verdict["met"] for verdict in goals.judge(goal_rows(), "cpu")]
    assert met == [True, False, True, True, True, True, True, False, True]
    assert goals.judge([], "cpu") == goals.judge([], "cuda") == []


OURS, EAGER, CUDNN = ("jasper_fast", {}), ("eager", {}), ("cudnn", {"ratio": RATIO | {"median": 0.9}})


@pytest.mark.parametrize(
    ("name", "rows", "measured", "met", "about"),
    [
        ("conv1d 768->896", [("jasper_fast", {"limit": {"share": 0.74}}), EAGER], 0.74, False, "eager"),
        ("conv1d 768->896", [("jasper_fast", {"limit": {"share": 0.76}}), EAGER], 0.76, True, "eager"),
        ("sub-blocks, backward", [OURS, EAGER], 1.5, True, "eager"),
        ("sub-blocks, backward", [OURS, EAGER, CUDNN], 0.9, False, "cudnn"),
        ("sub-blocks, backward", [("jasper_fast", {"status": "wrong"}), EAGER], None, False, "eager"),
    ],
)
def test_gpu_goals_hold_shares_of_the_limit_and_the_best_rival(name, rows, measured, met, about):
    known = goals.gpu_goals()
    assert len({g.name for g in known}) == 11 and sum(isinstance(g, goals.ShareOfLimit) for g in known) == 7
    goal = next(g for g in known if g.name.startswith(name))
    key = {"shape": "any"} | goal.key
    (found,) = goals.judge([row(goal.bench, contender, key, **more) for contender, more in rows], "cuda")
    assert (found["measured"], found["met"]) == (measured, met) and found["row"].endswith(f" / {about}")


def test_gpu_goals_are_about_cases_that_the_plan_measures(tmp_path):
    """Shows that the key of every GPU goal, except that of memory, belongs to a case of the plan. Otherwise the goal
    would never be judged."""
    run = make_run(tmp_path, device=CUDA, dtype=torch.float16)
    cases = [bn_relu_dropout.case(run, s, "both", False, False) for s in bn_relu_dropout.GPU_SHAPES[:2]]
    for layer in layers():
        for op, modes in (("sub_block", ("forward", "backward", "inference")), ("conv1d", ("forward",))):
            cases += by_layer.layer_cases(run, op, *common.batch(run, layer), layer, modes)
    for goal in goals.gpu_goals():
        about = [c for c in cases if goal.matches({"bench": c.bench, "key": c.key})]
        wanted = 13 if isinstance(goal, goals.NeverSlower) else 0 if goal.bench == "memory" else 1
        assert len(about) == wanted, goal.name
