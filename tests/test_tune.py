"""`python -m bench tune` on the stand-in: what it measures, rejects and saves, and interruptions."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import interpreted
from standins import spied, wrap

from jasper_fast.bench.cli import main
from jasper_fast.bench.harness import checking, devices, machine
from jasper_fast.bench.harness.errors import OutOfTime
from jasper_fast.bench.harness.measurement import Measurement
from jasper_fast.bench.tune import builders as tune_builders
from jasper_fast.bench.tune import cases as tune_cases
from jasper_fast.bench.tune import tune
from jasper_fast.dispatch import backends
from jasper_fast.kernels import launch, tables

ROOT = Path(__file__).resolve().parents[1]
CPU_RUN = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
SHAPE = {"c_in": 16, "c_out": 24, "taps": 3, "stride": 1, "dilation": 1}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    interpreted()
    monkeypatch.setattr(machine, "_git", lambda *_: "abc")  # who commits meanwhile must not end a --resume
    monkeypatch.setattr(tune, "born", time.monotonic)  # pytest's process is older than a budget


def run(out: Path, *more: str, ops: str = "forward") -> tuple[int, dict]:
    """Exit status and result of a run on the stand-in."""
    status = main(["tune", "--device", "cpu", "--seconds", "0.05", "--out", str(out), "--ops", ops, *more])
    return status, written(out)


def written(out: Path) -> dict:
    """The only result in a folder."""
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


def command(out: Path, *more: str, script: str | None = None) -> list[str]:
    """The command as a process of its own; `script` prepares it and hands over to `main`."""
    start = ["-c", script + HANDS_OVER] if script else ["-m", "bench"]
    return [sys.executable, *start, "tune", "--device", "cpu", "--seconds", "0.05", "--out", str(out), *more]


HANDS_OVER = """
import sys
from jasper_fast.bench.cli import main
from jasper_fast.bench.harness import machine
machine._git = lambda *_: "abc"
sys.exit(main(sys.argv[1:]))
"""


def process(argv: list[str], **env: str) -> subprocess.CompletedProcess:
    """Runs a process with Triton's interpreter and the variables in `env` to its end."""
    env = os.environ | {"TRITON_INTERPRET": "1"} | env
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)


def cases(data: dict) -> dict[str, dict[str, dict]]:
    """{case: {contender: row}}."""
    found: dict[str, dict[str, dict]] = {}
    for row in data["rows"]:
        found.setdefault(row["id"].rsplit(" / ", 1)[0], {})[row["contender"]] = row
    return found


# ---- end to end ----


@pytest.mark.slow
def test_the_command_times_right_tiles_faces_and_the_library_and_makes_a_table(tmp_path):
    done = process(command(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = written(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert data["finished"] and data["command"] == "tune"
    assert {row["status"] for row in data["rows"]} == {"ok"}, done.stdout
    wanted = tune_cases.plan(torch.device("cpu"), tune_cases.OPS)
    assert {op for op, *_ in wanted} == set(tune_cases.OPS)
    assert len(cases(data)) == len(wanted) == 12
    for rows in cases(data).values():
        if next(iter(rows.values()))["key"]["op"] in tables.NORM_OPS:
            assert set(rows) == {"triton", "reference"}, "the CUDA face runs on a GPU only"
        else:
            assert len(rows) == 3 and "aten" in rows

    table = tables.parse(data["table"], "the result")
    assert len(table.rows) == 2 * len(wanted), "the best of ours and plain PyTorch, each"
    for row in table.rows:
        same = [r for r in data["rows"] if r["tune"]["op"] == row.op and r["tune"]["face"] == row.face
                and r["tune"]["c_in"] == row.c_in]  # fmt: skip
        best = min(same, key=lambda r: r["time_s"]["median"])
        assert (row.time_s, row.tile) == (best["time_s"]["median"], best["tune"]["tile"])
        assert row.rows_log2 == tables.bucket(28)
    for column in ("fastest of ours", "PyTorch / ours", "bn_relu_dropout.backward", "GB/s"):
        assert column in done.stdout


@pytest.mark.parametrize(("interpret", "ops", "told"), [
    (None, "forward", "set TRITON_INTERPRET=1"), ("1", "forward,backward", "--ops backward: not one of all, forward"),
])  # fmt: skip
def test_what_cannot_be_tuned_is_told(tmp_path, monkeypatch, interpret, ops, told):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if interpret is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match=told):
        run(tmp_path, ops=ops)


def test_help_tells_the_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["tune", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for option in ("--device", "--dtype", "--ops", "--seconds", "--budget", "--out", "--resume", "--install"):
        assert option in said


# ---- what is refused ----


@pytest.fixture
def second_tile(monkeypatch):
    """Makes the conv's forward wrong for one of the candidates; returns a function that sets the fault."""

    def spoil(fault):
        def forward(right, *args, **kwargs):
            y = right(*args, **kwargs)
            tile = tables.lookup("conv1d.forward", CPU_RUN.device, torch.float32, **SHAPE, rows=28).tile
            spoilt = tile["num_stages"] == 4 and launch.run.__name__ != "only_compile"
            return fault(y) if spoilt else y

        with monkeypatch.context() as patch:
            wrap(patch, backends.face("conv1d", "triton"), "forward", forward)
            yield

    return contextlib.contextmanager(spoil)


def raising(_out):
    raise RuntimeError("out of resource: shared memory\nmore")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status", "why"),
    [
        (lambda y: y * 1.01, "wrong", "y: max error"),
        (lambda y: torch.where(torch.arange(y.shape[2]) == 5, 0.0, y), "wrong", "y: max error"),
        (raising, "failed", "RuntimeError: out of resource: shared memory"),
    ],
    ids=["scaled", "a row dropped", "does not run"],
)
def test_a_wrong_or_failing_tile_is_a_row_and_never_chosen(tmp_path, second_tile, fault, status, why):
    with second_tile(fault):
        code, data = run(tmp_path)
    assert code == 0
    rows = [r for r in data["rows"] if r["contender"] != "aten" and r["tune"]["tile"]["num_stages"] == 4]
    assert len(rows) == 2 and all(row["status"] == status and row["why"].startswith(why) for row in rows)
    assert all("time_s" not in row for row in rows)
    chosen = [row for row in data["table"]["rows"] if row["face"] == "triton"]
    assert [row["tile"]["num_stages"] for row in chosen] == [3, 3]


@pytest.mark.slow
def test_a_stale_result_is_refused(tmp_path, second_tile):
    first = []

    def stale(y):
        first.append(y)
        return first[0] if y.shape == first[0].shape else y

    with second_tile(stale):
        _, data = run(tmp_path)
    rows = next(iter(cases(data).values()))
    assert [r["status"] for r in rows.values() if r["contender"] != "aten"] == ["ok", "wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stats", "forward", "backward_reduce", "backward_apply"])
def test_a_face_that_is_wrong_is_a_row_and_never_chosen(tmp_path, monkeypatch, name):
    def spoilt(right, *args, **more):
        out = right(*args, **more)
        return out * 1.01 if isinstance(out, torch.Tensor) else tuple(None if t is None else t * 1.01 for t in out)

    wrap(monkeypatch, backends.face("bn_relu_dropout", "triton"), name, spoilt)
    code, data = run(tmp_path, ops=",".join(tables.NORM_OPS))
    assert code == 0 and data["finished"]
    status = {(row["key"]["op"], row["contender"]): row["status"] for row in data["rows"]}
    bad = "bn_relu_dropout.forward" if name in ("stats", "forward") else "bn_relu_dropout.backward"
    assert status == {(op, face): "wrong" if (op, face) == (bad, "triton") else "ok"
                      for op in tables.NORM_OPS for face in ("triton", "reference")}  # fmt: skip
    table = tables.parse(data["table"], "the result")
    assert {(row.op, row.face) for row in table.rows} == {key for key, found in status.items() if found == "ok"}
    assert all({k: getattr(row, k) for k in tables.SHAPE} == tables.shape_of_norm(24) for row in table.rows)


def kernel(*built: int) -> dict:
    """A kernel by its grid, whose launch gives what was compiled: registers, shared bytes and spills; or nothing."""
    registers, shared, spills = built or (0, 0, 0)
    one = SimpleNamespace(n_regs=registers, n_spills=spills, metadata=SimpleNamespace(shared=shared))
    return {(1,): lambda *args, **meta: one if built else None}


def test_facts_are_the_most_of_all_kernels_of_a_call():
    before = launch.run
    with tune_builders.compiled() as facts:
        for built in ((128, 4096, 0), (96, 65536, 3), ()):
            launch.run(kernel(*built), (1,), torch.ones(1))
    assert facts == {"registers": 128, "shared": 65536, "spilled": 12}
    assert launch.run is before


@pytest.mark.slow
def test_a_tile_that_spills_is_refused(tmp_path, monkeypatch):
    facts = itertools.cycle([(255, 16), (90, 0)])
    found = lambda: dict(zip(("registers", "spilled"), next(facts), strict=True)) | {"shared": 1024}  # noqa: E731
    monkeypatch.setattr(tune_builders, "compiled", lambda: contextlib.nullcontext(found()))
    _, data = run(tmp_path)
    for rows in cases(data).values():
        library = rows.pop("aten")
        (refused,) = [row for row in rows.values() if row["status"] != "ok"]
        assert (refused["status"], refused["why"]) == ("failed", "RuntimeError: spills 16 bytes")
        assert len(rows) == 2 and library["status"] == "ok"
    ours = [row for row in data["table"]["rows"] if row["face"] == "triton"]
    assert [(row["registers"], row["shared"], row["spilled"]) for row in ours] == [(90, 1024, 0)] * 2


# ---- the library beside them ----


@pytest.mark.slow
@pytest.mark.parametrize("function", tune_cases.CONV_OPS)
def test_the_library_is_compared_by_what_its_timed_call_computes(function, monkeypatch):
    """It is also right on new inputs at once: nothing depends on the inputs before."""
    layer = tune_cases.layers(CPU_RUN.device)[0]
    case = tune_cases.make_case(CPU_RUN, function, layer, (2, 14), tune_builders.Trial(Path("unused")))
    m = Measurement(case.only([tune_cases.LIBRARY]))
    checking.prepare(m)
    assert m.runners.keys() == {tune_cases.LIBRARY}, m.failed

    name = {"wgrad": "wgrad", "dgrad": "dgrad", "dgrad_bn": "dgrad"}.get(function, "forward")
    low = {k: v.clone() for k, v in case.low().items()}
    m.case = dataclasses.replace(m.case, low=lambda: low)
    called = (F, "conv2d") if function == "fused" else (backends.face("conv1d", "aten"), name)
    wrap(monkeypatch, *called, lambda right, *args, **more: 1.01 * right(*args, **more))
    checking.check(m, (2,))
    assert m.failed[tune_cases.LIBRARY][0] == "wrong"


@pytest.mark.parametrize("function", ["forward", "forward_stats", "dgrad", "dgrad_bn", "fused"])
def test_the_librarys_weight_is_cast_and_ordered_once(monkeypatch, function):
    """Otherwise cuDNN would copy it to channels-last memory in every call, which is not part of a conv."""
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    layer = tune_cases.layers(run.device)[0]
    forward = spied(monkeypatch, F, "conv2d", lambda x, weight, *_: weight)
    aten = backends.face("conv1d", "aten")
    backward = spied(monkeypatch, aten, "_backward", lambda dy, x, weight, *_: weight.unsqueeze(2))
    case = tune_cases.make_case(run, function, layer, (2, 14), tune_builders.Trial(Path("unused")))
    runner = case.contenders[-1].build()
    runner.run()
    first = (forward + backward)[-1].clone()
    case.refill(7)
    runner.run()
    seen = forward + backward
    assert all(w.is_contiguous(memory_format=torch.channels_last) and w.dtype == torch.bfloat16 for w in seen)
    assert len({w.data_ptr() for w in seen}) == 1, "a captured graph reads the same memory"
    assert torch.equal(seen[-1].squeeze(2), case.refill.__self__.case.inputs["weight"].bfloat16())
    assert not torch.equal(first, seen[-1])


# ---- compiling ahead ----


def test_all_tiles_of_a_case_are_compiled_before_the_first_is_launched(tmp_path, monkeypatch):
    kernel = importlib.import_module("jasper_fast.kernels.conv1d.triton_forward").conv1d_forward_kernel
    log = spied(monkeypatch, launch, "run", lambda *args, **meta: "launched")
    before = launch.run

    def compiling(right, self, *args, warmup, **more):
        if self is kernel and warmup:
            log.append(more["num_stages"])
        return right(self, *args, warmup=warmup, **more)

    wrap(monkeypatch, type(kernel), "run", compiling)
    trial = tune_builders.Trial(tmp_path / "trying")
    case = tune_cases.make_case(CPU_RUN, *tune_cases.plan(CPU_RUN.device, ("forward",))[0], trial)
    tune_builders.compile_ahead(CPU_RUN, case, trial)
    assert [line for line in log if line != "launched"] == [3, 4]
    assert log[-1] != "launched" and launch.run is before
    assert not trial.path.exists()


@pytest.mark.slow
def test_a_process_that_dies_while_it_compiles_ahead_compiles_one_after_another_next_time(tmp_path, monkeypatch):
    def dying(calls):
        raise SystemExit(77)

    monkeypatch.setattr(tune_builders, "_compile_ahead", dying)
    with pytest.raises(SystemExit):
        run(tmp_path)
    with pytest.raises(SystemExit):  # the note of the first case's end is a row now, and the second dies as well
        run(tmp_path, "--resume")
    code, data = run(tmp_path, "--resume")
    assert code == 0 and data["finished"]
    failed = [row for row in data["rows"] if row["status"] != "ok"]
    assert {row["contender"] for row in failed} == {tune_builders.AHEAD} and len(failed) == len(cases(data)) == 2
    assert len(data["table"]["rows"]) == 4


def test_an_interruption_leaves_nothing_of_the_asynchronous_mode(monkeypatch):
    mode = importlib.import_module("triton.runtime._async_compile").active_mode
    before = launch.run

    def cut():
        assert launch.run is not before
        raise OutOfTime

    with pytest.raises(OutOfTime):
        contextvars.copy_context().run(tune_builders._compile_ahead, [cut])
    assert mode.get() is None and launch.run is before


# ---- interruption ----


def at_the_second_case(monkeypatch, happens) -> list[str]:
    """`happens(trial, case)` when the second case of a run is measured; gives the ids of those that were begun."""
    seen: list[str] = []

    def measure(right, run, m, trial):
        seen.append(m.case.id)
        if len(seen) == 2:
            happens(trial, m.case)
        return right(run, m, trial)

    wrap(monkeypatch, tune, "measure", measure)
    return seen


@pytest.mark.slow
def test_a_run_without_time_is_unfinished_and_resume_keeps_what_is_there(tmp_path, monkeypatch):
    def out_of_time(trial, case):
        raise OutOfTime

    seen = at_the_second_case(monkeypatch, out_of_time)
    code, data = run(tmp_path, ops="forward,wgrad")
    assert code == tune.OUT_OF_TIME == 4 and not data["finished"]
    assert list(cases(data)) == seen[:1]
    assert {r["op"] for r in data["table"]["rows"]} == {"conv1d.forward"}, "the table as far as it has come"

    kept = data["rows"]
    code, data = run(tmp_path, "--resume", ops="forward,wgrad")
    assert code == 0 and data["finished"] and data["resumed"] == 1
    assert [row for row in data["rows"] if row["id"].startswith(seen[0])] == kept
    assert len(cases(data)) == 4 and len(data["table"]["rows"]) == 8


@pytest.mark.slow
def test_the_budget_ends_a_run(tmp_path):
    code, data = run(tmp_path, "--budget", "0.001")
    assert code == tune.OUT_OF_TIME and not data["finished"] and data["rows"] == []


@pytest.mark.slow
def test_the_budget_counts_from_the_process_s_start(tmp_path, monkeypatch):
    born = time.monotonic() - 100.0
    monkeypatch.setattr(tune, "born", lambda: born)
    assert run(tmp_path, "--budget", "100")[0] == tune.OUT_OF_TIME


@pytest.mark.slow
def test_a_process_knows_when_it_started():
    code = "import time; time.sleep(1.0); from jasper_fast.bench.tune import tune; print(tune.LOADED - tune.born())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1.0 <= float(done.stdout) < tune.LONGEST_START


SLOW = """
import hashlib, os, sys
from jasper_fast.dispatch import backends
impl = backends.face("conv1d", "triton")
right = impl.forward
def forward(*args, **kwargs):
    if os.environ.get("SLOW") and args[0].shape[1] == 24:
        print("in it", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 400_000_000)  # minutes in C, without the interpreter's lock
    return right(*args, **kwargs)
impl.forward = forward
"""


@pytest.mark.slow
def test_a_parent_that_ends_the_process_accuses_no_configuration(tmp_path):
    """SIGTERM while for instance a compiler runs outside Python; then SIGKILL, from a parent that is out of time."""
    argv = command(tmp_path, "--ops", "forward", script=SLOW)
    env = os.environ | {"TRITON_INTERPRET": "1", "SLOW": "1"}
    slow = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert slow.stdout.readline() == "in it\n"
    (trying,) = tmp_path.glob("*.trying")
    slow.terminate()
    until = time.monotonic() + 300.0
    while trying.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert slow.poll() is None and not trying.exists()
    slow.kill()
    slow.communicate()
    data = written(tmp_path)
    assert list(cases(data)) and {row["status"] for row in data["rows"]} == {"ok"}
    done = process([*argv, "--resume"])
    data = written(tmp_path)
    assert done.returncode == 0, done.stderr
    assert data["finished"] and {row["status"] for row in data["rows"]} == {"ok"}


@pytest.mark.slow
def test_a_process_that_is_ended_says_so_and_writes_what_there_is(tmp_path, monkeypatch):
    def ended(trial, case):
        trial.begin(case.ours)
        signal.raise_signal(signal.SIGTERM)

    seen = at_the_second_case(monkeypatch, ended)
    before = signal.getsignal(signal.SIGTERM)
    code, data = run(tmp_path)
    assert code == 143 and not data["finished"] and list(cases(data)) == seen[:1] and data["table"]["rows"]
    assert not list(tmp_path.glob("*.trying"))
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
def test_a_person_who_interrupts_accuses_no_configuration(tmp_path, monkeypatch):
    def interrupted(run, m, trial):
        trial.begin(m.case.ours)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tune, "measure", interrupted)
        assert run(tmp_path)[0] == 130
    _, data = run(tmp_path, "--resume")
    assert data["resumed"] == 1 and {row["status"] for row in data["rows"]} == {"ok"}


KILL = """
import os, sys
from jasper_fast.dispatch import backends
from jasper_fast.kernels import launch, tables
import torch
impl = backends.face("conv1d", "triton")
right = impl.forward
def forward(*args, **kwargs):
    row = tables.lookup("conv1d.forward", torch.device("cpu"), torch.float32, c_in=16, c_out=24, taps=3, stride=1,
                        dilation=1, rows=28)
    if row.tile["num_stages"] == 4 and launch.run.__name__ != "only_compile":
        os._exit(77)
    return right(*args, **kwargs)
impl.forward = forward
"""


@pytest.mark.slow
def test_a_configuration_that_ends_the_process_is_skipped_by_the_next_one(tmp_path):
    argv = command(tmp_path, "--ops", "forward", script=KILL)
    done = [process([*argv, *more]) for more in ([], ["--resume"], ["--resume"])]
    assert [one.returncode for one in done] == [77, 77, 0], done[-1].stderr
    data = written(tmp_path)
    assert not list(tmp_path.glob("*.trying"))
    assert data["finished"]
    assert len(cases(data)) == 2
    for rows in cases(data).values():
        failed = [row for row in rows.values() if row["status"] != "ok"]
        assert len(rows) == 3 and len(failed) == 1
        assert "an earlier process ended" in failed[0]["why"] and "stages 4" in failed[0]["contender"]
    assert len(data["table"]["rows"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("when", [1, 3], ids=["in its first call", "in its first timing"])
def test_a_lost_device_ends_the_run_and_is_remembered(tmp_path, second_tile, monkeypatch, when):
    calls = []

    def losing(y):
        calls.append(None)
        lost()
        return y

    def lost(device=None):
        if len(calls) >= when:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with second_tile(losing), monkeypatch.context() as patch:
        patch.setattr(devices, "synchronize", lost)
        code, data = run(tmp_path)
    assert code == 3 and not data["finished"] and data["rows"] == []
    code, data = run(tmp_path, "--resume")
    assert code == 0 and data["finished"]
    (refused,) = [row for row in data["rows"] if row["status"] != "ok"]
    assert "lost the device" in refused["why"] and "stages 4" in refused["contender"]


@pytest.mark.slow
def test_a_case_that_cannot_be_measured_costs_the_others_nothing(tmp_path, monkeypatch):
    """For instance, there is no memory for its reference."""

    def prepare(right, m):
        if "16->24" in m.case.id:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        right(m)

    wrap(monkeypatch, checking, "prepare", prepare)
    code, data = run(tmp_path)
    assert code == 0 and data["finished"]
    first, second = cases(data).values()
    assert {row["status"] for row in first.values()} == {"failed"} and len(first) == 3
    assert all("CUDA out of memory" in row["why"] for row in first.values())
    assert {row["status"] for row in second.values()} == {"ok"}
    assert {row["c_in"] for row in data["table"]["rows"]} == {24}
