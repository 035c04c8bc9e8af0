"""The plan of `python -m bench gpu` stays within its budget, is saved as it goes and can be resumed."""

import json
import subprocess
import sys
import time

import pytest
from bench_runs import ROOT, again, measured
from conftest import raising

from jasper_fast.bench.gpu import agenda, gpu, self_check
from jasper_fast.bench.harness import devices, result_file
from jasper_fast.dispatch import probe


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
    assert json.loads(run.results.path.read_text())["parts"] == {
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
    on_disk = json.loads(run.results.path.read_text())
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
    data = json.loads(run.results.path.read_text())
    assert data["parts"] == {"slow": "finished", "other": "finished"}
    assert [r["key"]["op"] for r in data["rows"]][::2] == ["other", "slow"]
    assert calls[0] < 1.5 < calls[1]


def test_the_self_check_s_verdict_is_in_the_result(run, tmp_path, monkeypatch):
    row = {
        "op": "conv1d", "face": "triton", "function": "forward", "variant": "", "configuration": "t128", "id": "1",
        "shape": "(1, 2, 3)", "dtype": "float16", "detail": "error 2.0", "status": "wrong",
    }  # fmt: skip

    def supervise(device, quick, report):
        report.planned, report.found = [row], {row["id"]: row}

    monkeypatch.setattr(probe, "supervise", supervise)
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    self_check.selfcheck(run, quick=True)
    saved = json.loads(run.results.path.read_text())["selfcheck"]
    assert saved["verdicts"][0]["quick"] and saved["verdicts"][0]["status"] == "bad"
    assert "error 2.0" in saved["failures"][0]


@pytest.mark.slow
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
    assert result_file.unfinished(path, data)
