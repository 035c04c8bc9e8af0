"""A real result of the command line, its page, the README's table, the goals, and the agreement of two results."""

import copy
import json
import re

import pytest
import torch
from bench_runs import CUDA, RATIO, goal_rows, make_run, row

from jasper_fast.bench import cli
from jasper_fast.bench.cases import bn_relu_dropout, by_layer, common
from jasper_fast.bench.cases.layers import layers
from jasper_fast.bench.report import goals, html_page, readme_table
from jasper_fast.bench.report.agreement import agreement


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Runs the command line on tiny shapes and returns the path of its result."""
    out = tmp_path_factory.mktemp("bench")
    arguments = ["kernels", "--op", "bn_relu_dropout", "--device", "cpu", "--quick", "--backend", "reference"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bn_relu_dropout, "CPU_SHAPES", ((2, 8, 40), (2, 16, 40)))
        assert cli.main([*arguments, "--seconds", "0.05", "--out", str(out)]) == 0
    (path,) = out.glob("kernels_*.json")
    return path


@pytest.mark.slow
def test_result_says_how_to_repeat_it(measured):
    data = json.loads(measured.read_text())
    assert data["finished"] and data["schema"] == 1
    assert data["machine"]["packages"]["torch"] and data["machine"]["threads"] and data["machine"]["cpu"]["cores"]
    assert data["limits"]["matmul_flops_per_s"]["float32"] > 1e9 and data["limits"]["copy_bytes_per_s"] > 1e8
    for r in data["rows"]:
        least = 1 if r.get("hurried") else 3  # on a busy machine a row may be timed in fewer rounds than usual
        assert r["status"] == "ok" and r["limit"]["share"] > 0 and r["time_s"]["samples"] >= least, r
    assert len({r["id"] for r in data["rows"]}) == len(data["rows"]) == 9


@pytest.mark.slow
def test_report_is_one_page_that_needs_nothing_else(measured, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["report", str(measured), str(measured), "--html", str(page)]) == 0
    html = page.read_text()
    assert not re.search(r'(?:src|href)="|url\(|@import|https?://', html)
    assert not [part for part in ("<svg", "viewport", "prefers-color-scheme: dark", "Comparison", "Every timed row",
                                  "Not measured here") if part not in html]  # fmt: skip
    assert html.count("<table") == html.count("</table>") and html.count("<svg") == html.count("</svg>")
    assert "nan" not in re.findall(r'="([^"]*)"', html)


def test_readme_table_goes_between_its_markers(measured, tmp_path):
    data = json.loads(measured.read_text())
    data["rows"] = goal_rows()
    path, readme = tmp_path / "r.json", tmp_path / "README.md"
    path.write_text(json.dumps(data))
    readme.write_text(f"above\n{readme_table.BEGIN}\nold\n{readme_table.END}\nbelow\n")
    assert readme_table.write([html_page.load(path)], readme) == 0
    once = readme.read_text()
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "\nold\n" not in once
    assert once.count("\n|---") == 1 and "4.50x [4.40, 4.60]" in once and "0.30 of eager's" in once
    readme_table.write([html_page.load(path)], readme)
    assert readme.read_text() == once
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="markers"):
        readme_table.write([html_page.load(path)], readme)


@pytest.mark.parametrize("command", [*cli.COMMANDS, "compile", "report"])
def test_every_subcommand_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out


# ------------------------------------------------------------------ goals


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


# ------------------------------------------------------------------ two results of one machine


def result(*rows: dict) -> dict:
    return {"rows": list(rows)}


def rival(name: str, low: float, high: float, pairs: int = 9) -> dict:
    """Returns a row of eager with this interval of the ratio."""
    return row("kernels", "eager", {"op": name}, id=name, ratio=RATIO | {"low": low, "high": high, "pairs": pairs})


def test_intervals_that_touch_agree_and_others_are_named():
    first = result(rival("a", 1.0, 1.2), rival("b", 2.0, 2.1), rival("c", 3.0, 3.1), rival("only here", 1.0, 1.0))
    second = result(rival("a", 1.2, 1.4), rival("b", 2.2, 2.3), rival("c", 2.8, 2.9), rival("only there", 1.0, 1.0))
    found = agreement(first, second)
    assert (found.rows, found.apart) == (3, ("b", "c"))
    assert "1 of 3 rows (33 %)" in str(found)


def test_failed_rows_and_rows_without_a_ratio_do_not_count():
    rows = result(row("kernels", "jasper_fast", {"op": "ours"}), rival("wrong", 1.0, 1.0) | {"status": "wrong"})
    found = agreement(rows, rows)
    assert found.rows == 0 and "no row" in str(found)


def test_rows_of_too_few_pairs_for_an_interval_are_told_and_not_counted():
    few, enough = rival("few", 1.0, 1.0, pairs=5), rival("few", 1.0, 1.0, pairs=6)
    apart = rival("apart", 1.0, 1.1), rival("apart", 2.0, 2.1)
    found = agreement(result(few, apart[0]), result(enough, apart[1]))
    assert (found.rows, found.apart, found.too_few) == (1, ("apart",), 1)
    assert str(found) == "intervals of the ratios overlap in 0 of 1 rows (0 %); 1 row has too few pairs"
    found = agreement(result(few, few | {"id": "b"}), result(few, few | {"id": "b"}))
    assert (found.rows, found.too_few) == (0, 2) and str(found).endswith("; 2 rows have too few pairs")
    assert "too few" not in str(agreement(result(enough), result(enough)))


def test_the_report_of_two_results_says_it(tmp_path, capsys):
    committed = min(readme_table.COMMITTED.glob("all_*.json"))
    first = json.loads(committed.read_text())
    second = copy.deepcopy(first)
    moved = next(r for r in second["rows"] if "ratio" in r)
    moved["ratio"] |= {"low": 90.0, "median": 91.0, "high": 92.0}
    other = tmp_path / "second.json"
    other.write_text(json.dumps(second))
    assert html_page.main([committed, other], tmp_path / "page.html", False) == 0
    printed = capsys.readouterr().out
    total = sum("ratio" in r for r in first["rows"])
    assert moved["id"].split(" / ")[0][:20] in printed
    for text in (printed, (tmp_path / "page.html").read_text()):
        assert f"overlap in {total - 1} of {total} rows" in text
    second["machine"]["name"] = "another machine"
    other.write_text(json.dumps(second))
    assert html_page.main([committed, other], tmp_path / "page.html", False) == 0
    for text in (capsys.readouterr().out, (tmp_path / "page.html").read_text()):
        assert "overlap" not in text
