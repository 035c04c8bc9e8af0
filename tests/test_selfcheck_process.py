"""The self-check's child process: a kernel that makes it crash or hang is named. The command prints and saves the
results."""

import gc
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, interpreted, make_face, raising
from standins import CONV, CPU, verdicts_of_its_own  # noqa: F401

from jasper_fast.cli.command import main
from jasper_fast.dispatch import children, probe, verdict, verdicts
from jasper_fast.dispatch.verdict import BAD, GOOD, UNCHECKED
from jasper_fast.selfcheck import checks, show
from jasper_fast.selfcheck.checks import Check

MODULES = """
import os, signal, sys, time, torch
from jasper_fast.dispatch import backends
from jasper_fast.selfcheck import checks, child, perform
"""
BREAK = """
impl = backends.face("conv1d", "cpu")
right = impl.{function}
def broken(x, w, *rest, **more):
    if {where}:
        {what}
    return right(x, w, *rest, **more)
impl.{function} = broken
"""
# A stand-in for the child, which writes the same messages. It runs no kernels, so it starts quickly, and every check
# passes.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
def tell(kind, value):
    print("\\n{mark}" + json.dumps([kind, value]), flush=True)
wanted, planned = json.load(sys.stdin), json.loads({plan!r})
{first}
tell("plan", planned)
for check in planned:
    if check["id"] not in wanted["done"]:
        tell("begin", check["id"])
        if check["op"] == "conv1d" and check["function"] == {function!r}:
            {what}
        tell("result", check | {{"status": "ok", "detail": ""}})
tell("end", None)
"""
PLANNED = ("conv1d", "bn_relu_dropout")


def run(code: str, **more) -> list[dict]:
    """Returns the rows of a quick self-check of the CPU face by supervised processes that execute `code`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "COMMAND", [sys.executable, "-c", code])
        return probe.supervise(CPU, quick=True, ops=PLANNED, faces=("cpu",), **more)


def run_child(code: str, **more) -> list[dict]:
    """As `run`, but the processes execute `code` and then run the kernels."""
    make_face("cpu")
    return run(f"{MODULES}\n{code}\nchild.child()", **more)


def run_stand_in(function: str = "forward", what: str = "pass", first: str = "", **more) -> list[dict]:
    """As `run`, but the processes are stand-ins: they execute `first` at their start and `what` in each check of the
    conv's `function`."""
    make_face("cpu")
    plan = json.dumps([check.plain() for check in checks.plan(CPU, quick=True, ops=PLANNED, faces=("cpu",))])
    return run(STAND_IN.format(mark=children.MARK, plan=plan, first=first, function=function, what=what), **more)


def statuses(rows: list[dict]) -> dict[str, str]:
    """Returns the status of the verdict on each op."""
    return {v.op: v.status for v in verdict.judge(rows, quick=True)}


@pytest.mark.slow
def test_a_kernel_that_kills_its_process_is_named_and_the_rest_goes_on():
    code = BREAK.format(function="dgrad", where="x.shape[1] == 256", what="os.kill(os.getpid(), 11)")
    told = []
    rows = run_child(code, on_row=lambda row, total: told.append((row["id"], total)))
    by_status = {s: [r for r in rows if r["status"] == s] for s in ("ok", "died", "skipped")}
    (dead,) = by_status["died"]
    assert (dead["function"], dead["shape"]) == ("dgrad", "(2, 256->256, 200) K 11")
    assert "SIGSEGV" in dead["detail"]
    assert {r["op"] for r in by_status["skipped"]} == {"conv1d"}
    assert {r["op"] for r in by_status["ok"]} == {"conv1d", "bn_relu_dropout"}
    plan = checks.plan(CPU, quick=True, ops=PLANNED, faces=("cpu",))
    assert [row["id"] for row in rows] == [check.id for check in plan]
    assert sorted(name for name, _ in told) == sorted(row["id"] for row in rows)
    assert {total for _, total in told} == {len(plan)}

    found = {v.op: v for v in verdict.judge(rows, quick=True)}
    assert found["bn_relu_dropout"].status == GOOD
    assert found["conv1d"].status == BAD
    assert "dgrad default (2, 256->256, 200) K 11 float32 died" in found["conv1d"].failure


def test_a_kernel_that_never_ends_is_named():
    rows = run_stand_in("wgrad", "time.sleep(600)", seconds=5.0)
    (hung,) = [row for row in rows if row["status"] == "hung"]
    assert hung["function"] == "wgrad" and "was silent for 5 s" in hung["detail"]
    assert statuses(rows) == {"conv1d": BAD, "bn_relu_dropout": GOOD}


@pytest.mark.slow
def test_a_kernel_that_ruins_the_context_is_named():
    """After a kernel that ruins the CUDA context, the next synchronisation raises an error, and so does every later
    CUDA call. Here a replaced `synchronize` raises it."""
    rows = run_child("""
import jasper_fast.kernels.philox  # its annotations use torch.device, which the next lines replace
device_of = torch.device
torch.device = lambda name: device_of(name) if name != "cpu" else Pretended()
class Pretended:
    type, index = "cuda", 0
    def __str__(self): return "cuda:0"
checks.plan = (lambda plan: lambda device, **more: plan(device_of("cpu"), **more))(checks.plan)
right, done = perform.perform, []
def performing(check, device):
    done.append(check)
    return right(check, device_of("cpu"))
perform.perform = performing
ones, full_like = torch.ones, torch.full_like
torch.ones = lambda *shape, device=None, **more: ones(*shape, **more)
def synchronize(device):
    if done[-1].function == "dgrad":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
""")
    (dead,) = [row for row in rows if row["status"] == "died"]
    assert dead["function"] == "dgrad" and "illegal memory access" in dead["detail"]
    assert {row["op"] for row in rows if row["status"] == "skipped"} == {"conv1d"}
    assert all(row["status"] == "ok" for row in rows if row["op"] == "bn_relu_dropout")


@pytest.mark.parametrize("how", ["KILL", "TERM"])
def test_who_ends_the_process_from_outside_is_no_kernel(how):
    """No kernel is blamed for a signal from outside, for example from the OOM killer of Linux."""
    found = {v.op: v for v in verdict.judge(run_stand_in(what=f"os.kill(os.getpid(), signal.SIG{how})"), quick=True)}
    assert found["conv1d"].status == UNCHECKED and f"SIG{how} (from outside" in found["conv1d"].failure
    assert found["bn_relu_dropout"].status == GOOD


class OutOfTime(BaseException):
    """A stand-in for the exception with which bench ends a part that takes too long."""


def test_a_check_that_is_cut_off_ends_at_once_and_leaves_what_was_found(monkeypatch):
    def on_row(row, total):
        if row["function"] == "dgrad" and "256" in row["shape"]:  # the next check sleeps
            signal.setitimer(signal.ITIMER_REAL, 0.1)

    ended = spy_on_ends(monkeypatch)
    report, before = probe.Report(), signal.signal(signal.SIGALRM, raising(OutOfTime()))
    try:
        with pytest.raises(OutOfTime):
            run_stand_in("wgrad", "time.sleep(600)", on_row=on_row, report=report)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended == [(0.0, -signal.SIGKILL)]
    assert {row["op"] for row in report.rows} == {"bn_relu_dropout", "conv1d"}
    assert {row["op"] for row in report.decided()} == {"bn_relu_dropout"}, "conv1d lacks the checks of wgrad"
    assert all(row["status"] == "ok" for row in report.rows)


def test_a_check_that_is_cut_off_in_the_first_second_ends_at_once(monkeypatch):
    """A process that is still importing is killed without waiting for it."""

    def cut_off(stream, *_):
        with stream:  # `_lines` closes the pipe too
            raise KeyboardInterrupt

    ended = spy_on_ends(monkeypatch)
    monkeypatch.setattr(children, "_lines", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(600)")
    assert ended == [(0.0, -signal.SIGKILL)]


def spy_on_ends(monkeypatch) -> list[tuple[float, int | None]]:
    """Records how each child process ends: the seconds that it was given to end by itself, and its exit status."""
    ended, end = [], children._end

    def spied(process, before, after):
        status = end(process, before=before, after=after)
        ended.append((before, process.poll()))
        return status

    monkeypatch.setattr(children, "_end", spied)
    return ended


def rows_of(*statuses: tuple[str, str]) -> tuple[list[dict], dict[str, dict]]:
    """Returns the fields `planned` and `found` of a Report on checks of these ops. A check whose status is "" was not
    made."""
    planned = [Check(op, "triton", "forward", f"{i}", CONV, "float16").plain() for i, (op, _) in enumerate(statuses)]
    rest = {"detail": "dx", "share": 0.5, "ours": 0.0, "theirs": 0.0}
    pairs = zip(planned, statuses, strict=True)
    return planned, {check["id"]: check | {"status": status} | rest for check, (_, status) in pairs if status}


def test_what_was_found_is_a_verdict_where_nothing_can_change_it():
    report = probe.Report(*rows_of(
        ("bn_relu_dropout", "ok"), ("conv1d", "ok"), ("conv1d", ""), ("conv1d.fused", "wrong"), ("conv1d.fused", ""),
        ("panes", ""),
    ))  # fmt: skip
    assert statuses(report.decided()) == {"bn_relu_dropout": GOOD, "conv1d.fused": BAD}


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_cut_off_shows_and_keeps_what_was_found(as_json, monkeypatch, capsys):
    def supervise(device, *, report, **_more):
        report.planned, report.found = rows_of(("bn_relu_dropout", "ok"), ("conv1d", "ok"), ("conv1d", ""))
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "supervise", supervise)
    with pytest.raises(KeyboardInterrupt):
        show.main(CPU, quick=False, as_json=as_json, cache=True)
    said = capsys.readouterr().out
    if as_json:
        report = json.loads(said)
        assert not report["finished"] and len(report["rows"]) == 2 and len(report["verdicts"]) == 1
    else:
        assert "bn_relu_dropout (triton, float16): good" in said and "stopped early after 2 checks" in said
    assert {name: v.status for name, v in verdicts.read(CPU).items()} == {
        ("bn_relu_dropout", "triton", "float16"): GOOD
    }


def test_what_kernels_print_is_no_part_of_the_protocol():
    assert {row["status"] for row in run_stand_in(what="print('jasper', end='', flush=True)")} == {"ok"}


def test_a_process_that_does_not_start_is_no_verdict_on_a_kernel():
    with pytest.raises(probe.CannotCheck, match="ended with status 3 outside any check: what a pity"):
        run("import sys; print('what a pity', file=sys.stderr); sys.exit(3)")


@pytest.mark.filterwarnings("error")
def test_the_pipe_from_a_process_is_closed():
    children.talk([sys.executable, "-c", ""], {}, lambda *_: False, 60.0)
    gc.collect()


def test_a_process_that_does_not_read_its_task_is_silent(monkeypatch):
    monkeypatch.setattr(children, "START_SECONDS", 1.0)
    argv = [sys.executable, "-c", "import time; time.sleep(20)"]
    ended = children.talk(argv, ["more than a pipe holds"] * 10_000, lambda *_: False, 60.0)
    assert ended.hung and not ended.told and ended.how == "was silent for 1 s"


def test_a_device_that_is_lost_on_the_way_leaves_what_was_not_checked_open(tmp_path):
    """The kernel in which a process died is blamed, although the next process cannot start."""
    flag = f"Path({str(tmp_path / 'started')!r})"
    rows = run_stand_in(
        what="os._exit(9)", first=f"sys.exit('no device any more') if {flag}.exists() else {flag}.touch()"
    )
    assert next(row["status"] for row in rows if row["function"] == "forward" and row["op"] == "conv1d") == "died"
    assert statuses(rows)["conv1d"] == BAD


def test_memory_that_runs_out_in_the_driver_is_no_fault_of_the_kernel():
    what = "print('CUDA error: out of memory', file=sys.stderr, flush=True); os._exit(1)"
    assert statuses(run_stand_in(what=what))["conv1d"] == UNCHECKED


# ---- the command ----


@pytest.mark.slow
def test_the_command_checks_the_cpu_and_the_interpreted_kernels_and_keeps_the_verdicts(own_cache):
    make_face("cpu"), interpreted()
    argv = [sys.executable, "-m", "jasper_fast", "selfcheck", "--device", "cpu", "--quick", "--json"]
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["finished"]
    assert {(v["op"], v["face"], v["dtype"]) for v in report["verdicts"]} == {("panes", "aten", "float32")} | {
        (op, *face) for op in (*verdict.OPS[:3], "depthwise") for face in (("cpu", "float32"), ("triton", "bfloat16"))
    } | {("panes", "cpu", "float32"), ("novograd", "cpu", "float32")}
    assert all(v["status"] == GOOD and v["quick"] for v in report["verdicts"])
    (file,) = (own_cache / "verdicts").glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["key"] == report["key"] and kept["verdicts"] == report["verdicts"]


@pytest.mark.parametrize("more", [[], ["--dtype", "fp16", "--dtype", "bf16", "--limit", "7", "--no-cache"]])
def test_the_command_checks_what_it_is_told_and_shows_a_table(more, monkeypatch, capsys):
    def supervise(device, *, report, on_row, **asked):
        dtypes, seconds = (["float16", "bfloat16"], 7.0) if more else ([], 180.0)
        assert asked == {"quick": True, "dtypes": dtypes, "seconds": seconds}
        report.planned, report.found = rows_of(("conv1d", "ok"), ("conv1d", "wrong"), ("bn_relu_dropout", "ok"))
        on_row(report.rows[0], 3)

    monkeypatch.setattr(show, "supervise", supervise)
    assert main(["selfcheck", "--device", "cpu", "--quick", *more]) == 1
    said = capsys.readouterr().out.replace("\n", " ")
    assert "conv1d (triton, float16): bad" in said and "bn_relu_dropout (triton, float16): good" in said
    assert "conv1d forward 1 (2, 24->20, 21) K 5 float16 wrong: dx" in said
    assert {name[0]: v.status for name, v in verdicts.read(CPU).items()} == (
        {} if more else {"conv1d": BAD, "bn_relu_dropout": GOOD}
    )
