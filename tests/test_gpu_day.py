"""The plan of the first half hour on a GPU: its commands exist, each has a time limit, and results are kept."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_runs import ROOT
from conftest import raising
from standins import verdicts_of_its_own, wrap  # noqa: F401

from jasper_fast.bench import cli
from jasper_fast.bench.gpu import day
from jasper_fast.cli import command


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("call", ["1", "2", "3", "more"])
def test_every_command_of_the_plan_is_one_that_exists(monkeypatch, tmp_path, call, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    steps = day.plan(call, device, tmp_path, ROOT)
    assert steps and len({step.name for step in steps}) == len(steps)
    for step in steps:
        program, *arguments = step.argv
        assert program in (sys.executable, "compute-sanitizer")
        if "-m" not in arguments:
            assert (ROOT / arguments[0]).is_file()
            continue
        module, *rest = arguments[arguments.index("-m") + 1 :]
        if module == "pytest":
            files = [name for name in rest if name.startswith("tests")]
            assert files and all((ROOT / name).exists() for name in files)
        elif parser := {"jasper_fast.bench": cli.parser, "jasper_fast": command.parser}.get(module):
            assert parser().parse_args(rest)
        else:
            assert module in (day.DAY, "pip")


def test_calls_2_and_3_fit_into_nine_minutes_and_call_1_begins_with_its_checks():
    for call in ("2", "3"):
        assert sum(step.limit for step in day.plan(call, "cuda", Path("out"), ROOT)) <= 550
    steps = {step.name: step for step in day.plan("1", "cuda", Path("out"), ROOT)}
    order = [name for name in steps if name != "wheels"]  # not in every checkout
    assert order[:4] == ["preflight", "native libraries", "probe of the device", "self-check"]
    assert order[4:] == ["tests of the ops", "times of bn_relu_dropout", "times of conv1d"] and steps["self-check"].gate


def test_steps_are_cut_off_and_what_came_of_them_is_on_disk(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(day, "GRACE", 0.3)
    pid = tmp_path / "pid"
    endless = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(pid)!r}, 'w').write(str(p.pid)); print('begun', flush=True); time.sleep(600)"
    )
    steps = [
        day.Step("good", python("print('all is well')"), 60),
        day.Step("bad", python("import sys; print('why'); sys.exit(3)"), 60),
        day.Step("endless", python(endless), 1.5),
        day.Step("absent", ("no-such-program",), 60),
        day.Step("after them", python("print(1)"), 60),
    ]
    done = day.carry_out("1", steps, tmp_path, tmp_path)
    ends = {one["name"]: (one["status"], one["told"]) for one in done}
    assert ends["good"] == ("ok", "all is well") and ends["bad"] == ("failed", "why")
    assert ends["endless"] == ("cut off", "begun") and ends["absent"][0] == "failed" and ends["after them"][0] == "ok"
    with pytest.raises(ProcessLookupError):  # the process that the step started has ended
        for _ in range(50):
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.1)
    assert json.loads((tmp_path / "day.json").read_text()) == {"1": done}
    assert (tmp_path / done[1]["log"]).read_text() == "why\n"
    day.carry_out("2", steps[:1], tmp_path, tmp_path)
    assert set(json.loads((tmp_path / "day.json").read_text())) == {"1", "2"}
    assert day.table(done).splitlines()[1].split()[:2] == ["bad", "failed"]


def test_behind_a_gate_that_failed_and_without_time_nothing_is_run(tmp_path):
    steps = [day.Step("gate", python("raise SystemExit(1)"), 60, gate=True), day.Step("next", python("print(1)"), 60)]
    assert [one["status"] for one in day.carry_out("1", steps, tmp_path, tmp_path)] == ["failed", "not run"]
    assert day.carry_out("1", steps[1:], tmp_path, tmp_path, limit=1.0)[0]["told"] == "no time left"


def test_a_dry_run_shows_the_steps_and_their_limits(capsys, tmp_path):
    assert day.main(["1", "--dry-run", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert " 120 s  self-check: " in said and "--quick --dtype fp16 --device cuda" in said
    assert not list(tmp_path.iterdir())


def test_after_ctrl_c_the_results_so_far_are_kept(tmp_path, monkeypatch, capsys):
    steps = [day.Step(name, python("print('all is well')"), 60) for name in ("good", "interrupted")]
    monkeypatch.setattr(day, "plan", lambda *_: steps)
    interrupted = raising(KeyboardInterrupt())
    wrap(monkeypatch, day, "run", lambda run, step, *how: (run if step.name == "good" else interrupted)(step, *how))
    assert day.main(["2", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith(f"steps that had ended, and all logs, are in {tmp_path}\n")
    (kept,) = json.loads((tmp_path / "day.json").read_text())["2"]
    assert (kept["name"], kept["status"]) == ("good", "ok")


@pytest.mark.slow
def test_the_first_call_runs_on_the_stand_in(tmp_path, monkeypatch, capsys):
    chosen = ("preflight", "tests of the ops")
    wrap(monkeypatch, day, "plan", lambda plan, *how: [step for step in plan(*how) if step.name in chosen])
    code = day.main(["1", "--device", "cpu", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "day.json").read_text())["1"]
    assert [one["name"] for one in found] == list(chosen) and found[1]["status"] == "ok", said
    assert "are there" in found[0]["told"] and code == int(found[0]["status"] == "failed")
