"""What only a GPU executes, on stand-ins: clocks, a lost device, refusals, the whole plan of `python -m bench gpu`."""

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, FAST, make_run, measured, softplus_case

from jasper_fast.bench.cases import (
    bn_relu_dropout,
    by_layer,
    common,
    latency,
    memory,
    models,
    panes,
    sub_block_inference,
    sub_blocks,
    train,
)
from jasper_fast.bench.cases.layers import Layer, layers
from jasper_fast.bench.commands import memory as memory_command
from jasper_fast.bench.gpu import agenda, ahead, gpu, self_check, warm
from jasper_fast.bench.harness import checking, clocks, devices, interruption, result_file, timing
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.errors import DeviceLost, OutOfTime
from jasper_fast.bench.harness.measurement import Measurement
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.report import terminal
from jasper_fast.bench.rivals.eager_layouts import ChannelsLast2d
from jasper_fast.dispatch.verdict import OPS
from jasper_fast.selfcheck import checks

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)
measured_rate = clocks.cycles_per_second.__wrapped__  # before a stand-in takes its place


# ------------------------------------------------------------------ clocks


class Gpu:
    """A device with a queue, and a host whose clock moves only when something takes its time."""

    rate = 1e9  # cycles of a sleep a second

    def __init__(self) -> None:
        self.now = self.free_at = 0.0
        self.slept: list[float] = []

    def host(self, seconds: float) -> None:
        self.now += seconds

    def launch(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles / self.rate)
        self.launch(cycles / self.rate)

    def wait(self, *_: object) -> None:
        self.now = max(self.now, self.free_at)


@pytest.fixture
def device(monkeypatch) -> Gpu:
    made = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = max(made.free_at, made.now)

        def synchronize(self) -> None:
            made.now = max(made.now, self.at)

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1024))
    monkeypatch.setattr(clocks, "cycles_per_second", lambda _: made.rate)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: made.now, monotonic=time.monotonic))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    return made


def small_op(device: Gpu, launches: int, host: float, kernel: float):
    """Python that takes longer to launch a kernel than the device takes to run it."""

    def run() -> None:
        for _ in range(launches):
            device.host(host)
            device.launch(kernel)

    return run


def test_events_time_the_device_and_not_python(device):
    ticker = clocks.CudaClock(CUDA)
    run = small_op(device, 3, host=100e-6, kernel=10e-6)
    assert [ticker.sample(run, 1) for _ in range(3)] == pytest.approx([30e-6] * 3)
    assert ticker.host(run) == pytest.approx(300e-6)
    assert max(device.slept) < 1.1e-3


def test_a_long_host_time_is_part_of_the_answer(device):
    ticker = clocks.CudaClock(CUDA)
    run = small_op(device, 100, host=1e-3, kernel=10e-6)
    assert 80e-3 < ticker.sample(run, 1) <= 100e-3 and device.slept == [ticker.LONGEST]
    heavy = small_op(device, 100, host=1e-4, kernel=10e-3)  # the device is behind anyway
    assert ticker.sample(heavy, 1) == pytest.approx(1.0, rel=1e-3)


def test_waiting_time_is_of_one_run_at_a_time(device):
    ticker = clocks.WallClock(CUDA)
    run = small_op(device, 1, host=1e-3, kernel=5e-3)
    assert ticker.sample(run, 4) == pytest.approx(6e-3), "not the pipeline's 5.25 ms"
    assert ticker.min_sample == 0.0 and clocks.WallClock(CPU).min_sample > 0
    assert ticker.host(run) == pytest.approx(1e-3) and clocks.WallClock(CPU).host(run) is None


def test_rows_carry_the_host_s_time_and_still_make_a_table(device, capsys):
    case = softplus_case({"eager": F.softplus})
    runs = {"jasper_fast": (1e-3, 10e-6), "eager": (2e-3, 40e-6)}
    runners = (dataclasses.replace(c.build(), run=small_op(device, 1, *runs[c.name])) for c in case.contenders)
    contenders = [Contender(name, lambda runner=runner: runner) for name, runner in zip(runs, runners, strict=True)]
    m = Measurement(dataclasses.replace(case, contenders=contenders), CUDA)
    checking.prepare(m)
    rows = timing.measure(m, FAST)
    assert [r["host_s"] for r in rows] == pytest.approx([1e-3, 2e-3])
    assert [r["time_s"]["median"] for r in rows] == pytest.approx([10e-6, 40e-6]) and rows[0]["clock"] == "events"
    assert rows[1]["ratio"]["median"] == pytest.approx(4.0)
    terminal.show(rows, [])
    assert "host" in capsys.readouterr().out


def test_sleeps_are_counted_at_the_clock_that_the_device_rises_to(device, monkeypatch):
    """An idle GPU begins at a fifth of its clock: a sleep of so few cycles would end before the host has launched."""
    rates = iter([2e8, 4e8, 1e9, 9e8, 8e8])
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: cycles > 1000 and device.launch(cycles / next(rates)))
    assert measured_rate(CUDA) == pytest.approx(1e9)


# ------------------------------------------------------------------ one case's failure, and one after another


def test_without_an_answer_only_that_case_has_no_number(tmp_path):
    def no_memory(*_: object):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 49 GiB")

    broken, refilled, fine = (softplus_case({"eager": F.softplus}, f"softplus{i}") for i in range(3))
    broken = dataclasses.replace(broken, reference=no_memory)
    refilled = dataclasses.replace(refilled, refill=no_memory)
    rows = make_run(tmp_path).cases("test", [broken, refilled, fine])
    assert [r["status"] for r in rows] == ["failed"] * 4 + ["ok"] * 2
    assert all("nothing to compare it with: OutOfMemoryError" in r["why"] for r in rows[:4])


def test_a_case_is_on_disk_before_the_next_is_prepared(tmp_path):
    run = make_run(tmp_path)

    def spent() -> Runner:
        raise OutOfTime

    first, second = (softplus_case({"eager": F.softplus}, name) for name in ("first", "second"))
    second = dataclasses.replace(second, contenders=[Contender("jasper_fast", spent)])
    with pytest.raises(OutOfTime):
        run.cases("test", [first, second])
    assert {r["key"]["op"] for r in json.loads(run.results.path.read_text())["rows"]} == {"first"}


# ------------------------------------------------------------------ a lost device


class Context:
    """A CUDA context that an illegal access ends for good."""

    def __init__(self) -> None:
        self.fault = ""

    def synchronize(self, *_: object) -> None:
        if self.fault:
            raise RuntimeError(f"CUDA error: {self.fault}")

    def break_it(self, x: torch.Tensor) -> torch.Tensor:
        """Returns at once, as a launch does: the fault shows when someone waits."""
        self.fault = "an illegal memory access was encountered"
        return F.softplus(x)


@pytest.fixture
def context(monkeypatch) -> Context:
    made = Context()
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(timing, "clock", lambda device, wall: clocks.WallClock(CPU))
    monkeypatch.setattr(devices, "tidy", lambda device: None)
    return made


def again(run: Run) -> Run:
    """The same run in the next process."""
    header = {k: run.results.data[k] for k in ("command", "machine")}
    results = result_file.Results(run.results.path, header, resume=True)
    return dataclasses.replace(run, results=results, started=time.monotonic())


def test_who_loses_the_device_has_a_row_and_no_second_chance(tmp_path, context):
    run = make_run(tmp_path)
    run.device = CUDA
    case = lambda: softplus_case({"breaking": context.break_it, "eager": F.softplus})  # noqa: E731
    with pytest.raises(DeviceLost, match="breaking"):
        run.cases("test", [case()])
    (row,) = json.loads(run.results.path.read_text())["rows"]
    assert row["contender"] == "breaking" and "illegal memory access" in row["why"]

    context.fault = ""  # the next process has a context of its own
    rows = {r["contender"]: r for r in again(run).cases("test", [case()])}
    assert {n: r["status"] for n, r in rows.items()} == {"jasper_fast": "ok", "breaking": "failed", "eager": "ok"}
    assert rows["breaking"]["why"] == row["why"] and not context.fault


def test_a_lost_device_costs_its_part_and_not_the_run(tmp_path, context, monkeypatch):
    """The run goes on in a new process; the part comes once more, after the others, and then never again."""

    class Replaced(BaseException):
        """The end of a process that another replaces."""

    def replaced(run: Run, end: float) -> None:
        raise Replaced

    def breaking(run: Run) -> None:
        begun.append("breaking")
        context.break_it(torch.zeros(1))
        raise ValueError("nothing works")

    def other(run: Run) -> None:
        begun.append("other")

    begun: list[str] = []
    whole = gpu.BUDGET
    monkeypatch.setattr(
        agenda, "plan", lambda run: [agenda.Part("breaking", whole, breaking), agenda.Part("other", whole, other)]
    )
    monkeypatch.setattr(gpu, "go_on_elsewhere", replaced)
    run = make_run(tmp_path)
    run.device = CUDA
    with pytest.raises(Replaced):
        gpu.main(run)
    assert begun == ["breaking"] and result_file.parts_left(json.loads(run.results.path.read_text())) == ["breaking"]

    context.fault, run = "", again(run)
    with pytest.raises(Replaced):
        gpu.main(run)
    assert begun == ["breaking", "other", "breaking"]

    context.fault, run = "", again(run)
    gpu.main(run)
    data = json.loads(run.results.path.read_text())
    assert begun == ["breaking", "other", "breaking"] and not result_file.parts_left(data)
    assert data["parts"] == {"breaking": "failed: ValueError: nothing works", "other": "finished"}


def test_a_fault_that_nobody_noticed_ends_its_own_part(tmp_path, context, monkeypatch):
    run = make_run(tmp_path)
    run.device = CUDA
    part = agenda.Part("quiet", 10.0, lambda run: context.break_it(torch.zeros(1)))
    how, gone = gpu._measure(run, part, 10.0)
    assert gone and how.startswith("failed: ") and "illegal memory access" in how


@pytest.mark.parametrize("stop", [SystemExit("no rival"), ValueError("no rival")])
def test_no_exception_of_a_part_ends_the_run(stop, tmp_path):
    def stopping(run: Run) -> None:
        raise stop

    how, gone = gpu._measure(make_run(tmp_path), agenda.Part("stopping", 10.0, stopping), 10.0)
    assert how == f"failed: {type(stop).__name__}: no rival" and not gone


def test_a_failed_part_is_unfinished_until_it_has_failed_twice(tmp_path, monkeypatch):
    tries: list[int] = []

    def failing(run: Run) -> None:
        tries.append(1)
        raise ValueError("no such kernel")

    monkeypatch.setattr(agenda, "plan", lambda run: [agenda.Part("failing", gpu.BUDGET, failing)])
    run = make_run(tmp_path)
    for count, left in ((1, ["failing"]), (2, []), (2, [])):
        gpu.main(run)
        data = json.loads(run.results.path.read_text())
        assert len(tries) == count and result_file.parts_left(data) == left
        assert data["parts"] == {"failing": "failed: ValueError: no such kernel"}
        run = again(run)


def test_the_new_process_is_the_same_command_with_what_is_left_of_the_time(tmp_path, monkeypatch):
    called: list[tuple] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: called.append(arguments))
    run = make_run(tmp_path, arguments=("gpu", "--out", "here"))
    gpu.go_on_elsewhere(run, time.monotonic() + 100.0)
    gpu.go_on_elsewhere(dataclasses.replace(run, arguments=("gpu", "--resume")), 0.0)
    (path, argv, env), (_, second, _) = called
    assert path == sys.executable and argv[1:] == ["-m", "jasper_fast.bench", "gpu", "--out", "here", "--resume"]
    assert second[1:] == ["-m", "jasper_fast.bench", "gpu", "--resume"]
    assert float(env[gpu.UNTIL]) - time.time() == pytest.approx(100.0, abs=60.0)

    monkeypatch.setenv(gpu.UNTIL, str(time.time() + gpu.GOOD / 2))
    monkeypatch.setattr(agenda, "plan", lambda run: [agenda.Part("late", gpu.BUDGET, measured("late"))])
    gpu.main(run)
    assert run.results.data["parts"] == {"late": "no time left"} and gpu.UNTIL not in os.environ


def test_a_process_replaces_itself(tmp_path):
    script = "from types import SimpleNamespace as N; from jasper_fast.bench.gpu import gpu; import time, os\n"
    script += "kept = os.open('/dev/null', os.O_RDONLY); os.set_inheritable(kept, True)\n"
    script += "gpu.go_on_elsewhere(N(arguments=('gpu', '--help')), time.monotonic() + 9)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "--budget" in done.stdout, done.stderr


def test_a_kernel_that_never_ends_is_left_behind(tmp_path, monkeypatch):
    """A call into C++ hears no signal; here it is a part that blocks the alarm."""
    left = threading.Event()

    def deaf(run: Run) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        try:
            assert left.wait(300.0)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    monkeypatch.setattr(gpu, "PATIENCE", 0.1)
    monkeypatch.setattr(gpu, "go_on_elsewhere", lambda run, end: left.set())
    monkeypatch.setattr(agenda, "plan", lambda run: [agenda.Part("deaf", 0.001 * gpu.BUDGET, deaf)])
    run = make_run(tmp_path)
    with contextlib.suppress(OutOfTime):
        gpu.main(run)
    assert left.is_set() and run.results.data["faults"]["deaf"] >= 1


class Deaf:
    """What is raised while it dies, Python drops."""

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
def test_a_part_that_is_cut_off_leaves_no_compiler_at_work(how, tmp_path, monkeypatch):
    """torch.compile's own shutdown waits for all that is queued."""
    done: list[str] = []
    pool = SimpleNamespace(process=SimpleNamespace(kill=lambda: done.append("killed")))
    compilers = SimpleNamespace(_pool_set=[pool], shutdown_compile_workers=lambda: done.append("shut"))
    monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", compilers)

    def part(run: Run) -> None:
        if how == "cut off":
            raise OutOfTime

    assert gpu._measure(make_run(tmp_path), agenda.Part("compiling", 10.0, part), 10.0) == (how, False)
    assert done == (["killed", "shut"] if how == "cut off" else [])


def test_the_compilers_that_a_cut_off_part_leaves_can_be_ended():
    """What `end_compilers` takes for granted of PyTorch's private parts."""
    script = (
        "import torch, torch._inductor.async_compile as a, torch._inductor.config as c, time; c.compile_threads = 2\n"
    )
    script += (
        "from jasper_fast.bench.gpu import gpu; pool = a.AsyncCompile.process_pool(); pool.submit(time.sleep, 600)\n"
    )
    script += "gpu.end_compilers(); pool.process.wait(300); assert not a._pool_set; print('ended')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "ended" in done.stdout, done.stderr


# ------------------------------------------------------------------ what the self-check refused


def refused(run: Run, op: str) -> Run:
    verdict = {"op": op, "face": run.backend, "dtype": "float32", "status": "bad", "quick": True}
    verdict |= {"failure": "stats wrong: error 2.0"}
    others = [verdict | {"failure": "another's"} | other for other in ({"face": "cuda"}, {"dtype": "float16"})]
    run.results.data["selfcheck"] = {"verdicts": [*others, verdict]}
    return run


def test_what_the_self_check_found_bad_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bn_relu_dropout, "fused", lambda backend: lambda *_: pytest.fail("it ran"))
    run = refused(make_run(tmp_path), "bn_relu_dropout")
    rows = run.cases("test", [bn_relu_dropout.case(run, (2, 8, 40), "both", False, False)])
    assert [r["status"] for r in rows] == ["refused", "ok", "ok"]
    assert rows[0]["why"] == "self-check: stats wrong: error 2.0" and not any("ratio" in r for r in rows)
    terminal.show(rows, [])
    assert "refused: jasper_fast" in capsys.readouterr().out
    kept = json.loads(run.results.path.read_text())["selfcheck"]
    assert again(run).results.data["selfcheck"] == kept, "a resumed run knows it too"


def test_each_case_knows_the_ops_that_ours_is_made_of(tmp_path):
    run = make_run(tmp_path)
    layer, first = Layer(8, 8, 3), Layer(8, 8, 3, stride=2)
    shared = latency.Models(run, "small")
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
    ):
        assert set(case.needs) == ops <= set(OPS), case.id


def test_memory_s_refused_and_unanswerable_cases_are_rows(tmp_path, monkeypatch):
    run = refused(make_run(tmp_path), "conv1d")
    rows = {r["contender"]: r for r in memory_command.main(run, (("small", 1, 32),))}
    assert rows["jasper_fast"]["status"] == "refused" and rows["eager"]["status"] == "ok"
    assert "ours_over_kept" not in rows["eager"]["memory"]


# ------------------------------------------------------------------ the whole plan


def test_every_part_of_the_plan_for_a_gpu_can_make_its_cases(tmp_path, monkeypatch):
    """All parts up to their contenders, which are built on the device only: a rival that nobody knows shows here."""
    asked: list[str] = []

    @contextlib.contextmanager
    def compilers(run, titles):
        asked.extend(titles)
        yield

    def counted(run: warm.Collector, model: str, N: int, T: int) -> list[dict]:
        return run.cases("memory", [memory.case(run, model, N, T)[0]])

    monkeypatch.setattr(self_check, "selfcheck", lambda run, **which: None)
    monkeypatch.setattr(checks, "plan", lambda device: [])
    monkeypatch.setattr(ahead, "compilers", compilers)
    monkeypatch.setattr(memory_command, "measure", counted)
    results = make_run(tmp_path).results
    run = warm.Collector(torch.device("cuda"), torch.float16, "triton", False, results, FAST)
    plan = agenda.plan(run)
    found: dict[str, list[Case]] = {}
    for part in plan:
        part.measure(dataclasses.replace(run, found=found.setdefault(part.title, [])))
    checking = {"self-check", "self-check in full"}
    assert {title for title, cases in found.items() if not cases} == checking
    assert set(asked) < set(found) - checking
    for case in (case for cases in found.values() for case in cases):
        names = [c.name for c in case.contenders]
        assert names[0] == "jasper_fast" and "eager" in names and len(set(names)) == len(names), case.id
    assert {c.name for case in found["launches"] for c in case.contenders if case.key.get("mode")} == {
        "jasper_fast",
        "eager",
    }
    assert any(c.name == "cuda_graph" for case in found["launches"] for c in case.contenders)
    for title, count in (("panes", 3), ("panes of all blocks", 10)):
        assert len(found[title]) == count * len(common.MODES)
        assert {c.name for case in found[title] for c in case.contenders} >= {"jasper_fast", "jasper_fast_plain"}
    assert {case.key["mode"] for case in found["convs"]} == set(common.MODES)
    assert {case.id for case in found["panes"]} < {case.id for case in found["panes of all blocks"]}


def test_the_plan_has_every_question_once_and_the_most_valuable_first(tmp_path):
    run = make_run(tmp_path)
    run.device = torch.device("cuda")
    plan = agenda.plan(run)
    titles = [part.title for part in plan]
    assert len(set(titles)) == len(titles)
    assert titles[:11] == [
        "self-check",
        "bn_relu_dropout",
        "the five largest convs",
        "training step",
        "latency of one utterance",
        "launches",
        "memory",
        "panes",
        "sub-blocks",
        "training grid",
        "self-check in full",
    ]
    assert sum(part.seconds for part in plan[:11]) <= gpu.BUDGET, "all of them have their share in one run"


def test_the_full_self_check_keeps_the_verdicts_that_it_reached(tmp_path, monkeypatch):
    from jasper_fast.dispatch import probe

    plan = [
        SimpleNamespace(op=op, face=face, dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for op in ("conv1d", "panes")
        for face in ("triton", "cuda")
    ]
    calls: list[tuple] = []

    def supervise(device, quick, ops, dtypes, report):
        """All but the last of what is asked for, in the first call; then all."""
        calls.append((dtypes, ops))
        row = {"function": "f", "variant": "", "configuration": "", "shape": "", "detail": "", "status": "ok"}
        asked = [check for check in plan if check.op in ops and check.dtype in dtypes]
        report.planned = [row | vars(check) | {"id": str(vars(check))} for check in asked]
        reached = report.planned[:-1] if len(calls) == 1 else report.planned
        report.found = {row["id"]: row for row in reached}
        if len(calls) == 1:
            raise OutOfTime

    monkeypatch.setattr(probe, "supervise", supervise)
    monkeypatch.setattr(checks, "plan", lambda device: plan)
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    run = make_run(tmp_path)
    quick = {"op": "conv1d", "face": "triton", "dtype": "float32", "status": "good", "quick": True}
    run.results.data["selfcheck"] = {"seconds": 1.0, "verdicts": [quick], "failures": []}
    with pytest.raises(OutOfTime):
        self_check.selfcheck_in_full(run)
    assert len(run.results.data["selfcheck"]["verdicts"]) == 3
    self_check.selfcheck_in_full(run)
    assert calls == [
        (("float32",), ("conv1d", "panes")),  # the run's own dtype first
        (("float32",), ("panes",)),
        (("bfloat16",), ("conv1d", "panes")),
    ]
    verdicts = run.results.data["selfcheck"]["verdicts"]
    assert {self_check.group(v) for v in verdicts} == {(c.op, c.face, c.dtype) for c in plan}
    assert not any(v["quick"] for v in verdicts) and len(verdicts) == len(plan)


def test_other_processes_run_ours_once_and_end_with_the_time(tmp_path, monkeypatch):
    ran: list[str] = []
    fused = bn_relu_dropout.fused

    def counted(backend: str):
        def call(*args):
            ran.append(str(tuple(args[0].shape)))
            return fused(backend)(*args)

        return call

    monkeypatch.setattr(bn_relu_dropout, "fused", counted)
    monkeypatch.setattr(common, "eager_chain", lambda *a: pytest.fail("no rival has to be compiled"))
    assert warm.main(["cpu", "float32", "reference", "bn_relu_dropout", "--take", "1,2"]) == 0
    assert ran == ["(2, 96, 100)"]

    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with ahead.compilers(make_run(tmp_path, deadline=0.0), ("bn_relu_dropout",)):
        assert started and all("jasper_fast.bench.gpu.warm" in child.args for child in started)
    assert all(child.returncode is not None for child in started)


def test_a_process_that_cannot_be_ended_holds_nobody_up(tmp_path, monkeypatch):
    """A kernel that never ends holds its process in the driver, killed or not."""
    killed: list[int] = []

    class Stuck:
        def __init__(self, *_, **__) -> None:
            self.kill = lambda: killed.append(1)

        def wait(self, timeout: float | None) -> None:
            raise subprocess.TimeoutExpired("stuck", timeout or 0.0)

    monkeypatch.setattr(subprocess, "Popen", Stuck)
    with ahead.compilers(make_run(tmp_path, deadline=0.0), ("bn_relu_dropout",)):
        pass
    assert killed


def test_other_processes_run_on_the_run_s_own_gpu(monkeypatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda:1", "cpu", "cuda"):
        assert warm.main([device, "float16", "triton", "no part"]) == 0
    assert chosen == [torch.device("cuda", 1)]


def test_a_machine_that_only_measures_needs_nothing_for_sound_and_text():
    """GPU machines have PyTorch and Triton, and often no way to get more."""
    absent = ("soundfile", "soxr", "anyascii", "jiwer", "openvino", "jinja2", "markupsafe", "pynvml")
    script = f"import sys; sys.modules |= dict.fromkeys({absent})\n"
    script += "import jasper_fast.bench.cli, jasper_fast.selfcheck.show; from jasper_fast.bench.gpu import gpu, warm; "
    script += "from jasper_fast.bench.tune import tune; from jasper_fast.bench.commands import profile; "
    script += "from jasper_fast.bench.report import html_page"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_run_without_jinja_and_pynvml_has_its_numbers_and_a_line_for_each(tmp_path):
    """A finder that knows neither: the numbers are written, the page is not, and the status says nothing failed."""
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jinja2", "markupsafe", "pynvml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import torch
from jasper_fast.bench import cli
from jasper_fast.bench.gpu import agenda
from jasper_fast.bench.harness import limits, machine
agenda.plan = lambda run: []
limits.measure = lambda *_: {}
assert machine.clocks(torch.device("cuda")) == {}
sys.exit(cli.main(["gpu", "--device", "cpu", "--quick", "--out", sys.argv[1]]))
"""
    argv = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "a page of results needs Jinja2: pip install jinja2" in done.stderr
    assert "pip install nvidia-ml-py" in done.stderr
    assert len(list(tmp_path.glob("gpu_*.json"))) == 1 and not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("frontend", [False, True])
def test_cudnn_s_rows_cost_no_second_timing_where_it_is_absent(frontend, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: frontend or None if name == "cudnn" else found(name))
    results = make_run(tmp_path).results
    run = warm.Collector(torch.device("cuda"), torch.float16, "triton", False, results, FAST)
    agenda.slow_rivals(run)
    names = {
        name: [c.id for c in run.found if name in {x.name for x in c.contenders}] for name in ("cudnn", agenda.SLOW)
    }
    assert len(run.found) == (len(layers()) * (5 if frontend else 3))
    assert all(len(set(ids)) == len(ids) > 0 for ids in names.values())


# ------------------------------------------------------------------ models


def test_networks_are_made_where_they_run_and_only_once(monkeypatch):
    class Enough(Exception):
        pass

    def seen(*_, **__):
        raise Enough(torch.empty(0).device.type)

    monkeypatch.setattr(models, "EagerJasper", seen)
    monkeypatch.setattr(models, "Jasper", seen)
    config = models.config("small")
    with pytest.raises(Enough, match="meta"):
        models._weights(config, torch.device("meta"), 64)
    with pytest.raises(Enough, match="meta"):
        models.fused(config, {}, "reference")


def test_weights_are_shared_and_models_are_copies():
    config = models.config("small")
    state = models.weights(config, CPU, 64)
    again = models.weights(models.config("small"), CPU, 64)
    name = "encoder.layers.0.conv.0.weight"
    assert again is not state and again[name] is state[name]
    before = state[name].clone()
    for model in (models.fused(config, state, "reference"), models.eager(config, state)):
        assert all(p.requires_grad and p.device == CPU for p in model.parameters())
        with torch.no_grad():
            for t in model.state_dict().values():
                t.zero_()
    assert torch.equal(state[name], before)
    x, lengths = models.features(config, 2, 64, CPU, 1)
    with torch.no_grad():
        got = models.fused(config, state, "reference").eval()(x, lengths)[0]
        want = models.eager(config, state).eval()(x, lengths)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_models_go_when_nobody_holds_them(tmp_path):
    gc.collect()
    gc.disable()  # so that only what is in no cycle goes
    try:
        shared = latency.Models(make_run(tmp_path), "small")
        features = weakref.ref(shared.inputs(1, 2.0)[0])
        gone = weakref.ref(shared)
        del shared
        assert gone() is None and features() is None
    finally:
        gc.enable()


def test_a_large_step_is_compared_on_a_small_batch(tmp_path, monkeypatch):
    large, small = models.config("jasper10x5"), models.config("small")
    assert train.judged_size(CUDA, large, 64, 1680) == (2, 1680)
    assert train.judged_size(CUDA, small, 64, 1680) == train.judged_size(CPU, large, 64, 1680) == (64, 1680)

    sizes: list[int] = []
    answer = train.answer

    def spying(*args):
        found = answer(*args)
        sizes.append(found["log_probs"].shape[0])
        return found

    monkeypatch.setattr(train, "judged_size", lambda device, cfg, N, T: (1, T))
    monkeypatch.setattr(train, "answer", spying)
    run = make_run(tmp_path, rivals="eager")
    case = train.case(run, "small", 3, 64, "forward+backward")
    assert case.seeds == (1,)
    rows = run.cases("test", [case])
    assert [r["status"] for r in rows] == ["ok", "ok"], [r.get("why") for r in rows]
    assert set(sizes) == {1} and len(sizes) == 2 * 4, "two contenders, low and reference, before and after the timing"


@pytest.mark.parametrize(("order", "made"), [(("forward",), 0), (("forward", "both"), 1), (("both", "forward"), 1)])
def test_answers_are_made_once_and_gradients_only_where_they_are_asked_for(order, made, tmp_path, monkeypatch):
    """In fp64 they take longer than all that is timed."""
    forwards, backwards = [], []
    conv, results = sub_blocks.eager_conv, sub_blocks.results
    monkeypatch.setattr(sub_blocks, "eager_conv", lambda *a: forwards.append(1) or conv(*a))
    monkeypatch.setattr(sub_blocks, "results", lambda *a: backwards.append(1) or results(*a))
    i = sub_blocks.Inputs(2, 20, Layer(8, 8, 3), torch.float32, CPU)
    for mode in (*order, *order):
        found = sub_blocks.answer("conv1d", i, torch.float64, mode)
        assert set(found) == ({"y"} if mode == "forward" else {"y", "dx", "dweight"})
        assert torch.equal(found["y"], conv(i.nct["x"].double(), i, i.weight.double(), None, None, 0.0))
    assert len(backwards) == made and len(forwards) == 1 + (order[0] == "forward") * made
    i.refill(5)
    assert not torch.equal(sub_blocks.answer("conv1d", i, torch.float64, "forward")["y"], found["y"])


# ------------------------------------------------------------------ channels_last


@pytest.fixture
def seen(monkeypatch) -> list[bool]:
    """Of every call of conv2d, whether input and weight came in channels_last memory."""
    calls: list[bool] = []
    conv2d = F.conv2d

    def spying(x, weight, *args, **kwargs):
        calls.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)))
        return conv2d(x, weight, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", spying)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["forward", "both", "inference"])
def test_the_2d_rival_never_reorders_a_weight(mode, dtype, tmp_path, seen):
    run = make_run(tmp_path)
    run.dtype = dtype
    for layer in (Layer(16, 24, 11), Layer(16, 24, 11, stride=2), Layer(8, 8, 1)):
        (case,) = by_layer.layer_cases(run, "sub_block", 2, 40, layer, (mode,))
        rival = next(c for c in case.contenders if c.name == "eager_2d_channels_last").build()
        rival.run()
        rival.outputs()
    assert len(seen) == 6 and all(seen)


def test_the_2d_network_never_leaves_channels_last_memory(seen):
    config = models.config("small")
    state = models.weights(config, CPU, 64)
    model = ChannelsLast2d(models.eager(config, state))
    train.restore(model, state)
    model(*models.features(config, 2, 64, CPU, 1, ragged=True))
    assert len(seen) == len(model.weights) and all(seen)
