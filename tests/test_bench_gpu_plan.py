"""The plan of `python -m bench gpu`, its parts and its child processes, tested with stand-ins for the GPU. A run stays
within its budget, saves its rows as it goes and can be resumed."""

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from bench_runs import FAST, ROOT, again, make_run, measured, python, written
from conftest import raising
from standins import spied, verdicts_of_its_own, wrap  # noqa: F401

from jasper_fast.bench.cases import bn_relu_dropout, common
from jasper_fast.bench.cases.layers import layers
from jasper_fast.bench.commands import memory as memory_command
from jasper_fast.bench.gpu import agenda, ahead, first, gpu, self_check, warm
from jasper_fast.bench.harness import devices, result_file
from jasper_fast.bench.harness.case import Case, Effort
from jasper_fast.bench.harness.errors import OutOfTime
from jasper_fast.dispatch import probe
from jasper_fast.selfcheck import checks

# ------------------------------------------------------------------ the whole plan


def test_tests_that_cannot_run_are_told(run):
    """The error contains the message that pytest writes to stderr."""
    with pytest.raises(first.TestsFailed, match=r"file or directory not found: .*no_such_test\.py"):
        first.tests(run, files=("no_such_test.py",))


@pytest.fixture
def collector(run) -> warm.Collector:
    """A run on a GPU that collects cases and measures none."""
    return warm.Collector(torch.device("cuda"), torch.float16, "triton", False, run.results, FAST)


@pytest.mark.slow
def test_every_part_of_the_plan_for_a_gpu_makes_its_cases_and_has_time_for_them(collector, monkeypatch):
    """Shows that no part names an unknown rival, and that the seconds of a part suffice for its cases. No contender is
    built, because that needs the GPU."""
    asked: list[str] = []
    seconds: list[float] = []

    def cases_of(cases, run, title, made):
        seconds.extend(case.effort(run.effort).seconds for case in made)
        return cases(run, title, made)

    wrap(monkeypatch, warm.Collector, "cases", cases_of)
    for owner, name, stand_in in (
        (self_check, "selfcheck", lambda run, **which: None),
        (checks, "plan", lambda device: []),
        (ahead, "compilers", lambda run, titles: contextlib.nullcontext(asked.extend(titles))),
        (memory_command, "measure", lambda run, case, *_: run.cases("memory", [case])),
        (first, "tests", lambda run: None),
        (first, "tune", lambda run: None),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    run = dataclasses.replace(collector, effort=Effort().at_most(gpu.CASE))
    found: dict[str, list[Case]] = {}
    for part in agenda.plan(run):
        seconds.clear()
        part.measure(dataclasses.replace(run, found=found.setdefault(part.title, [])))
        assert sum(seconds) <= part.seconds or part.title == "memory", part.title  # "memory" counts bytes
    checking = {"preflight", "tests", "tuning", "self-check", "self-check in full"}
    assert {title for title, cases in found.items() if not cases} == checking
    assert set(asked) < set(found) - checking
    for case in (case for cases in found.values() for case in cases):
        names = [c.name for c in case.contenders]
        assert names[0] == "jasper_fast" and "eager" in names and len(set(names)) == len(names), case.id
    for case in found["launches"]:
        names = {c.name for c in case.contenders}
        assert names == {"jasper_fast", "eager"} if "mode" in case.key else "cuda_graph" in names
    for title, count in (("panes", 3), ("panes of all blocks", 10)):
        assert len(found[title]) == count * len(common.MODES)
        assert {c.name for case in found[title] for c in case.contenders} >= {"jasper_fast", "jasper_fast_plain"}
    assert {case.key["mode"] for case in found["convs"]} == set(common.MODES)
    assert {case.id for case in found["panes"]} < {case.id for case in found["panes of all blocks"]}


def test_the_plan_has_every_question_once_and_the_most_valuable_first(tmp_path):
    plan = agenda.plan(make_run(tmp_path, device=torch.device("cuda")))
    titles = [part.title for part in plan]
    assert len(set(titles)) == len(titles)
    assert titles[:13] == [
        "preflight",
        "tests",
        "self-check",
        "tuning",
        "bn_relu_dropout",
        "the five largest convs",
        "training step",
        "latency of one utterance",
        "launches",
        "memory",
        "panes",
        "sub-blocks",
        "self-check in full",
    ]
    assert sum(part.seconds for part in plan[:13]) <= gpu.BUDGET, "one run has time for all these parts"


def test_the_self_check_s_verdict_is_in_the_result(run, monkeypatch):
    row = {
        "op": "conv1d", "face": "triton", "function": "forward", "variant": "", "configuration": "t128", "id": "1",
        "shape": "(1, 2, 3)", "dtype": "float16", "detail": "error 2.0", "status": "wrong",
    }  # fmt: skip

    def supervise(device, quick, report):
        report.planned, report.found = [row], {row["id"]: row}

    monkeypatch.setattr(probe, "supervise", supervise)
    self_check.selfcheck(run, quick=True)
    saved = written(run)["selfcheck"]
    assert saved["verdicts"][0]["quick"] and saved["verdicts"][0]["status"] == "bad"
    assert "error 2.0" in saved["failures"][0]


def test_the_full_self_check_keeps_the_verdicts_that_it_reached(run, monkeypatch):
    plan = [
        SimpleNamespace(op=op, face=face, dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for op in ("conv1d", "panes")
        for face in ("triton", "cuda")
    ]
    calls: list[tuple] = []

    def supervise(device, quick, ops, dtypes, report):
        """Reports a row for each check that is asked for. The first call omits the last row and runs out of time."""
        calls.append((dtypes, ops))
        row = dict.fromkeys(("function", "variant", "configuration", "shape", "detail"), "") | {"status": "ok"}
        asked = [check for check in plan if check.op in ops and check.dtype in dtypes]
        report.planned = [row | vars(check) | {"id": str(vars(check))} for check in asked]
        report.found = {row["id"]: row for row in report.planned[: -1 if len(calls) == 1 else None]}
        if len(calls) == 1:
            raise OutOfTime

    monkeypatch.setattr(probe, "supervise", supervise)
    monkeypatch.setattr(checks, "plan", lambda device: plan)
    quick = {"op": "conv1d", "face": "triton", "dtype": "float32", "status": "good", "quick": True}
    run.results.data["selfcheck"] = {"seconds": 1.0, "verdicts": [quick], "failures": []}
    with pytest.raises(OutOfTime):
        self_check.selfcheck_in_full(run)
    assert len(run.results.data["selfcheck"]["verdicts"]) == 3
    self_check.selfcheck_in_full(run)
    assert calls == [  # the run's own dtype comes first
        (("float32",), ("conv1d", "panes")),
        (("float32",), ("panes",)),
        (("bfloat16",), ("conv1d", "panes")),
    ]
    verdicts = run.results.data["selfcheck"]["verdicts"]
    assert {self_check.group(v) for v in verdicts} == {(c.op, c.face, c.dtype) for c in plan}
    assert not any(v["quick"] for v in verdicts) and len(verdicts) == len(plan)


def test_other_processes_run_ours_once_and_end_with_the_time(tmp_path, monkeypatch):
    ran = spied(monkeypatch, bn_relu_dropout, "fused", lambda backend, y, *_: tuple(y.shape))
    monkeypatch.setattr(common, "eager_chain", lambda *a: pytest.fail("no rival has to be compiled"))
    warm.main("cpu", "float32", "reference", "1", "2", "bn_relu_dropout")
    assert ran == [(2, 96, 100)]

    started: list[subprocess.Popen] = []
    wrap(monkeypatch, subprocess, "Popen", lambda right, *a, **k: started.append(right(*a, **k)) or started[-1])
    with ahead.compilers(make_run(tmp_path, deadline=0.0), ("bn_relu_dropout",)):
        assert started and all("jasper_fast.bench.gpu.warm" in child.args for child in started)
    assert all(child.returncode is not None for child in started)


def test_a_process_that_cannot_be_ended_holds_nobody_up(tmp_path, monkeypatch):
    """Shows that a run does not wait for a process that cannot be killed. A process with a kernel that never ends may
    stay in the driver even after SIGKILL."""
    stuck = SimpleNamespace(kill=Mock(), wait=Mock(side_effect=subprocess.TimeoutExpired("stuck", 0.0)))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: stuck)
    with ahead.compilers(make_run(tmp_path, deadline=0.0), ("bn_relu_dropout",)):
        pass
    stuck.kill.assert_called()


def test_other_processes_run_on_the_run_s_own_gpu(monkeypatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda:1", "cpu", "cuda"):
        warm.main(device, "float16", "triton", "0", "1", "no part")
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.slow
def test_a_machine_with_only_pytorch_has_its_numbers_and_a_line_for_what_is_missing(tmp_path):
    """Shows that a CPU run needs neither Triton nor the packages for sound, text and pages. Without them it writes its
    numbers and no page, and exits with 0. An import finder hides the packages."""
    done = python(
        """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"soundfile", "soxr", "anyascii", "jiwer", "openvino", "jinja2", "markupsafe",
                                      "pynvml", "triton"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import torch, jasper_fast.selfcheck.show
from jasper_fast.bench import cli
from jasper_fast.bench.gpu import agenda, warm
from jasper_fast.bench.harness import limits, machine
agenda.plan = lambda run: []
limits.measure = lambda *_: {}
assert machine.clocks(torch.device("cuda")) == {}
sys.exit(cli.main(["gpu", "--device", "cpu", "--quick", "--out", sys.argv[1]]))
""",
        tmp_path,
    )
    assert "the HTML page needs Jinja2: pip install jinja2" in done.stderr
    assert "pip install nvidia-ml-py" in done.stderr
    assert len(list(tmp_path.glob("gpu_*.json"))) == 1 and not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("frontend", [None, True])
def test_cudnn_s_rows_cost_no_second_timing_where_it_is_absent(frontend, collector, monkeypatch):
    wrap(monkeypatch, importlib.util, "find_spec", lambda right, name: frontend if name == "cudnn" else right(name))
    agenda.slow_rivals(collector)
    assert len(collector.found) == len(layers()) * (5 if frontend else 3)
    for name in ("cudnn", agenda.SLOW):
        ids = [case.id for case in collector.found if name in {c.name for c in case.contenders}]
        assert len(set(ids)) == len(ids) > 0


# ------------------------------------------------------------------ the budget, and a run that goes on


def endless_compiler(run):
    while True:
        time.sleep(0.01)


@pytest.mark.slow
def test_gpu_plan_is_bounded_written_as_it_goes_and_resumed(run, monkeypatch):
    whole = gpu.BUDGET
    plan = [
        agenda.Part("first", whole, measured("a")),
        agenda.Part("failing", whole, raising(ValueError("no such kernel"))),
        agenda.Part("compile", 0.1 * whole, endless_compiler),
        agenda.Part("second", whole, measured("b")),
        agenda.Part("endless too", whole, endless_compiler),
        agenda.Part("last", whole, measured("c")),
    ]
    monkeypatch.setattr(agenda, "plan", lambda run: plan)
    monkeypatch.setattr(gpu, "GOOD", 0.5)
    # garbage collection takes long in a process with many tests
    monkeypatch.setattr(devices, "tidy", lambda device: None)
    gpu.main(run, time.monotonic() - run.started + 10.0)
    assert written(run)["parts"] == {
        "first": "finished",
        "failing": "failed: ValueError: no such kernel",
        "compile": "cut off",  # after its own share of the time, so that the next part still ran
        "second": "finished",
        "endless too": "cut off",
        "last": "no time left",
    }

    plan[0] = agenda.Part("first", whole, plan[1].measure)  # this part has finished and must not run again
    plan[2] = agenda.Part("compile", whole, measured("compiled"))
    plan[4] = agenda.Part("endless too", whole, measured("d"))
    gpu.main(again(run))
    on_disk = written(run)
    assert {title for title, how in on_disk["parts"].items() if how != "finished"} == {"failing"}
    assert {r["key"]["op"] for r in on_disk["rows"]} == {"a", "b", "c", "d", "compiled"}


@pytest.mark.slow
def test_a_part_that_was_cut_off_goes_on_when_the_others_are_done(run, monkeypatch):
    calls = []

    def slow_at_first(run):
        calls.append(run.deadline - time.monotonic())
        if len(calls) == 1:
            endless_compiler(run)
        measured("slow")(run)

    plan = [agenda.Part("slow", 0.05 * gpu.BUDGET, slow_at_first), agenda.Part("other", gpu.BUDGET, measured("other"))]
    monkeypatch.setattr(agenda, "plan", lambda run: plan)
    monkeypatch.setattr(gpu, "GOOD", 0.1)
    gpu.main(run, time.monotonic() - run.started + 20.0)
    data = written(run)
    assert data["parts"] == {"slow": "finished", "other": "finished"}
    assert [r["key"]["op"] for r in data["rows"]][::2] == ["other", "slow"]
    assert calls[0] < 1.5 < calls[1]


@pytest.mark.slow
def test_gpu_run_killed_in_the_middle_leaves_its_rows(tmp_path):
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
    assert result_file.unfinished(path, data)
