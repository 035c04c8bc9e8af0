"""First-use tuning on an imaginary GPU: what it picks and refuses, what survives a kill, and who tunes when."""

import contextlib
import itertools
import json
import os
import random
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import interpreted, raising
from engines import block, config
from standins import (  # noqa: F401
    FP16,
    GPU,
    SHAPE,
    TILES,
    Died,
    conv_rows,
    forked,
    imaginary_gpus_table,
    tuning_on_an_imaginary_gpu,
    verdicts_of_its_own,
    wrap,
)

from jasper_fast import InferenceEngine, Jasper
from jasper_fast.cli.command import main
from jasper_fast.dispatch import backends, children, choose, tuned
from jasper_fast.kernels import files, tables
from jasper_fast.kernels.tables import Cell
from jasper_fast.nn.cells import cells, convs
from jasper_fast.tuning import work

CELLS = [Cell(f"conv1d.{op}", FP16, *SHAPE, 12) for op in ("forward", "forward_stats", "dgrad_bn", "wgrad")]
FAST, SLOW, LIBRARY = "triton 128x64x32 warps 4 stages 3", "triton 64x64x32 warps 4 stages 3", "aten library"


def kept() -> dict[Cell, dict[str, float]]:
    """Returns the seconds on disk, by cell and face."""
    rows = tuned.read(GPU)
    return {cell: {row.face: row.time_s for row in rows if row.cell == cell} for cell in {row.cell for row in rows}}


def conv_face(rows_log2: int = 12, dtype=torch.float16, ops=("conv1d.forward",)) -> str:
    return choose.conv_face("auto", GPU, dtype, shape=SHAPE, rows_log2=rows_log2, calls=ops)


def tune(tuning, cells: list[Cell], budget: float = 100.0) -> tuned.Session:
    return tuned.tune(GPU, cells, budget, clock=lambda: tuning.now)


def fail(tuning, monkeypatch, error: BaseException, step: str = "warm") -> None:
    """Makes the fastest contender raise `error` at its first call, or at the capture if `step` is "prepare"."""
    wrap(monkeypatch, tuning, step, lambda right, call: raising(error)() if call == FAST else right(call))


# ---- what is picked, and what is refused ----


def test_the_faster_contender_is_picked_and_remembered(tuning, capsys):
    assert conv_face() == "triton"
    assert kept() == {CELLS[0]: {"triton": 1e-3, "aten": 1.5e-3}}
    assert (
        tables.lookup("conv1d.forward", GPU, torch.float16, **dict(zip(tables.SHAPE, SHAPE)), rows=4096).tile["t"]
        == 128
    )
    said = capsys.readouterr().err
    assert said.startswith("tuning a conv for NVIDIA Imaginary 9000, once ...: ") and said.count("\n") == 1
    choose.forget()
    assert conv_face() == conv_face(13) == "triton" and tuning.sessions == [1], "the times also serve twice the rows"
    tuning.seconds[LIBRARY] = 1e-4
    assert conv_face(15) == "aten" and tuning.sessions == [1, 1]


def test_a_wrong_contender_is_refused_however_fast(tuning):
    tuning.wrong[FAST] = "y: max error 2.0"
    assert conv_face() == "aten"
    assert kept() == {CELLS[0]: {"triton": 2e-3, "aten": 1.5e-3}}
    assert tune(tuning, CELLS[1:2]).done[CELLS[1]]["refused"] == {FAST: "wrong: y: max error 2.0"}


@pytest.mark.parametrize(
    ("step", "message", "told"),
    [
        ("warm", "out of resource: shared memory\nmore", "RuntimeError: out of resource: shared memory"),
        ("prepare", "no capture", "RuntimeError: no capture"),
    ],
)
def test_a_contender_that_does_not_run_or_cannot_be_captured_is_refused(tuning, monkeypatch, step, message, told):
    fail(tuning, monkeypatch, RuntimeError(message), step)
    assert tune(tuning, CELLS[:1]).done[CELLS[0]]["refused"] == {FAST: told}
    assert kept() == {CELLS[0]: {"triton": 2e-3, "aten": 1.5e-3}}


@pytest.mark.parametrize(("step", "last"), [("prepare", 1), ("seconds_of", 5)])
def test_a_contender_that_ends_its_process_later_is_the_one_to_blame(tuning, monkeypatch, step, last):
    """FAST, the second of three contenders, is to blame even if it ends the process only at its capture or at its fifth
    call."""
    calls = itertools.count(1)

    def fatal(right, call, *how):
        return raising(Died(77))() if call == FAST and next(calls) == last else right(call, *how)

    wrap(monkeypatch, tuning, step, fatal)
    assert set(tune(tuning, CELLS[:1]).done) == set(CELLS[:1]) and tuning.sessions == [1, 1]
    assert list(tuned._faults(GPU).values()) == [[FAST]]


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_damaged_notes_of_faults_are_forgotten(tuning, text):
    tuned.path(GPU).parent.mkdir(parents=True)
    tuned.path(GPU).with_suffix(".faults").write_text(text)
    assert set(tune(tuning, CELLS[:1]).done) == set(CELLS[:1])


@pytest.mark.parametrize("code", [77, -signal.SIGSEGV])
def test_a_contender_that_ends_its_process_is_remembered_and_the_others_go_on(tuning, monkeypatch, code):
    fail(tuning, monkeypatch, Died(code))
    assert set(tune(tuning, CELLS[:2]).done) == set(CELLS[:2]) and tuning.sessions == [2, 2, 1]
    assert kept() == {cell: {"triton": 2e-3, "aten": 1.5e-3} for cell in CELLS[:2]}
    tune(tuning, CELLS[:1])
    assert tuning.sessions[3:] == [1], "the contender is not tried again, not even by a new process"


def test_a_contender_that_ends_its_process_is_not_tried_again_where_no_note_of_it_can_be_saved(tuning, monkeypatch):
    fail(tuning, monkeypatch, Died(77))
    monkeypatch.setattr(files, "write", raising(OSError("read-only")))
    assert set(tune(tuning, CELLS[:1]).done) == set(CELLS[:1]) and tuning.sessions == [1, 1]


def test_what_is_killed_from_outside_blames_nobody(tuning, monkeypatch):
    monkeypatch.setattr(tuning, "warm", raising(Died(-signal.SIGKILL)))
    with pytest.raises(tuned.CannotTune, match="a kernel's last word"):
        tune(tuning, CELLS[:1])
    assert tuned._faults(GPU) == {} and kept() == {}


# ---- kills, processes, budgets ----


def test_a_kill_at_twenty_random_points_loses_nothing(tuning, monkeypatch):
    """SIGKILL between two cells, inside a cell or while the file is written loses no finished cell."""
    seen = []
    tuning.happen = seen.append
    wrap(monkeypatch, os, "replace", lambda right, *args: (tuning.happen("replace"), right(*args))[1])
    tune(tuning, CELLS, 1000.0)
    whole = kept()
    points = random.Random(0).choices(range(1, len(seen) + 1), k=20)
    assert len(set(points)) > 10 and set(whole) == set(CELLS)
    for point in points:
        tuned.path(GPU).unlink()

        def killed(point=point):
            events = itertools.count(1)
            tuning.happen = lambda what: next(events) == point and os.kill(os.getpid(), signal.SIGKILL)
            tune(tuning, CELLS, 1000.0)

        assert forked(killed) == [signal.SIGKILL]
        before = kept() if tuned.path(GPU).is_file() else {}
        done = sum(what == "after found" for what in seen[: point - 1])
        assert len(before) in (done, done + 1) and all(whole[cell] == before[cell] for cell in before)
        tuning.happen, tuning.measured = (lambda what: None), []
        tables._index.cache_clear()
        tune(tuning, [cell for cell in CELLS if not tables.covered(GPU, cell)], 1000.0)
        assert kept() == whole and set(tuning.measured) == set(CELLS) - set(before), "no saved cell is measured again"


def test_one_of_two_processes_tunes_and_the_other_reads(tuning, own_cache):
    """If two processes need the same conv, one of them tunes it. The other waits, and then reads the saved rows."""
    log = own_cache.parent / "log"

    def rank():
        tuning.happen = lambda what: time.sleep(0.002)
        faces = [conv_face(ops=(cell.op,)) for cell in CELLS]
        with log.open("a") as file:
            file.write(json.dumps([sum(tuning.sessions), faces]) + "\n")

    assert forked(rank, rank) == [0, 0]
    (one, faces), (two, others) = map(json.loads, log.read_text().splitlines())
    assert one + two == len(CELLS), "each cell was tuned once, by one of the processes"
    assert faces == others == ["triton"] * 4 and set(kept()) == set(CELLS)


def test_rows_of_two_processes_add_up(tuning):
    for cell in CELLS[:2]:
        assert forked(lambda cell=cell: tune(tuning, [cell])) == [0]
    assert set(kept()) == set(CELLS[:2])


def test_the_budget_is_respected_and_the_rest_is_said(tuning, monkeypatch, capsys):
    """Each cell has three contenders, and the first call of each takes a second. So with a budget of seven seconds the
    third cell is the last that begins."""
    session = tune(tuning, CELLS, 7.0)
    assert list(session.done) == CELLS[:3] and set(kept()) == set(CELLS[:3]) and session.out_of_time
    assert tuning.now < 7.0 + 3 + 1
    monkeypatch.setattr(tuned, "FIRST_USE", 1.0)
    tuned.want(GPU, [c._replace(rows_log2=20) for c in CELLS], "Jasper")
    assert "time for 1 of 4 shapes; `jasper-fast tune` does the rest" in capsys.readouterr().err
    tuned.want(GPU, [c._replace(rows_log2=20) for c in CELLS], "Jasper")
    assert tuning.sessions[-1] == 4 and len(tuning.sessions) == 2, "not asked for again in this process"


def test_a_process_that_does_not_start_is_one_line_and_the_defaults(tuning, monkeypatch, capsys):
    monkeypatch.setattr(
        children, "talk", lambda *_: children.Ended(False, False, 1, "ended with status 1", ": no GPU left")
    )
    assert conv_face() == "triton"
    said = capsys.readouterr().err
    assert "not possible (the tuning process ended with status 1: no GPU left)" in said and said.count("\n") == 1


def test_a_cache_that_cannot_be_read_is_said_and_tuned_again(tuning, capsys):
    tuned.path(GPU).parent.mkdir(parents=True)
    tuned.path(GPU).write_text("{")
    assert conv_face() == "triton" and kept()
    assert "cannot use the saved times" in capsys.readouterr().err


# ---- dispatch: empty cache, a neighbour's table, a full table, and when nothing is tuned ----


H100, H200 = {"multiprocessors": "132", "bandwidth": "3350 GB/s"}, {"multiprocessors": "132", "bandwidth": "4800 GB/s"}


@pytest.mark.parametrize("how", ["environment", "a body"])
def test_turned_off_the_tables_and_rules_choose(tuning, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("JASPER_FAST_TUNE", "0")
    with tuned.off() if how == "a body" else contextlib.nullcontext():
        assert (conv_face(15), conv_face(15, torch.float32)) == ("triton", "aten"), "by estimates"
    assert tuning.sessions == [] and len(tuned._waiting.get(GPU, ())) == 0
    assert conv_face(15) == "triton"
    assert tuning.sessions == ([] if how == "environment" else [1]), "after the block, tuning is on again"


@pytest.mark.parametrize(("header", "wanted"), [
    (H100, "aten"),  # in the neighbour's table the library is faster
    (H200, "triton"),  # its bandwidth is too different
    (H100 | {"multiprocessors": "114"}, "triton"), (H100 | {"capability": "sm_100"}, "triton"),
    (H100 | {"multiprocessors": "128"}, "aten"), ({"multiprocessors": "x", "bandwidth": "x"}, "triton"),
])  # fmt: skip
def test_a_neighbours_table_serves_where_nothing_of_this_gpu_is_there(tuning, put_table, monkeypatch, header, wanted):
    monkeypatch.setenv("JASPER_FAST_TUNE", "0")
    put_table(conv_rows({"conv1d.forward": (2.0, 1.0)}, FP16), gpu="NVIDIA Neighbour", **header)
    assert conv_face() == wanted, "the estimates would choose Triton"
    monkeypatch.setenv("JASPER_FAST_TUNE", "1")
    choose.forget()
    assert conv_face() == "triton" and tuning.sessions == [1], "a neighbour's table does not prevent tuning"


def test_the_nearest_neighbour_is_taken(tuning, put_table, monkeypatch):
    monkeypatch.setenv("JASPER_FAST_TUNE", "0")
    put_table(
        conv_rows({"conv1d.forward": (1.0, 2.0)}, FP16), gpu="NVIDIA Far", multiprocessors="126", bandwidth="3350 GB/s"
    )
    put_table(conv_rows({"conv1d.forward": (2.0, 1.0)}, FP16), gpu="NVIDIA Near", **H100)
    assert conv_face() == "aten"


def test_a_committed_table_needs_no_tuning_and_a_users_lies_over_it(tuning, put_table):
    put_table(conv_rows({"conv1d.forward": (2.0, 1.0), "conv1d.wgrad": (2.0, 1.0)}, FP16))
    assert conv_face() == conv_face(ops=("conv1d.wgrad",)) == "aten" and tuning.sessions == []
    tune(tuning, CELLS[:1])
    choose.forget()
    assert (conv_face(), conv_face(ops=("conv1d.wgrad",))) == ("triton", "aten")


def test_of_two_threads_at_the_same_moment_one_tunes(tuning, monkeypatch):
    with tuned.not_now():
        assert conv_face() == "triton", "by estimates"

    def other_thread_comes_first(good_moment, device):
        monkeypatch.setattr(tuned, "good_moment", good_moment)
        tuned.catch_up(device)
        return True

    wrap(monkeypatch, tuned, "good_moment", other_thread_comes_first)
    tuned.catch_up(GPU)
    assert tuning.sessions == [1]


def test_nothing_is_tuned_in_a_capture_and_all_at_the_next_good_moment(tuning, monkeypatch):
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    tuning.seconds[LIBRARY] = 1e-4
    assert conv_face() == "triton" and conv_face(20) == "triton", "by estimates"
    assert tuning.sessions == [] and len(tuned._waiting.get(GPU, ())) == 2
    capturing[0] = False
    assert conv_face() == "aten" and tuning.sessions == [2], "both cells in one session"
    assert conv_face(20) == "aten" and len(tuned._waiting.get(GPU, ())) == 0


def test_nothing_is_tuned_while_a_graph_is_traced_or_a_step_must_not_stall(tuning):
    def chosen(x):
        return x * len(choose.conv_face("auto", GPU, torch.float16, shape=SHAPE, rows_log2=12))

    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(torch.ones(2)), torch.full((2,), 6.0))
    assert tuning.sessions == [] and len(tuned._waiting.get(GPU, ())) == 1
    with tuned.not_now():
        assert conv_face(20) == "triton"
        tuned.catch_up(GPU)
    assert tuning.sessions == [] and len(tuned._waiting.get(GPU, ())) == 2
    tuned.catch_up(GPU)
    assert tuning.sessions == [2]


def test_where_there_is_nothing_to_choose_from_nothing_is_tuned(tuning, monkeypatch):
    """Without Triton convs are not tuned. Norms are, because they can run on the CUDA face or in plain PyTorch."""
    monkeypatch.setattr(backends, "why_missing", lambda face, device: "too old" if face == "triton" else None)
    tuned.want(GPU, [*CELLS, Cell("bn_relu_dropout.forward", FP16, 256, 256, 1, 1, 1, 12)], "Jasper")
    assert tuning.sessions == [1] and {cell.op for cell in kept()} == {"bn_relu_dropout.forward"}


def test_norms_are_tuned_both_ways(tuning):
    tuning.seconds["triton direct"] = 2e-3
    assert choose.norm_face("auto", GPU, torch.float16, 256, 12) == "reference"
    assert {cell.op for cell in kept()} == set(tables.NORM_OPS) and tuning.sessions == [2]


# ---- models ----


SMALL = config([block(16, k=5, s=2), block(24, 3, 5, residual=True)])


@pytest.mark.parametrize("tune", [True, False])
def test_a_model_is_tuned_at_its_first_forward_all_at_once(tuning, monkeypatch, capsys, tune):
    monkeypatch.setattr(backends, "require", lambda backend: backend)
    model, asked = Jasper(SMALL, tune=tune), []
    monkeypatch.setattr(Jasper, "_forward", lambda self, *_: asked.append(tuned.enabled()))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        features = torch.empty(4, 8, 100, device=GPU, dtype=torch.float16)
    model(features)
    model.eval()(features)
    assert asked == [tune] * 2
    wanted = [cells(SMALL, 4, 100, torch.float16, mode) for mode in ("training", "evaluation")]
    assert tuning.sessions == ([len(of) for of in wanted] if tune else [])
    if tune:
        assert "tuning Jasper for NVIDIA Imaginary 9000, once" in capsys.readouterr().err
        assert set(kept()) == set(wanted[0] + wanted[1])
        model(features)
        assert len(tuning.sessions) == 2


def test_a_model_is_tuned_on_each_gpu_that_it_runs_on(monkeypatch):
    asked = []
    monkeypatch.setattr(tuned, "want", lambda device, *_: asked.append(device))
    model, gpus = Jasper(SMALL), [torch.device("cuda", 0), torch.device("cuda", 1)]
    for gpu in (*gpus, *gpus):
        model._measured(gpu, 4, 100, torch.float16)
    assert asked == gpus


@pytest.mark.parametrize("tune", [True, False])
def test_an_engine_takes_the_faster_face_for_each_batch(tuning, tune):
    """An engine uses the faster face for each batch size, and tunes all its convs at the first call of a size."""
    engine = InferenceEngine(Jasper(SMALL, tune=tune).eval(), graphs=False)
    ours, library = engine._run, SimpleNamespace()
    engine._runs, engine._device, engine._dtype = {"triton": ours, "aten": library}, GPU, torch.float16
    assert engine._chosen(1, 100) is ours
    tuning.seconds |= {FAST: 1e-2, SLOW: 1e-2}
    assert engine._chosen(64, 1000) is (library if tune else ours)
    assert engine._chosen(1, 110) is engine._chosen(1, 100) is ours
    assert tuning.sessions == ([4, 4] if tune else [])


def test_the_cells_of_a_model_are_what_its_step_calls():
    found = cells(SMALL, 4, 100, torch.float16, "training")
    first, opening, inner = (8, 16, 5, 2, 1), (16, 24, 5, 1, 1), (24, 24, 5, 1, 1)
    assert {(cell.op.split(".")[1], tuple(cell[2:7])) for cell in found if cell.op.startswith("conv1d")} == {
        ("forward_stats", first), ("wgrad", first), ("forward_stats", opening), ("dgrad", opening), ("wgrad", opening),
        ("forward_stats", inner), ("dgrad_bn", inner), ("wgrad", inner),
    }  # fmt: skip
    assert {cell.c_in for cell in found if cell.op in tables.NORM_OPS} == {16, 24}
    assert {cell.rows_log2 for cell in found} == {tables.bucket(4 * 50)}
    of_convs = [cell for cell in found if cell.op.startswith("conv1d")]
    assert of_convs[0][2:7] == inner and of_convs[-1][2:7] == first, "the most work first"
    assert {tuple(cell[2:7]) for cell in cells(SMALL, 1, 100, torch.float16, "inference")} == {
        conv.shape for conv in convs(SMALL)
    }
    assert cells(SMALL, 1, 100, torch.float64, "training") == []


# ---- the command ----


def command_line(tmp_path, *more: str) -> list[str]:
    import yaml

    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(SMALL.to_dict()))
    return ["tune", "--device", "cuda:0", "--model", str(path), *more]


def test_the_command_tunes_a_model_ahead_and_goes_on(tuning, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuned.time, "monotonic", lambda: tuning.now)
    argv = command_line(tmp_path, "--batches", "4:1", "1:0.5")
    wanted = {cell for n, t in ((4, 100), (1, 50)) for mode in ("training", "inference")
              for cell in cells(SMALL, n, t, torch.float16, mode)}  # fmt: skip
    assert main([*argv, "--budget", "20"]) == 4
    said = capsys.readouterr().out
    done = len(kept())
    assert 0 < done < len(wanted) and f"{len(wanted) - done} shapes are left" in said and str(tuned.path(GPU)) in said
    tables.forget()
    assert main(argv) == 0
    tables.forget()
    assert all(tables.covered(GPU, cell) for cell in wanted) and set(kept()) <= wanted
    assert main(argv) == 0 and "0 of them to measure" in capsys.readouterr().out
    assert main([*argv, "--dtype", "bf16", "--for", "inference"]) == 0
    assert {cell.op for cell in kept() if cell.dtype == "bfloat16"} == {"conv1d.fused"}


@pytest.mark.parametrize(("more", "told"), [
    (["--device", "cpu"], "tune needs a CUDA GPU"), (["--model", "no.yaml"], "no.yaml: no such configuration"),
])  # fmt: skip
def test_what_the_command_cannot_do_is_one_line(tuning, tmp_path, capsys, more, told):
    assert main(command_line(tmp_path, *more)) == 2
    assert told in capsys.readouterr().err


def test_the_self_check_checks_what_was_tuned(tuning, monkeypatch):
    from jasper_fast.selfcheck import checks

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Imaginary 9000")
    tune(tuning, CELLS[:1])
    (check,) = checks._measured("conv1d", "forward", FP16, False, GPU)
    assert check.tile == TILES[1] and check.shape.c_in == 256


# ---- the tuner itself, in Triton's interpreter ----


@pytest.mark.slow
def test_real_contenders_are_checked_and_timed(monkeypatch):
    interpreted()
    told: list[tuple[str, object]] = []
    found = [Cell("conv1d.forward_stats", "float32", 16, 24, 3, 1, 1, 5),
             Cell("conv1d.fused", "float32", 24, 13, 1, 1, 1, 5),
             Cell("bn_relu_dropout.backward", "float32", 24, 24, 1, 1, 1, 5)]  # fmt: skip

    def spoilt(right, *args, **more):
        out, tile = right(*args, **more), tables._forced["conv1d.forward_stats"].tile
        return (out[0] * 1.01, *out[1:]) if tile["num_stages"] == 4 else out

    wrap(monkeypatch, backends.face("conv1d", "triton"), "forward_stats", spoilt)
    work.Tuner(torch.device("cpu"), lambda *told_: told.append(told_), budget=100.0).run(found)
    by_cell = {value["cell"]: value for kind, value in told if kind == "found"}
    assert list(by_cell) == found and told[-1] == ("end", None)
    for cell, value in by_cell.items():
        assert {row["face"] for row in value["rows"]} == {"triton", "reference" if cell.op.startswith("bn") else "aten"}
        assert [tables.Row(**row).cell for row in value["rows"]] == [cell] * 2
    (why,) = by_cell[found[0]]["refused"].values()
    assert why.startswith("wrong: y: ") and not by_cell[found[1]]["refused"]
