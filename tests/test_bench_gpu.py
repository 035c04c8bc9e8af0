"""Code of bench that runs only on a GPU, tested with stand-ins: a lost device, parts that are cut off, and kernels that
the self-check refused."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, CUDA, again, make_run, measured, python, softplus_case, written
from conftest import raising

from jasper_fast.bench.cases import (
    bn_relu_dropout,
    decode,
    latency,
    memory,
    panes,
    sub_block_inference,
    sub_blocks,
    train,
)
from jasper_fast.bench.cases.layers import Layer
from jasper_fast.bench.commands import memory as memory_command
from jasper_fast.bench.gpu import agenda, gpu
from jasper_fast.bench.harness import clocks, devices, interruption, result_file, timing
from jasper_fast.bench.harness.errors import DeviceLost, OutOfTime
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.report import terminal
from jasper_fast.dispatch.verdict import OPS


def planned(monkeypatch, share: float = 1.0, **parts) -> None:
    """Replaces the plan by these parts, each of which may use `share` of the time budget."""
    monkeypatch.setattr(
        agenda,
        "plan",
        lambda run: [agenda.Part(title, share * gpu.BUDGET, measure) for title, measure in parts.items()],
    )


# ------------------------------------------------------------------ a case that cannot be prepared


@pytest.mark.slow
def test_without_an_answer_only_that_case_has_no_number(run):
    no_memory = raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 49 GiB"))
    broken, refilled, fine = (softplus_case({"eager": F.softplus}, f"softplus{i}") for i in range(3))
    broken = dataclasses.replace(broken, reference=no_memory)
    refilled = dataclasses.replace(refilled, refill=no_memory)
    rows = run.cases("test", [broken, refilled, fine])
    assert [r["status"] for r in rows] == ["failed"] * 4 + ["ok"] * 2
    assert all("the inputs or the fp64 answer cannot be made: OutOfMemoryError" in r["why"] for r in rows[:4])


# ------------------------------------------------------------------ a lost device


class Context:
    """A stand-in for a CUDA context. After an illegal access every later call fails."""

    def __init__(self) -> None:
        self.fault = ""

    def synchronize(self, *_: object) -> None:
        if self.fault:
            raise RuntimeError(f"CUDA error: {self.fault}")

    def break_it(self, x: torch.Tensor) -> torch.Tensor:
        """Returns immediately, like a kernel launch. The fault appears at the next synchronisation."""
        self.fault = "an illegal memory access was encountered"
        return F.softplus(x)


@pytest.fixture
def context(monkeypatch) -> Context:
    made = Context()
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(timing, "clock", lambda device, wall: clocks.WallClock(CPU))
    monkeypatch.setattr(devices, "tidy", lambda device: None)
    return made


def test_who_loses_the_device_has_a_row_and_no_second_chance(tmp_path, context):
    run = make_run(tmp_path, device=CUDA)
    case = lambda: softplus_case({"breaking": context.break_it, "eager": F.softplus})  # noqa: E731
    with pytest.raises(DeviceLost, match="breaking"):
        run.cases("test", [case()])
    (row,) = written(run)["rows"]
    assert row["contender"] == "breaking" and "illegal memory access" in row["why"]

    context.fault = ""  # the next process has its own context
    rows = {r["contender"]: r for r in again(run).cases("test", [case()])}
    assert {n: r["status"] for n, r in rows.items()} == {"jasper_fast": "ok", "breaking": "failed", "eager": "ok"}
    assert rows["breaking"]["why"] == row["why"] and not context.fault


def test_a_lost_device_costs_its_part_and_not_the_run(tmp_path, context, monkeypatch):
    """Shows that the run continues in a new process. The part that lost the device is tried once more after all other
    parts, and is then abandoned."""

    class Replaced(BaseException):
        """Stands in for the exec call that would replace this process."""

    def breaking(run: Run) -> None:
        begun.append("breaking")
        context.break_it(torch.zeros(1))
        raise ValueError("nothing works")

    begun: list[str] = []
    planned(monkeypatch, breaking=breaking, other=lambda run: begun.append("other"))
    monkeypatch.setattr(gpu, "go_on_elsewhere", raising(Replaced()))
    run = make_run(tmp_path, device=CUDA)
    for all_begun, left in ((["breaking"], ["breaking"]), (["breaking", "other", "breaking"], [])):
        with pytest.raises(Replaced):
            gpu.main(run)
        assert begun == all_begun and result_file.parts_left(written(run)) == left
        context.fault, run = "", again(run)
    gpu.main(run)
    data = written(run)
    assert begun == ["breaking", "other", "breaking"] and not result_file.parts_left(data)
    assert data["parts"] == {"breaking": "failed: ValueError: nothing works", "other": "finished"}


def test_a_fault_that_nobody_noticed_ends_its_own_part(tmp_path, context):
    part = agenda.Part("quiet", 10.0, lambda run: context.break_it(torch.zeros(1)))
    how, gone = gpu._measure(make_run(tmp_path, device=CUDA), part, 10.0)
    assert gone and how.startswith("failed: ") and "illegal memory access" in how


@pytest.mark.parametrize("stop", [SystemExit("no such kernel"), ValueError("no such kernel")])
def test_a_failed_part_is_unfinished_until_it_has_failed_twice(stop, run, monkeypatch):
    failing = Mock(side_effect=stop)
    planned(monkeypatch, failing=failing)
    for count, left in ((1, ["failing"]), (2, []), (2, [])):
        gpu.main(run)
        data = written(run)
        assert failing.call_count == count and result_file.parts_left(data) == left
        assert data["parts"] == {"failing": f"failed: {type(stop).__name__}: no such kernel"}
        run = again(run)


def test_the_new_process_is_the_same_command_with_what_is_left_of_the_time(tmp_path, monkeypatch):
    execve = Mock()
    monkeypatch.setattr(os, "execve", execve)
    run = make_run(tmp_path, arguments=("gpu", "--out", "here"))
    gpu.go_on_elsewhere(run, time.monotonic() + 100.0)
    gpu.go_on_elsewhere(dataclasses.replace(run, arguments=("gpu", "--resume")), 0.0)
    (path, argv, env), (_, second, _) = (one.args for one in execve.call_args_list)
    assert path == sys.executable and argv[1:] == ["-m", "jasper_fast.bench", "gpu", "--out", "here", "--resume"]
    assert second[1:] == ["-m", "jasper_fast.bench", "gpu", "--resume"]
    assert float(env[gpu.UNTIL]) - time.time() == pytest.approx(100.0, abs=60.0)

    monkeypatch.setenv(gpu.UNTIL, str(time.time() + gpu.GOOD / 2))
    planned(monkeypatch, late=measured("late"))
    gpu.main(run)
    assert run.results.data["parts"] == {"late": "no time left"} and gpu.UNTIL not in os.environ


@pytest.mark.slow
def test_a_process_replaces_itself():
    script = """
from types import SimpleNamespace as N; from jasper_fast.bench.gpu import gpu; import time, os
kept = os.open('/dev/null', os.O_RDONLY); os.set_inheritable(kept, True)
gpu.go_on_elsewhere(N(arguments=('gpu', '--help')), time.monotonic() + 9)
"""
    assert python(script).stdout.startswith("usage: python -m bench gpu")


@pytest.mark.slow
def test_a_kernel_that_never_ends_is_left_behind(run, monkeypatch):
    """Shows that a part which blocks the alarm signal is abandoned. A call into C++ has the same effect, because Python
    handles no signals during the call."""
    left = threading.Event()

    def deaf(run: Run) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        try:
            assert left.wait(300.0)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    monkeypatch.setattr(gpu, "PATIENCE", 0.1)
    monkeypatch.setattr(gpu, "go_on_elsewhere", lambda run, end: left.set())
    planned(monkeypatch, 0.001, deaf=deaf)
    with contextlib.suppress(OutOfTime):
        gpu.main(run)
    assert left.is_set() and run.results.data["faults"]["deaf"] >= 1


class Deaf:
    """An object whose destructor takes long. Python drops an exception that is raised inside a destructor."""

    def __del__(self) -> None:
        for _ in range(20):
            time.sleep(0.02)


def test_an_interruption_that_got_lost_comes_again_and_none_comes_later(monkeypatch):
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: lost.append(dropped.exc_type))
    monkeypatch.setattr(interruption, "AGAIN", 0.2)
    with pytest.raises(OutOfTime), interruption.interrupted_after(0.1):
        Deaf()
        for _ in range(1000):
            time.sleep(0.02)
    assert lost == [OutOfTime]
    interruption.interrupted_after.no_more()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


@pytest.mark.parametrize("how", ["cut off", "finished"])
def test_a_part_that_is_cut_off_leaves_no_compiler_at_work(how, run, monkeypatch):
    """Shows that the compiling processes are killed after a part that is cut off. Without that, torch.compile's own
    shutdown would wait for everything in its queue."""
    compilers = Mock()
    compilers._pool_set = [compilers.pool]
    monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", compilers)
    part = raising(OutOfTime()) if how == "cut off" else lambda run: None
    assert gpu._measure(run, agenda.Part("compiling", 10.0, part), 10.0) == (how, False)
    ended = [call.pool.process.kill(), call.shutdown_compile_workers()]
    assert compilers.mock_calls == (ended if how == "cut off" else [])


@pytest.mark.slow
def test_the_compilers_that_a_cut_off_part_leaves_can_be_ended():
    """Shows that the private attributes of PyTorch that `end_compilers` uses exist and do what it needs."""
    python("""
import torch, torch._inductor.async_compile as a, torch._inductor.config as c, time; c.compile_threads = 2
from jasper_fast.bench.gpu import gpu; pool = a.AsyncCompile.process_pool(); pool.submit(time.sleep, 600)
gpu.end_compilers(); pool.process.wait(300); assert not a._pool_set
""")


# ------------------------------------------------------------------ what the self-check refused


def refused(run: Run, op: str) -> None:
    """Gives `run` the verdicts of a self-check: `op` is wrong on the run's own face and in its dtype. On another face,
    or in another dtype, it is wrong for another reason."""
    verdict = {
        "op": op, "face": run.backend, "dtype": "float32", "status": "bad", "quick": True,
        "failure": "stats wrong: error 2.0",
    }  # fmt: skip
    others = [verdict | {"failure": "another's"} | other for other in ({"face": "cuda"}, {"dtype": "float16"})]
    run.results.data["selfcheck"] = {"verdicts": [*others, verdict]}


def test_what_the_self_check_found_bad_is_not_timed(run, monkeypatch, capsys):
    monkeypatch.setattr(bn_relu_dropout, "fused", lambda *_: pytest.fail("it ran"))
    refused(run, "bn_relu_dropout")
    rows = run.cases("test", [bn_relu_dropout.case(run, (2, 8, 40), "both", False, False)])
    assert [r["status"] for r in rows] == ["refused", "ok", "ok"]
    assert rows[0]["why"] == "self-check: stats wrong: error 2.0" and not any("ratio" in r for r in rows)
    terminal.show(rows, [])
    assert "refused: jasper_fast" in capsys.readouterr().out
    assert again(run).results.data["selfcheck"] == written(run)["selfcheck"], "a resumed run knows it too"


def test_each_case_knows_the_ops_that_ours_is_made_of(run):
    layer, first = Layer(8, 8, 3), Layer(8, 8, 3, stride=2)
    shared, quartznet = latency.Models(run, "small"), latency.Models(run, "quartznet_small")
    training, steps = {"bn_relu_dropout", "conv1d"}, set(train.TRAINS)
    for case, ops in (
        (bn_relu_dropout.case(run, (2, 8, 40), "both", False, False), {"bn_relu_dropout"}),
        (sub_blocks.case(run, "conv1d", 2, 40, layer, "both"), {"conv1d"}),
        (sub_blocks.case(run, "sub_block", 2, 40, layer, "both"), training),
        (sub_blocks.case(run, "sub_block", 2, 40, first, "both"), {"conv1d"}),
        (sub_block_inference.case(run, 2, 40, layer), {"conv1d.fused"}),
        (panes.case(run, 2, 40, panes.Block((8,), 8), "both"), {"bn_relu_dropout"}),
        (train.case(run, "small", 2, 64, "step"), steps),
        (memory.case(run, "small", 2, 64)[0], steps),
        (latency.case(shared, "small", 1, 2.0), {"conv1d.fused"}),
        (latency.sound_case(shared, "small", 1, 2.0), {"conv1d.fused"}),
        (decode.whole_case(quartznet, run, "quartznet_small", 2.0, 8, "none"), {"conv1d.fused", "depthwise"}),
    ):
        assert set(case.needs) == ops <= set(OPS), case.id


@pytest.mark.slow
def test_memory_of_a_refused_contender_is_not_measured(run):
    refused(run, "conv1d")
    ours, eager = memory_command.main(run, (("small", 1, 32),))
    assert ours["ours"] and (ours["status"], eager["status"]) == ("refused", "ok")
    assert "ours_over_kept" not in eager["memory"]
