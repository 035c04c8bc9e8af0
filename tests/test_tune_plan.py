"""What `python -m bench tune` tunes: every conv and norm of the network, their order, contenders and time."""

import contextlib
import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from conftest import interpreted
from standins import pretend_a_gpu, spied

from jasper_fast.bench.cases import cells as tune_cases, counts, models
from jasper_fast.dispatch import backends
from jasper_fast.kernels import launch, tables
from jasper_fast.kernels.conv1d import triton_tiles
from jasper_fast.kernels.operands import Mask
from jasper_fast.kernels.tables import Cell
from jasper_fast.selfcheck.checks import DTYPES
from jasper_fast.tuning import compiling, faces
from jasper_fast.tuning.faces import Proposal
from jasper_fast.tuning.held import Held

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PLAN = tune_cases.plan(GPU, torch.bfloat16)


@pytest.fixture(autouse=True)
def in_the_interpreter():
    interpreted()


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU on which every face can be proposed."""
    pretend_a_gpu(monkeypatch, traits=None)
    monkeypatch.setattr(launch, "architecture", lambda device: 90)


def test_every_conv_and_norm_of_the_network_is_tuned_for_training_and_inference():
    convs = [c for c in counts.convs(models.config("jasper10x5"), 1, 840) if c.place != "pane"]
    main = {(c.C_in, c.C_out, c.K) for c in convs if c.batch_norm}
    of = lambda op: {cell[2:5] for cell in PLAN if cell.op == op}  # noqa: E731
    assert of("conv1d.fused") == {(c.C_in, c.C_out, c.K) for c in convs}
    assert of("conv1d.forward_stats") == of("conv1d.forward") == of("conv1d.wgrad") == main
    assert of("conv1d.dgrad") | of("conv1d.dgrad_bn") == main - {(64, 256, 11)}, "the features need no gradient"
    assert of("bn_relu_dropout.forward") == {(c, c, 1) for _, c, _ in main} == of("bn_relu_dropout.backward")
    assert len(set(PLAN)) == len(PLAN)


def test_the_order_is_by_work_and_training_and_inference_both_come_early():
    first = [cell for cell in PLAN if cell.op not in tables.NORM_OPS]
    assert first[0][2:7] in ((768, 768, 25, 1, 1), (768, 896, 29, 1, 2)) and first[0].rows_log2 == 15
    begins = {op: next(i for i, cell in enumerate(PLAN) if cell.op == op) for op in ("conv1d.wgrad", "conv1d.fused")}
    assert begins["conv1d.wgrad"] < begins["conv1d.fused"] < len(PLAN) / 2
    for op in tables.NORM_OPS:
        rows = [cell.c_in for cell in PLAN if cell.op == op and cell.rows_log2 == 15]
        assert len(rows) == len({block.filters for block in models.config("jasper10x5").encoder.blocks})
    assert tune_cases.plan(GPU, torch.bfloat16, tables.NORM_OPS) == [c for c in PLAN if c.op in tables.NORM_OPS]


@pytest.mark.parametrize("op", sorted({cell.op for cell in PLAN} - set(tables.NORM_OPS)))
def test_the_contenders_of_a_conv_are_few_and_can_be_rows_of_a_table(gpu, op):
    """The contenders begin with the default tile and end with the CUDA face and the library. They have distinct names
    and can be rows of a table."""
    for cell in (cell for cell in PLAN if cell.op == op):
        found = list(faces.proposals(cell, GPU))
        assert 3 <= len(found) <= 7, f"{len(found)} contenders of {cell}"
        assert len({p.name(cell) for p in found}) == len(found)
        assert [p.face for p in found] == ["triton"] * (len(found) - 2) + ["cuda", "aten"]
        n, frames = cell.batch
        shape = triton_tiles.Shape(*cell[2:7], n * frames)
        assert (
            found[0].tile
            == triton_tiles.default(op.removeprefix("conv1d."), DTYPES[cell.dtype], shape, frames)._asdict()
        )
        rows = [of.row(cell, 1.0, {}).plain() for of in (found[0], found[-1])]
        tables.parse({"header": dict.fromkeys(tables.HEADER, "x") | {"capability": "sm_90"}, "rows": rows}, "x")
        for proposal in found[:-2]:
            assert tables.tile_fault(cell.op, cell.dtype, proposal.tile) is None


def test_a_batch_of_a_cell_lies_in_its_power_of_two():
    for rows_log2 in range(20):
        n, frames = Cell("conv1d.forward", "float16", 8, 8, 1, 1, 1, rows_log2).batch
        assert tables.bucket(n * frames) == rows_log2


@pytest.mark.parametrize(("missing", "wanted"), [
    ((), ["cuda", "triton", "reference"]), (("cuda",), ["triton", "reference"]),
])  # fmt: skip
def test_the_contenders_of_a_norm_are_the_faces_that_the_machine_has_the_cuda_face_first(monkeypatch, missing, wanted):
    monkeypatch.setattr(backends, "why_missing", lambda face, kind: "not built" if face in missing else None)
    cell = next(cell for cell in PLAN if cell.op in tables.NORM_OPS)
    assert [p.face for p in faces.proposals(cell, GPU)] == wanted


def test_a_face_joins_by_one_function(gpu, monkeypatch):
    monkeypatch.setitem(faces.FACES, "conv1d", [*faces.FACES["conv1d"], lambda cell, device: [Proposal("cuda")]])
    assert [p.face for p in faces.proposals(PLAN[0]._replace(op="conv1d.wgrad"), GPU)][-1] == "cuda"


def estimate(cells: list[Cell]) -> float:
    """Estimates the seconds for tuning `cells` on 16 cores, of which 15 compile.

    The start takes 15 s. Each kernel takes 8 s on one core to compile and 0.3 s to check. Each contender takes 0.08 s,
    and each cell 0.05 s. None of these numbers was measured on a GPU.
    """
    contenders = [(cell, proposal) for cell in cells for proposal in faces.proposals(cell, GPU)]
    kernels = {
        (c.op, c.dtype, str(p.tile), c.stride, c.c_in % 64, c.c_out % 64) for c, p in contenders if p.face == "triton"
    }
    return 15.0 + len(kernels) * (8.0 / 15 + 0.3) + len(contenders) * 0.08 + len(cells) * 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_whole_jasper_fits_nine_minutes_on_sixteen_cores(gpu, dtype):
    """By the estimates above, tuning takes under six minutes, so a factor of 1.5 is left for errors in them."""
    cells = tune_cases.plan(GPU, dtype)
    spent = estimate(cells)
    assert 30 < spent < 540 / 1.5, f"{spent:.0f} s for {len(cells)} cells"
    first = [cell for cell in cells if cell.rows_log2 == 15 and cell.op != "conv1d.forward"]
    assert estimate(first) < 120, "what a first training step tunes"


@pytest.mark.parametrize(("op", "wanted"), [
    ("forward", ["stats", "forward"]), ("backward", ["backward_reduce", "backward_apply"]),
])  # fmt: skip
def test_a_norm_is_called_as_a_training_step_calls_it(monkeypatch, op, wanted):
    """The calls that are timed have lengths, dropout, a halo and the batch's means, as in a training step."""
    impl, calls = backends.face("bn_relu_dropout", "triton"), []
    for name in ("stats", "forward", "backward_reduce", "backward_apply"):
        spied(monkeypatch, impl, name, lambda *args, name=name, **more: calls.append((name, args)))
    (cell,) = tune_cases.plan(CPU, torch.float32, (f"bn_relu_dropout.{op}",))
    Held(cell, CPU).call(Proposal("triton"))()
    assert [name for name, _ in calls] == wanted
    for name, args in calls:
        if name == "stats":
            continue
        lengths, seed, p = next(arg for arg in args if isinstance(arg, Mask))
        assert lengths.tolist() == [cell.batch[1]] and seed.numel() == 1 and p == 0.2
        if name == "backward_apply":
            assert args[4] is not None and args[7] == 2  # args[4] has the batch's means, args[7] is the halo


@pytest.mark.parametrize("cell", [
    *(Cell(f"conv1d.{op}", "float16", 128, 128, 5, 1, 1, 7) for op in tune_cases.CONV_OPS),
    Cell("conv1d.fused", "float16", 128, 29, 1, 1, 1, 7),
    *(Cell(op, "float16", 128, 128, 1, 1, 1, 7) for op in tables.NORM_OPS),
], ids=lambda cell: f"{cell.op} {cell.c_out}")  # fmt: skip
def test_what_is_compiled_ahead_is_what_is_launched(cell):
    """Each kernel that the real inputs launch was also compiled ahead, from tensors without values."""
    from jasper_fast.kernels import aot

    tile = None
    if cell.op.startswith("conv1d"):
        tile = triton_tiles.default(cell.op[7:], torch.float16, triton_tiles.Shape(*cell[2:7], 96), 96)._asdict()
    proposal, seen = Proposal("triton", tile=tile), []
    call = Held(cell, CPU).call(proposal)
    with launch.recorded(seen.append, 90):
        call()
    ahead = compiling.launches(compiling.Job(cell, proposal, 90))
    launched, compiled = ({aot.source(one, 90) for one in found} for found in (seen, ahead))
    assert launched <= compiled, f"{len(launched - compiled)} of {len(launched)} kernels are not compiled ahead"


def test_contenders_that_are_compiled_ahead_share_the_inputs_of_their_cell(monkeypatch):
    """The inputs are made once, and the launches that pack them belong to each contender."""
    made = []
    monkeypatch.setattr(compiling, "Held", lambda *of: made.append(of) or Held(*of))
    compiling._held.cache_clear()
    job = compiling.Job(Cell("conv1d.forward", "float16", 128, 128, 5, 1, 1, 7), Proposal("triton"), 90)
    first, again = compiling.launches(job), compiling.launches(job)
    assert len(made) == 1
    assert [one.kernel for one in first] == [one.kernel for one in again] and len(first) > 1


def test_compiling_ahead_ends_when_its_time_is_spent(monkeypatch):
    """A kernel is ready every 50 ms, so there is time for four of the twenty."""
    now = 0.0

    def ready(timeout: float) -> tuple[str, compiling.Facts]:
        nonlocal now
        if timeout < 0.05:
            raise multiprocessing.TimeoutError
        now += 0.05
        return str(now), {"registers": 1}

    pool = SimpleNamespace(imap_unordered=lambda *_: SimpleNamespace(next=ready))
    context = SimpleNamespace(Pool=lambda workers: contextlib.nullcontext(pool))
    monkeypatch.setattr(compiling.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(
        compiling, "launches", lambda job: [SimpleNamespace(digest=lambda arch, i=i: str(i)) for i in range(20)]
    )
    monkeypatch.setattr("jasper_fast.kernels.aot.source", lambda one, arch: one)
    done = []
    job = compiling.Job(Cell("conv1d.forward", "float16", 128, 128, 5, 1, 1, 7), Proposal("triton"), 90)
    assert compiling.ahead([job], lambda *numbers: done.append(numbers), lambda: 0.21 - now) == {}
    assert done == [(i, 20) for i in range(1, 5)]
