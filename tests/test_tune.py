"""`python -m bench tune` on the stand-in: what it measures, refuses and keeps, interruption, tables from results."""

from __future__ import annotations

import dataclasses
import importlib
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
from conftest import make_face

from jasper_fast.bench.cases import counts, models
from jasper_fast.bench.cli import main
from jasper_fast.bench.harness import checking, devices, machine
from jasper_fast.bench.harness.errors import OutOfTime
from jasper_fast.bench.harness.measurement import Measurement
from jasper_fast.bench.tune import builders as tune_builders
from jasper_fast.bench.tune import cases as tune_cases
from jasper_fast.bench.tune import table as tune_table
from jasper_fast.bench.tune import tune
from jasper_fast.dispatch import backends
from jasper_fast.kernels import launch, tables
from jasper_fast.kernels.operands import Mask

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
SHAPE = {"c_in": 16, "c_out": 24, "taps": 3, "stride": 1, "dilation": 1}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    make_face("triton")
    if torch.cuda.is_available():
        pytest.skip("the stand-in runs where Triton interprets")
    monkeypatch.setattr(machine, "_git", lambda *_: "abc")  # who commits meanwhile must not end a --resume
    monkeypatch.setattr(tune, "born", time.monotonic)  # pytest's process is older than a budget


def run(out: Path, *more: str, ops: str = "forward") -> tuple[int, dict]:
    """Exit status and result of a run on the stand-in."""
    status = main(["tune", "--device", "cpu", "--seconds", "0.05", "--out", str(out), "--ops", ops, *more])
    (path,) = out.glob("tune_*.json")
    return status, json.loads(path.read_text())


def cases(data: dict) -> dict[str, dict[str, dict]]:
    """{case: {contender: row}}."""
    found: dict[str, dict[str, dict]] = {}
    for row in data["rows"]:
        found.setdefault(row["id"].rsplit(" / ", 1)[0], {})[row["contender"]] = row
    return found


# ---- end to end ----


def test_the_command_times_right_tiles_faces_and_the_library_and_makes_a_table(tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "1"}
    argv = [sys.executable, "-m", "bench", "tune", "--device", "cpu", "--seconds", "0.05", "--out", str(tmp_path)]
    done = subprocess.run([*argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
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


def test_without_the_interpreter_a_cpu_is_told_how(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match="set TRITON_INTERPRET=1"):
        main(["tune", "--device", "cpu", "--out", str(tmp_path)])


def test_an_unknown_op_is_told(tmp_path):
    with pytest.raises(SystemExit, match="--ops backward: not one of all, forward"):
        main(["tune", "--device", "cpu", "--ops", "forward,backward", "--out", str(tmp_path)])


def test_help_tells_the_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["tune", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    for option in ("--device", "--dtype", "--ops", "--seconds", "--budget", "--out", "--resume", "--install"):
        assert option in said


# ---- what is tuned ----


def test_every_conv_of_the_network_is_tuned_once_and_the_heaviest_first():
    layers = tune_cases.layers(GPU)
    cfg = models.config("jasper10x5")
    convs = list(counts.convs(cfg, 1, 840))
    assert {(c.C_in, c.C_out, c.K) for c in convs} == {(layer.c_in, layer.c_out, layer.taps) for layer in layers}
    assert len({layer[:5] for layer in layers}) == len(layers)
    assert sum(layer.share for layer in layers) == pytest.approx(1.0)
    assert [layer.share for layer in layers] == sorted((layer.share for layer in layers), reverse=True)
    weight = {c.name: c.C_in * c.C_out * c.K for c in convs}
    heaviest = [c for c in convs if (c.C_in, c.C_out, c.K) == layers[0][:3]]
    assert layers[0].share == pytest.approx(sum(weight[c.name] for c in heaviest) / sum(weight.values()), rel=0.05)
    kinds = {layer[:5]: layer.kind for layer in layers}
    assert kinds[64, 256, 11, 2, 1] == "prologue"
    assert kinds[768, 896, 29, 1, 2] == "main"
    assert kinds[1024, 29, 1, 1, 1] == "decoder"
    assert kinds[256, 768, 1, 1, 1] == "pane"
    assert kinds[896, 1024, 1, 1, 1] == "main"


def test_the_order_is_by_share_and_training_and_inference_both_come_early():
    todo = tune_cases.plan(GPU, tune_cases.OPS)
    assert len(set(todo)) == len(todo)
    heaviest = tune_cases.layers(GPU)[0]
    assert [layer for _, layer, _ in todo[:6]] == [heaviest] * 6
    assert {op for op, *_ in todo[:6]} == set(tune_cases.CONV_OPS)
    assert {batch for _, _, batch in todo[:6]} == {tune_cases.TRAINING[0], tune_cases.INFERENCE[0]}
    first = {layer: i for i, (_, layer, _) in reversed(list(enumerate(todo)))}
    shares = [layer.share for layer in sorted(first, key=first.__getitem__)]
    assert shares == sorted(shares, reverse=True)
    for op, layer, batch in todo:
        assert op in tune_cases.used(layer.kind)
        assert batch in (tune_cases.INFERENCE if op == "fused" else tune_cases.TRAINING)
        assert not (op.startswith("dgrad") and layer.stride > 1)


def test_the_candidates_of_a_gpu_can_be_rows_of_a_table():
    """Their labels tell them apart, and every one has the form that a table wants."""
    from jasper_fast.kernels.conv1d import triton_tiles

    for layer in tune_cases.layers(GPU):
        for op in tune_cases.used(layer.kind):
            for n, frames in tune_cases.INFERENCE if op == "fused" else tune_cases.TRAINING:
                shape = triton_tiles.Shape(*layer[:5], n * frames)
                tiles = [c._asdict() for c in triton_tiles.candidates(op, torch.bfloat16, shape, frames)]
                assert tiles and len({json.dumps(t) for t in tiles}) == len(tiles)
                faults = [tables.tile_fault(f"conv1d.{op}", "bfloat16", tile) for tile in tiles]
                assert faults[0] is None, f"the default of {op} for {layer}: {faults[0]}"
                assert sum(fault is None for fault in faults) > len(tiles) / 2


def test_every_width_of_the_norms_is_tuned_both_ways_at_the_training_batches():
    widths = tune_cases.norms(GPU)
    model = models.config("jasper10x5").encoder
    assert {layer.c_in for layer in widths} == {block.filters for block in model.blocks}
    assert all(layer == (layer.c_in, layer.c_in, 1, 1, 1, "norm", layer.share) for layer in widths)
    assert [layer.share for layer in widths] == sorted((layer.share for layer in widths), reverse=True)
    rows = {b.filters: 0 for b in model.blocks}
    for block in model.blocks:
        rows[block.filters] += block.repeat * block.filters
    most = max(rows, key=rows.__getitem__)
    assert widths[0].c_in == most and widths[0].share / widths[-1].share == pytest.approx(
        rows[most] / rows[widths[-1].c_in]
    )
    assert 0.1 < sum(layer.share for layer in widths) < 0.5, "of the bytes of a step, which are the convs' too"

    todo = tune_cases.plan(GPU, tune_cases.OPS)
    found = [(op, layer, batch) for op, layer, batch in todo if layer.kind == "norm"]
    assert len(found) == 2 * len(widths) * len(tune_cases.TRAINING)
    assert {(op, batch) for op, _, batch in found} == {(o, b) for o in tables.NORM_OPS for b in tune_cases.TRAINING}
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first[1:] == second[1:] and first[0] != second[0], "one without the other chooses nothing"
    assert todo[0][1].kind != "norm" and todo[-1][1].kind != "norm"
    assert tune_cases.plan(GPU, tables.NORM_OPS) == found, "they can be asked for alone"


@pytest.mark.parametrize(("missing", "wanted"), [
    ((), ["triton", "cuda", "reference"]), (("cuda",), ["triton", "reference"]),
])  # fmt: skip
def test_the_contenders_of_a_norm_are_the_faces_that_the_machine_has(monkeypatch, missing, wanted):
    monkeypatch.setattr(backends, "why_missing", lambda face, kind: "not built" if face in missing else None)
    run = SimpleNamespace(device=GPU, dtype=torch.bfloat16)
    op, layer, batch = tune_cases.plan(GPU, tables.NORM_OPS)[0]
    case = tune_cases.make_case(run, op, layer, batch, None)
    assert [c.name for c in case.contenders] == wanted and case.ours == "triton"
    (n, frames), c = batch, layer.c_in
    assert case.nbytes == 2 * n * frames * c * {"forward": 3, "backward": 5}[op.split(".")[1]]
    for contender in case.contenders:
        row = contender.row
        assert {k: row[k] for k in tables.SHAPE} == tables.shape_of_norm(c)
        assert (row["op"], row["face"], row["tile"]) == (op, contender.name, None)
        assert row["rows_log2"] == tables.bucket(n * frames)


def test_a_norm_is_called_as_a_training_step_calls_it(monkeypatch):
    """Statistics and forward; reduction and gradient: with lengths, dropout, a halo and the batch's means."""
    impl, calls = backends.face("bn_relu_dropout", "triton"), []

    def watched(name):
        right = getattr(impl, name)

        def call(*args, **more):
            calls.append((name, args, more))
            return right(*args, **more)

        return call

    for name in ("stats", "forward", "backward_reduce", "backward_apply"):
        monkeypatch.setattr(impl, name, watched(name))
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    wanted = {"forward": ["stats", "forward"], "backward": ["backward_reduce", "backward_apply"]}
    for op, layer, batch in tune_cases.plan(run.device, tables.NORM_OPS):
        calls.clear()
        case = tune_cases.make_case(run, op, layer, batch, tune_builders.Trial(Path("unused")))
        held = case.refill.__self__
        held.call("triton")
        assert [name for name, *_ in calls] == wanted[op.split(".")[1]]
        for name, args, _ in calls:
            if name == "stats":
                continue
            lengths, seed, p = next(arg for arg in args if isinstance(arg, Mask))
            assert lengths.tolist() == [batch[1]] * batch[0] and seed.numel() == 1 and p == 0.2
            if name == "backward_apply":
                assert args[4] is not None and args[7] == 2  # means of the batch, halo


# ---- what is refused ----


@pytest.fixture
def second_tile(monkeypatch):
    """Spoils what the conv's forward gives with one of the candidates: gives the setter of the fault."""
    impl = backends.face("conv1d", "triton")
    right = impl.forward

    def spoil(fault):
        def forward(*args, **kwargs):
            tile = tables.lookup("conv1d.forward", torch.device("cpu"), torch.float32, **SHAPE, rows=28).tile
            if launch.run.__name__ == "only_compile":
                return right(*args, **kwargs)
            return fault(right(*args, **kwargs)) if tile["num_stages"] == 4 else right(*args, **kwargs)

        monkeypatch.setattr(impl, "forward", forward)

    return spoil


def raising(_out):
    raise RuntimeError("out of resource: shared memory\nmore")


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
    second_tile(fault)
    code, data = run(tmp_path)
    assert code == 0
    rows = [r for r in data["rows"] if r["contender"] != "aten" and r["tune"]["tile"]["num_stages"] == 4]
    assert len(rows) == 2 and all(row["status"] == status and row["why"].startswith(why) for row in rows)
    assert all("time_s" not in row for row in rows)
    chosen = [row for row in data["table"]["rows"] if row["face"] == "triton"]
    assert [row["tile"]["num_stages"] for row in chosen] == [3, 3]


def test_a_stale_result_is_refused(tmp_path, second_tile):
    first = []

    def stale(y):
        first.append(y)
        return first[0] if y.shape == first[0].shape else y

    second_tile(stale)
    _, data = run(tmp_path)
    rows = next(iter(cases(data).values()))
    assert [r["status"] for r in rows.values() if r["contender"] != "aten"] == ["ok", "wrong"]


@pytest.mark.parametrize("name", ["stats", "forward", "backward_reduce", "backward_apply"])
def test_a_face_that_is_wrong_is_a_row_and_never_chosen(tmp_path, monkeypatch, name):
    impl = backends.face("bn_relu_dropout", "triton")
    right = getattr(impl, name)

    def spoilt(*args, **more):
        out = right(*args, **more)
        return out * 1.01 if isinstance(out, torch.Tensor) else tuple(None if t is None else t * 1.01 for t in out)

    monkeypatch.setattr(impl, name, spoilt)
    code, data = run(tmp_path, ops=",".join(tables.NORM_OPS))
    assert code == 0 and data["finished"]
    status = {(row["key"]["op"], row["contender"]): row["status"] for row in data["rows"]}
    bad = "bn_relu_dropout.forward" if name in ("stats", "forward") else "bn_relu_dropout.backward"
    assert status == {(op, face): "wrong" if (op, face) == (bad, "triton") else "ok"
                      for op in tables.NORM_OPS for face in ("triton", "reference")}  # fmt: skip
    table = tables.parse(data["table"], "the result")
    assert {(row.op, row.face) for row in table.rows} == {key for key, found in status.items() if found == "ok"}
    assert all({k: getattr(row, k) for k in tables.SHAPE} == tables.shape_of_norm(24) for row in table.rows)


class Built:
    """A compiled kernel as Triton gives it back."""

    def __init__(self, registers: int, shared: int, spills: int):
        self.n_regs, self.n_spills = registers, spills
        self.metadata = type("Metadata", (), {"shared": shared})


class Kernel:
    def __init__(self, built):
        self.built = built

    def __getitem__(self, grid):
        return lambda *args, **meta: self.built


def test_facts_are_the_most_of_all_kernels_of_a_call():
    before = launch.run
    with tune_builders.compiled() as facts:
        launch.run(Kernel(Built(128, 4096, 0)), (1,), torch.ones(1))
        launch.run(Kernel(Built(96, 65536, 3)), (1,), torch.ones(1))
        launch.run(Kernel(None), (1,), torch.ones(1))
    assert facts == {"registers": 128, "shared": 65536, "spilled": 12}
    assert launch.run is before


def test_a_tile_that_spills_is_refused(tmp_path, monkeypatch):
    import contextlib

    calls = []

    @contextlib.contextmanager
    def compiled():
        calls.append(None)
        yield {"registers": 255 if len(calls) % 2 else 90, "shared": 1024, "spilled": 16 if len(calls) % 2 else 0}

    monkeypatch.setattr(tune_builders, "compiled", compiled)
    _, data = run(tmp_path)
    for rows in cases(data).values():
        library = rows.pop("aten")
        (refused,) = [row for row in rows.values() if row["status"] != "ok"]
        assert (refused["status"], refused["why"]) == ("failed", "RuntimeError: spills 16 bytes")
        assert len(rows) == 2 and library["status"] == "ok"
    ours = [row for row in data["table"]["rows"] if row["face"] == "triton"]
    assert [(row["registers"], row["shared"], row["spilled"]) for row in ours] == [(90, 1024, 0)] * 2


# ---- the library beside them ----


@pytest.mark.parametrize("function", tune_cases.CONV_OPS)
def test_the_library_is_compared_by_what_its_timed_call_computes(function, monkeypatch):
    """And right at once on the inputs that follow: nothing is left from those before."""
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    layer = tune_cases.layers(run.device)[0]
    case = tune_cases.make_case(run, function, layer, (2, 14), tune_builders.Trial(Path("unused")))
    m = Measurement(case.only([tune_cases.LIBRARY]))
    checking.prepare(m)
    assert m.runners.keys() == {tune_cases.LIBRARY}, m.failed

    name = {"wgrad": "wgrad", "dgrad": "dgrad", "dgrad_bn": "dgrad"}.get(function, "forward")
    aten = backends.face("conv1d", "aten")
    right, conv2d = getattr(aten, name), torch.nn.functional.conv2d
    low = {k: v.clone() for k, v in case.low().items()}
    m.case = dataclasses.replace(m.case, low=lambda: low)
    if function == "fused":
        monkeypatch.setattr(tune_builders.F, "conv2d", lambda *args: 1.01 * conv2d(*args))
    else:
        monkeypatch.setattr(aten, name, lambda *args, **more: 1.01 * right(*args, **more))
    checking.check(m, (2,))
    assert m.failed[tune_cases.LIBRARY][0] == "wrong"


def test_the_librarys_weight_is_cast_and_ordered_once(monkeypatch):
    """cuDNN would copy it to channels-last memory in every call, which is no part of a conv."""
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    layer = tune_cases.layers(run.device)[0]
    for function in ("forward", "forward_stats", "dgrad", "dgrad_bn", "fused"):
        seen = []
        aten, conv2d, backward = backends.face("conv1d", "aten"), torch.nn.functional.conv2d, None
        backward = aten._backward

        def watched(x, weight, *rest, seen=seen, conv2d=conv2d):
            seen.append(weight)
            return conv2d(x, weight, *rest)

        def watched_backward(dy, x, weight, *rest, seen=seen, backward=backward):
            seen.append(weight.unsqueeze(2))
            return backward(dy, x, weight, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "conv2d", watched)
            patch.setattr(aten, "_backward", watched_backward)
            case = tune_cases.make_case(run, function, layer, (2, 14), tune_builders.Trial(Path("unused")))
            held = case.refill.__self__
            runner = case.contenders[-1].build()
            runner.run()
            first = [w.clone() for w in seen]
            case.refill(7)
            runner.run()
        assert all(w.is_contiguous(memory_format=torch.channels_last) and w.dtype == torch.bfloat16 for w in seen)
        assert len({w.data_ptr() for w in seen}) == 1, "a captured graph reads the same memory"
        assert torch.equal(seen[-1].squeeze(2), held.case.inputs["weight"].bfloat16())
        assert not torch.equal(first[-1], seen[-1])


# ---- compiling ahead ----


def test_all_tiles_of_a_case_are_compiled_before_the_first_is_launched(tmp_path, monkeypatch):
    log, real = [], launch.run

    def launching(kernel, grid, like, *args, **meta):
        log.append("launched")
        return real(kernel, grid, like, *args, **meta)

    kernel = importlib.import_module("jasper_fast.kernels.conv1d.triton_forward").conv1d_forward_kernel
    right = type(kernel).run

    def compiling(self, *args, warmup, **more):
        if self is kernel and warmup:
            log.append(f"stages {more['num_stages']}")
        return right(self, *args, warmup=warmup, **more)

    monkeypatch.setattr(launch, "run", launching)
    monkeypatch.setattr(type(kernel), "run", compiling)
    run_ = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    trial = tune_builders.Trial(tmp_path / "trying")
    op, layer, batch = tune_cases.plan(run_.device, ("forward",))[0]
    case = tune_cases.make_case(run_, op, layer, batch, trial)
    tune_builders.compile_ahead(run_, case, trial)
    assert [line for line in log if line != "launched"] == ["stages 3", "stages 4"]
    assert log[-1] != "launched" and launch.run is launching
    assert not trial.path.exists()


def test_a_process_that_dies_while_it_compiles_ahead_compiles_one_after_another_next_time(tmp_path, monkeypatch):
    def dying(calls):
        raise SystemExit(77)

    monkeypatch.setattr(tune_builders, "_compile_ahead", dying)
    with pytest.raises(SystemExit):
        run(tmp_path)
    code, data = run_resumed_until_it_ends(tmp_path)
    assert code == 0 and data["finished"]
    failed = [row for row in data["rows"] if row["status"] != "ok"]
    assert {row["contender"] for row in failed} == {tune_builders.AHEAD} and len(failed) == len(cases(data)) == 2
    assert len(data["table"]["rows"]) == 4


def run_resumed_until_it_ends(out: Path) -> tuple[int, dict]:
    for _ in range(3):
        try:
            return run(out, "--resume")
        except SystemExit:
            continue
    raise AssertionError("it dies each time")


def test_an_interruption_leaves_nothing_of_the_asynchronous_mode(monkeypatch):
    mode = importlib.import_module("triton.runtime._async_compile").active_mode
    before = launch.run

    def cut():
        assert launch.run is not before
        raise OutOfTime

    import contextvars

    with pytest.raises(OutOfTime):
        contextvars.copy_context().run(tune_builders._compile_ahead, [cut])
    assert mode.get() is None and launch.run is before


# ---- interruption ----


def test_a_run_without_time_is_unfinished_and_resume_keeps_what_is_there(tmp_path, monkeypatch):
    measure, seen = tune.measure, []

    def first_only(run, m, trial):
        seen.append(m.case.id)
        if len(seen) == 2:
            raise OutOfTime
        return measure(run, m, trial)

    monkeypatch.setattr(tune, "measure", first_only)
    code, data = run(tmp_path, ops="forward,wgrad")
    assert code == tune.OUT_OF_TIME == 4 and not data["finished"]
    assert list(cases(data)) == seen[:1]
    assert {r["op"] for r in data["table"]["rows"]} == {"conv1d.forward"}, "the table as far as it has come"

    kept = data["rows"]
    code, data = run(tmp_path, "--resume", ops="forward,wgrad")
    assert code == 0 and data["finished"] and data["resumed"] == 1
    assert [row for row in data["rows"] if row["id"].startswith(seen[0])] == kept
    assert len(cases(data)) == 4 and len(data["table"]["rows"]) == 8


def test_the_budget_ends_a_run(tmp_path):
    code, data = run(tmp_path, "--budget", "0.001")
    assert code == tune.OUT_OF_TIME and not data["finished"] and data["rows"] == []


def test_the_budget_counts_from_the_process_s_start(tmp_path, monkeypatch):
    born = time.monotonic() - 100.0
    monkeypatch.setattr(tune, "born", lambda: born)
    assert run(tmp_path, "--budget", "100")[0] == tune.OUT_OF_TIME


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
from jasper_fast.bench.cli import main
from jasper_fast.bench.harness import machine
machine._git = lambda *_: "abc"
sys.exit(main(sys.argv[1:]))
"""


def test_a_parent_that_ends_the_process_accuses_no_configuration(tmp_path):
    """SIGTERM while a compiler, say, keeps the process from Python; then SIGKILL, as a parent without time does."""
    env = os.environ | {"TRITON_INTERPRET": "1", "SLOW": "1"}
    argv = [sys.executable, "-c", SLOW, "tune", "--device", "cpu", "--seconds", "0.05", "--out", str(tmp_path),
            "--ops", "forward"]  # fmt: skip
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "in it\n"
    (trying,) = tmp_path.glob("*.trying")
    process.terminate()
    until = time.monotonic() + 300.0
    while trying.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None and not trying.exists()
    process.kill()
    process.communicate()
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert list(cases(data)) and {row["status"] for row in data["rows"]} == {"ok"}
    done = subprocess.run([*argv, "--resume"], cwd=ROOT, env=env | {"SLOW": ""}, capture_output=True, text=True)
    data = json.loads(path.read_text())
    assert done.returncode == 0, done.stderr
    assert data["finished"] and {row["status"] for row in data["rows"]} == {"ok"}


def test_a_process_that_is_ended_says_so_and_writes_what_there_is(tmp_path, monkeypatch):
    measure, seen = tune.measure, []

    def ended(run, m, trial):
        seen.append(m.case.id)
        if len(seen) == 2:
            trial.begin(m.case.ours)
            signal.raise_signal(signal.SIGTERM)
        return measure(run, m, trial)

    monkeypatch.setattr(tune, "measure", ended)
    before = signal.getsignal(signal.SIGTERM)
    code, data = run(tmp_path)
    assert code == 143 and not data["finished"] and list(cases(data)) == seen[:1] and data["table"]["rows"]
    assert not list(tmp_path.glob("*.trying"))
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1


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
from jasper_fast.bench.cli import main
from jasper_fast.bench.harness import machine
machine._git = lambda *_: "abc"
sys.argv = ["bench", *sys.argv[1:]]
sys.exit(main(sys.argv[1:]))
"""


def test_a_configuration_that_ends_the_process_is_skipped_by_the_next_one(tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "1"}
    argv = [sys.executable, "-c", KILL, "tune", "--device", "cpu", "--seconds", "0.05", "--out", str(tmp_path),
            "--ops", "forward"]  # fmt: skip
    codes = []
    for more in ([], ["--resume"], ["--resume"]):
        done = subprocess.run([*argv, *more], cwd=ROOT, env=env, capture_output=True, text=True)
        codes.append(done.returncode)
    assert codes == [77, 77, 0], done.stderr
    (path,) = tmp_path.glob("*.json")
    assert not list(tmp_path.glob("*.trying"))
    data = json.loads(path.read_text())
    assert data["finished"]
    assert len(cases(data)) == 2
    for rows in cases(data).values():
        failed = [row for row in rows.values() if row["status"] != "ok"]
        assert len(rows) == 3 and len(failed) == 1
        assert "an earlier process ended" in failed[0]["why"] and "stages 4" in failed[0]["contender"]
    assert len(data["table"]["rows"]) == 4


@pytest.mark.parametrize("when", [1, 3], ids=["in its first call", "in its first timing"])
def test_a_lost_device_ends_the_run_and_is_remembered(tmp_path, second_tile, monkeypatch, when):
    calls = []

    def losing(y):
        calls.append(None)
        if len(calls) >= when:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return y

    def synchronize(device):
        if len(calls) >= when:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    second_tile(losing)
    monkeypatch.setattr(devices, "synchronize", synchronize)
    code, data = run(tmp_path)
    assert code == 3 and not data["finished"] and data["rows"] == []
    calls.clear()
    second_tile(lambda y: y)
    code, data = run(tmp_path, "--resume")
    assert code == 0 and data["finished"]
    (refused,) = [row for row in data["rows"] if row["status"] != "ok"]
    assert "lost the device" in refused["why"] and "stages 4" in refused["contender"]


def test_a_case_that_cannot_be_measured_costs_the_others_nothing(tmp_path, monkeypatch):
    """Its reference has no memory, say."""
    right = checking.prepare

    def prepare(m):
        if "16->24" in m.case.id:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        right(m)

    monkeypatch.setattr(checking, "prepare", prepare)
    code, data = run(tmp_path)
    assert code == 0 and data["finished"]
    first, second = cases(data).values()
    assert {row["status"] for row in first.values()} == {"failed"} and len(first) == 3
    assert all("CUDA out of memory" in row["why"] for row in first.values())
    assert {row["status"] for row in second.values()} == {"ok"}
    assert {row["c_in"] for row in data["table"]["rows"]} == {24}


# ---- tables from results ----


def result(path: Path, *, gpu: str | None = "NVIDIA Imaginary 9000", driver: str = "580.1", **changes) -> Path:
    """A result file as a GPU's run leaves it, with one row of the table."""
    tile = {"t": 64, "n": 32, "k": 16, "num_warps": 4, "num_stages": 3, "splits": 1}
    row = tables.Row(op="conv1d.forward", dtype="bfloat16", **SHAPE, rows_log2=12, face="triton", algorithm="direct",
                     tile=tile, time_s=1e-3, registers=90, shared=1024, spilled=0)  # fmt: skip
    of = {"name": gpu or "a CPU", "gpu": gpu and {"name": gpu, "capability": "sm_90", "driver": driver}}
    of |= {"packages": {"torch": "2.13.0", "triton": "3.7.1"}, "commit": "abc", "dirty": False, "command": "x"}
    of |= {"date": "2026"}
    data = {"command": "tune", "machine": of}
    data["table"] = {"header": tune_table.table_header(data), "rows": [row.plain() | changes]}
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    where = tmp_path / "tables"
    monkeypatch.setenv("JASPER_FAST_TABLES", str(where))
    monkeypatch.setattr(tables, "_gpu_name", lambda index: "NVIDIA Imaginary 9000")
    tables._index.cache_clear()
    yield where
    tables._index.cache_clear()


def test_a_result_is_installed_and_chosen_from(tmp_path, own_tables):
    assert main(["tune", "--install", str(result(tmp_path / "r.json"))]) == 0
    found = tables.lookup("conv1d.forward", GPU, torch.bfloat16, **SHAPE, rows=4096)
    assert found.tile["t"] == 64
    assert [p.name for p in own_tables.iterdir()] == ["nvidia-imaginary-9000.json"]


def test_faces_are_installed_and_chosen_from_and_the_gate_has_no_more_to_compile(tmp_path, own_tables):
    from jasper_fast.bench.compile import launches

    path = result(tmp_path / "r.json")
    data = json.loads(path.read_text())
    (row,) = data["table"]["rows"]
    row |= dict.fromkeys(("tile", "registers", "shared", "spilled")) | tables.shape_of_norm(256)
    times = {"triton": (2.0, 3.0), "cuda": (3.0, 1.0)}
    data["table"]["rows"] = [
        row | {"op": op, "face": face, "time_s": spent}
        for face, both in times.items()
        for op, spent in zip(tables.NORM_OPS, both, strict=True)
    ]
    path.write_text(json.dumps(data))
    assert main(["tune", "--install", str(path)]) == 0
    shape = tables.shape_of_norm(256)
    assert tables.fastest(tables.NORM_OPS, GPU, torch.bfloat16, **shape, rows=4096) == "cuda"
    assert tables.fastest(tables.NORM_OPS[:1], GPU, torch.bfloat16, **shape, rows=4096) == "triton"
    assert list(launches.measured(90, "bfloat16")) == [], "a face without a tile is compiled with the rest"


def test_results_of_the_same_versions_add_up_and_others_are_replaced(tmp_path, own_tables):
    install = lambda **more: main(["tune", "--install", str(result(tmp_path / "r.json", **more))])  # noqa: E731
    rows = lambda: tables.for_gpu("NVIDIA Imaginary 9000").rows  # noqa: E731
    assert install() == install(dtype="float16") == install(time_s=5e-4) == 0
    assert [(r.dtype, r.time_s) for r in rows()] == [("bfloat16", 5e-4), ("float16", 1e-3)]
    assert install(driver="581.0", op="conv1d.dgrad") == 0
    assert [r.op for r in rows()] == ["conv1d.dgrad"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: result(path, gpu=None), "only a GPU's result can be a table"),
        (lambda path: result(path, spilled=8), "row 1: the kernel spills 8 bytes"),
        (lambda path: path, "cannot be read"),
        (lambda path: path.write_text('{"command": "kernels"}') and path, "no result of `python -m bench tune`"),
    ],
    ids=["stand-in", "faulty row", "no file", "another command"],
)
def test_what_is_no_result_of_a_gpu_is_refused(tmp_path, own_tables, make, told, capsys):
    assert main(["tune", "--install", str(make(tmp_path / "r.json"))]) == 1
    assert told in capsys.readouterr().err
    assert not own_tables.exists()
