"""`python -m bench tune` on tiny shapes in Triton's interpreter: what it measures, refuses and keeps, and how it
resumes."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, LIMITS
from conftest import interpreted, raising
from standins import spied, verdicts_of_its_own, wrap  # noqa: F401

from jasper_fast.bench.cases import cells as tune_cases
from jasper_fast.bench.cli import main
from jasper_fast.bench.harness import limits, machine
from jasper_fast.bench.tune import tune
from jasper_fast.dispatch import backends, children, tuned
from jasper_fast.kernels import tables
from jasper_fast.kernels.layout import mask
from jasper_fast.kernels.tables import Cell
from jasper_fast.selfcheck.tolerance import Tolerance, compare
from jasper_fast.tuning import child, work
from jasper_fast.tuning.faces import Proposal
from jasper_fast.tuning.held import Held, check_of, library

CELL = Cell("conv1d.forward", "float32", 16, 24, 3, 1, 1, 5)
NAMES = ["triton 32x32x16 warps 4 stages 3", "triton 32x32x16 warps 4 stages 4", "aten library"]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    interpreted()
    monkeypatch.setattr(machine, "_git", lambda *_: "abc")  # a commit made meanwhile must not prevent --resume
    monkeypatch.setattr(limits, "measure", lambda *_: dict(LIMITS))


@pytest.fixture
def in_process(monkeypatch):
    """Makes this process do the work of the tuning process."""

    def talk(argv, wanted, hear, seconds):
        told = []
        child.child(io.StringIO(json.dumps(wanted)), lambda *what: told.append(hear(*json.loads(json.dumps(what)))))
        return children.Ended(told[-1], False, 0, "", "")

    monkeypatch.setattr(children, "talk", talk)


def run(out: Path, *more: str, ops: str = "forward") -> tuple[int, dict]:
    """Runs the command on the CPU, in place of a GPU. Returns the exit status and the result."""
    status = main(["tune", "--device", "cpu", "--seconds", "0.01", "--out", str(out), "--ops", ops, *more])
    (path,) = out.glob("*.json")
    return status, json.loads(path.read_text())


@pytest.mark.slow
def test_the_command_times_right_tiles_faces_and_the_library_and_makes_a_table(tmp_path, own_cache, capsys):
    assert {cell.op.removeprefix("conv1d.") for cell in tune_cases.plan(CPU, torch.float32)} == set(tune_cases.OPS)
    ops = ("forward_stats", "fused", *tables.NORM_OPS)
    code, data = run(tmp_path / "out", ops=",".join(ops))
    said = capsys.readouterr().out
    assert code == 0 and data["finished"] and data["command"] == "tune"
    assert {row["status"] for row in data["rows"]} == {"ok"}, said
    wanted = tune_cases.plan(CPU, torch.float32, ops)
    table = tables.parse(data["table"], "the result")
    assert len(table.rows) == 2 * len(wanted), "each cell has two rows: our fastest contender and plain PyTorch"
    for row in table.rows:
        same = [r for r in data["rows"] if (r["tune"]["op"], r["tune"]["face"]) == (row.op, row.face)
                and r["tune"]["c_in"] == row.c_in]  # fmt: skip
        best = min(same, key=lambda r: r["time_s"]["median"])
        assert (row.time_s, row.tile) == (best["time_s"]["median"], best["tune"]["tile"])
    for column in ("fastest of ours", "PyTorch / ours", "bn_relu_dropout.backward", "GB/s"):
        assert column in said
    assert not (own_cache / "tuned").exists(), "times of a stand-in are not saved"


@pytest.mark.parametrize(("interpret", "ops", "told"), [
    ("0", "forward", "set TRITON_INTERPRET=1"), ("1", "forward,backward", "--ops backward: not one of all, forward"),
])  # fmt: skip
def test_what_cannot_be_tuned_is_told(tmp_path, monkeypatch, interpret, ops, told):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit, match=told):
        run(tmp_path, ops=ops)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status", "why"),
    [
        (lambda y: y * 1.01, "wrong", "wrong: y: max error"),
        (lambda y: torch.where(torch.arange(y.shape[2]) == 5, 0.0, y), "wrong", "wrong: y: max error"),
        (
            raising(RuntimeError("out of resource: shared memory\nmore")),
            "failed",
            "failed: RuntimeError: out of resource: shared memory",
        ),
    ],
    ids=["scaled", "a row dropped", "does not run"],
)
def test_a_wrong_or_failing_tile_is_a_row_and_never_chosen(tmp_path, monkeypatch, in_process, fault, status, why):
    def forward(right, *args, **more):
        y = right(*args, **more)
        return fault(y) if tables._forced["conv1d.forward"].tile["num_stages"] == 4 else y

    wrap(monkeypatch, backends.face("conv1d", "triton"), "forward", forward)
    code, data = run(tmp_path)
    assert code == 0 and data["finished"]
    by_name = {row["contender"]: row for row in data["rows"]}
    assert set(by_name) == set(NAMES)
    bad = by_name[NAMES[1]]
    assert bad["status"] == status and bad["why"].startswith(why) and "time_s" not in bad
    assert {by_name[name]["status"] for name in (NAMES[0], NAMES[2])} == {"ok"}
    (chosen,) = [row for row in data["table"]["rows"] if row["face"] == "triton"]
    assert chosen["tile"]["num_stages"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stats", "forward", "backward_reduce", "backward_apply"])
def test_a_face_that_is_wrong_is_a_row_and_never_chosen(tmp_path, monkeypatch, in_process, name):
    def spoilt(right, *args, **more):
        out = right(*args, **more)
        return out * 1.01 if isinstance(out, torch.Tensor) else tuple(None if t is None else t * 1.01 for t in out)

    wrap(monkeypatch, backends.face("bn_relu_dropout", "triton"), name, spoilt)
    code, data = run(tmp_path, ops=",".join(tables.NORM_OPS))
    assert code == 0 and data["finished"]
    status = {(row["key"]["op"], row["contender"].split()[0]): row["status"] for row in data["rows"]}
    bad = "bn_relu_dropout.forward" if name in ("stats", "forward") else "bn_relu_dropout.backward"
    assert status == {(op, face): "wrong" if (op, face) == (bad, "triton") else "ok"
                      for op in tables.NORM_OPS for face in ("triton", "reference")}  # fmt: skip
    assert {(row.op, row.face) for row in tables.parse(data["table"], "the result").rows} == {
        key for key, found in status.items() if found == "ok"
    }


def test_a_tile_that_spills_is_refused():
    told = []
    tuner = work.Tuner(CPU, lambda *what: told.append(what), budget=100.0)
    spills, fits = ({"registers": r, "shared": 1024, "spilled": bytes_} for r, bytes_ in ((255, 16), (90, 0)))
    tuner._facts = {(CELL, NAMES[0]): spills, (CELL, NAMES[1]): fits}
    tuner.run([CELL])
    (found,) = [value for kind, value in told if kind == "found"]
    assert found["refused"] == {NAMES[0]: "spills 16 bytes"}
    (ours,) = [row for row in found["rows"] if row["face"] == "triton"]
    assert (ours["registers"], ours["shared"], ours["spilled"]) == (90, 1024, 0)


@pytest.mark.slow
def test_a_budget_that_is_spent_keeps_what_there_is_and_resume_goes_on(tmp_path, monkeypatch, in_process):
    ops = "forward,forward_stats"
    wrap(monkeypatch, work.Tuner, "left", lambda right, self: right(self) if not hasattr(self, "met") else 0.0)
    wrap(monkeypatch, work.Tuner, "_measure", lambda right, self, cell: (setattr(self, "met", 1), right(self, cell))[1])
    code, data = run(tmp_path, ops=ops)
    assert code == 4 and not data["finished"] and {row["key"]["op"] for row in data["rows"]} == {"conv1d.forward"}
    assert len(data["table"]["rows"]) == 2
    code, data = run(tmp_path, "--resume", ops=ops)
    assert code == 0 and data["finished"] and data["resumed"] == 1
    assert [row["key"]["op"] for row in data["rows"]] == ["conv1d.forward"] * 3 + ["conv1d.forward_stats"] * 3


@pytest.mark.slow
def test_a_process_that_does_not_tune_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        children, "talk", lambda *_: children.Ended(False, False, 1, "ended with status 1", ": no luck")
    )
    code, data = run(tmp_path)
    assert code == 1 and not data["finished"] and data["rows"] == []
    assert "the tuning process ended with status 1: no luck" in capsys.readouterr().err


# ---- the library as a contender ----


@pytest.mark.parametrize("function", tune_cases.CONV_OPS)
def test_the_library_computes_what_the_kernel_does(function):
    cell = CELL._replace(op=f"conv1d.{function}")
    held = Held(cell, CPU)
    got, case = held.call(Proposal("aten", "library"))(), held.case("triton")
    low, ref = case.low(), case.reference()
    lengths = case.inputs["lengths"]
    assert 0 < lengths.min() <= cell.batch[1]
    # Our kernel computes g from dx in its epilogue and returns g. The library returns dx, and a later pass, which is
    # not timed, computes g. So neither is compared. A wrong dx shows in dbeta and dgamma, which are computed from it.
    if function == "dgrad_bn":
        del got["dx"]
        assert set(got) == {"dbeta", "dgamma"}
    for name, out in got.items():
        out = mask(out, lengths) if name == "dx" else out
        found = compare(out, low[name], ref[name], Tolerance(floor=40.0))
        assert found.right, f"{name}: {found.detail}"


@pytest.mark.parametrize("function", ["forward", "forward_stats", "dgrad", "dgrad_bn", "fused"])
def test_the_librarys_weight_is_cast_and_ordered_once(monkeypatch, function):
    """The weight is cast and reordered before timing, because cuDNN would otherwise copy it in every call."""
    forward = spied(monkeypatch, F, "conv2d", lambda x, weight, *_: weight)
    backward = spied(
        monkeypatch, backends.face("conv1d", "aten"), "conv2d_backward", lambda dy, x, weight, *_: weight.unsqueeze(2)
    )
    cell = CELL._replace(op=f"conv1d.{function}", dtype="bfloat16")
    check, inputs = check_of(cell, Proposal("aten")), Held(cell, CPU).case("triton").inputs
    call = library(check, inputs)
    for _ in range(2):
        call()
    seen = [w for w in forward + backward if w.shape[0] == cell.c_out]
    assert len(seen) >= 2 and all(w.is_contiguous(memory_format=torch.channels_last) for w in seen)
    assert len({w.data_ptr() for w in seen}) == 1, "all calls read the weight at one address, as a captured graph must"
    assert torch.equal(seen[-1].squeeze(2), inputs["weight"].bfloat16())


def test_lengths_are_those_of_a_batch_of_speech():
    """About a quarter of a batch is padding, as in speech. This matters for times because our kernels skip padding."""
    cell = Cell("conv1d.forward", "float32", 4, 4, 1, 1, 1, 12)
    lengths, (n, frames) = Held(cell, CPU).case("triton").inputs["lengths"], cell.batch
    assert lengths.shape == (n,) and lengths.max() == frames
    assert 0.7 < lengths.float().mean() / frames < 0.85
    assert Held(cell._replace(rows_log2=7), CPU).case("triton").inputs["lengths"].tolist() == [96]


def test_what_is_measured_on_a_gpu_is_kept_at_once(monkeypatch):
    asked = spied(monkeypatch, tuned, "tune", lambda *args, **more: more["keeps"])
    monkeypatch.setattr(children, "talk", lambda *_: children.Ended(True, False, 0, "", ""))
    results = SimpleNamespace(data={"rows": []}, path="x")
    monkeypatch.setattr(tune, "put_table", lambda run: None)
    monkeypatch.setattr(tune, "summary", lambda *_: None)
    monkeypatch.setattr(tuned, "_faults", lambda device: {})
    for device in ("cpu", "cuda:0"):
        tune.tune(
            SimpleNamespace(device=torch.device(device), dtype=torch.float16, results=results, started=0.0),
            ("wgrad",),
            9.0,
        )
    assert asked == [False, True]
