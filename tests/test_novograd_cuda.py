"""Tests NovoGrad's CUDA kernels, emulated on the CPU, and when dispatch chooses them."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import cuda_host
import mutant_rig
import pytest
import torch
from conftest import Face
from cuda_mutants import NOVOGRAD
from standins import GPU, verdict, verdicts_of_its_own  # noqa: F401
from test_novograd import SHAPES, assert_near, compare, copies, emulated, make, run, settings, wide
from torch import Tensor

from jasper_fast import NovoGrad
from jasper_fast.dispatch import backends, verdicts
from jasper_fast.kernels import native, nvrtc
from jasper_fast.kernels.novograd import cuda_impl, cuda_launch, reference, table
from jasper_fast.kernels.novograd.operands import Tensors, Watched
from jasper_fast.selfcheck import checks

CUDA = Face("cuda", torch.device("cpu"))
SOURCE = cuda_host.CSRC / "cuda/emulate/novograd.cpp"
GUARD = 3.0e33
LISTS = ("grads", "params", "exp_avgs", "averages")
# Shifts (in elements) of the four LISTS: each tuple misaligns exactly one of them.
EACH = tuple(tuple(int(i == k) for i in range(4)) for k in range(4))


@pytest.fixture
def functions(monkeypatch) -> None:
    monkeypatch.setattr(cuda_launch, "functions", emulated)


def guarded(tensors: Tensors, shifts: tuple[int, ...]) -> tuple[Tensors, list[tuple[Tensor, Tensor]]]:
    """Copies each of LISTS into a buffer that is filled with GUARD. Every tensor of a list starts at a multiple of 16
    bytes plus the list's shift, in elements. Returns the new tensors, and each buffer with a mask of its guards."""
    made, buffers = {}, []
    for name, shift in zip(LISTS, shifts, strict=True):
        starts, end = [], 8
        for x in getattr(tensors, name):
            starts.append(end + shift)
            end = (starts[-1] + x.numel() + 8) // 4 * 4 + 4
        buffer, outside = torch.full((end,), GUARD), torch.ones(end, dtype=torch.bool)
        assert buffer.data_ptr() % 16 == 0
        made[name] = []
        for x, start in zip(getattr(tensors, name), starts, strict=True):
            made[name].append(buffer[start : start + x.numel()].view(x.shape).copy_(x))
            outside[start : start + x.numel()] = False
        buffers.append((buffer, outside))
    return tensors._replace(**made), buffers


def steps(shifts: tuple[int, ...]) -> list[Tensor]:
    """Compares several steps with the reference. ``shifts``: the alignments of the tensors (see `guarded`). Returns all
    results."""
    rows = [settings(beta2=0.5), settings(lr=0.5, beta2=0.9, averaging=True, weight_decay=0.0)]
    tensors, watched = make(CUDA.device, groups=(0, 1))
    tensors, buffers = guarded(tensors, shifts)
    ways = {"scale": 8.0, "clip": 1.0}, {"found": 0.0, "guard": False}, {"found": 1.0}
    found = [compare(CUDA, tensors, watched, rows, **how) for how in ways]
    tensors.grads[-1][5] = torch.inf
    before = copies(tensors, watched)
    found.append(run(cuda_impl.step, tensors, watched, rows))
    assert found[-1][1] == 1
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert all(map(torch.equal, getattr(tensors, name), getattr(before[0], name))), name
    for name, (buffer, outside) in zip(LISTS, buffers, strict=True):
        assert (buffer[outside] == GUARD).all(), f"written beside {name}"
    return [*found, *(x for name in (*LISTS, "exp_avg_sqs") for x in getattr(tensors, name)), *watched.averages]


def check(library: Path, seeds: tuple[int, ...] = mutant_rig.SEEDS) -> None:
    """Runs `steps` with several alignments and orders of the threads. Raises AssertionError if a result is wrong or if
    results differ in a bit."""
    loaded = ctypes.CDLL(str(library))
    functions, bits = cuda_launch.Functions(loaded), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_launch, "functions", lambda: functions)
        patch.setattr(table, "SHORTEST", table.BLOCK)  # makes runs short, so that some tensors have several
        for seed in seeds:
            loaded.jf_emulation(ctypes.c_int(1), ctypes.c_uint64(seed))
            bits += [steps(shifts) for shifts in ((0,) * 4, (1, 2, 3, 1), *EACH[seed != 0 :: 2])]
    for other in bits[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(bits[0], other, strict=True))


def test_runs_alignment_and_the_order_of_threads_change_no_bit_and_nothing_else_is_touched():
    check(cuda_host.build([SOURCE]))


def test_one_tensor_that_is_not_aligned_leaves_the_others_bits(functions):
    """The results of aligned tensors do not depend on whether another tensor is aligned."""
    results = []
    for shift in (0, 1):
        tensors, watched = make(CUDA.device)
        for name in LISTS:
            flat = torch.empty(tensors.params[0].numel() + shift)
            getattr(tensors, name)[0] = flat[shift:].view(SHAPES[0]).copy_(getattr(tensors, name)[0])
        compare(CUDA, tensors, watched, [settings(beta2=0.5)])
        results.append([*tensors.params, *tensors.exp_avgs, *tensors.averages, *watched.averages])
    assert all(map(torch.equal, *results))


def test_many_tensors(functions):
    shapes = tuple((i % 9 * (i % 5 + 1),) for i in range(700))  # more than a CTA has threads; every ninth is empty
    tensors, watched = make(CUDA.device, shapes=shapes, groups=(0, 1, 1))
    exact, rows = wide(tensors, watched), [settings(beta2=0.5), settings(lr=0.3)]
    outcome = run(cuda_impl.step, tensors, watched, rows, clip=2.0)
    torch.testing.assert_close(outcome.double(), run(reference.step, *exact, rows, clip=2.0), rtol=1e-6, atol=0.0)
    assert_near(tensors, exact[0])


@pytest.mark.parametrize("averages", [True, False])
def test_it_moves_32_bytes_a_parameter(averages, monkeypatch):
    """Per parameter, the first launch reads 4 bytes, and the second reads 16 and writes 12. Without averages the second
    reads 12 and writes 8."""
    loaded, moved = ctypes.CDLL(str(cuda_host.build([SOURCE]))), []
    functions = cuda_launch.Functions(loaded)
    loaded.jf_emulation_count.restype = ctypes.c_int64

    def counted(function):
        def call(*arguments):
            error = function(*arguments)
            moved.append(tuple(loaded.jf_emulation_count(name) for name in (b"load", b"store")))
            return error

        return call

    for name in ("jf_novograd_squares", "jf_novograd_update"):
        setattr(functions, name, counted(getattr(functions, name)))
    monkeypatch.setattr(cuda_launch, "functions", lambda: functions)
    tensors, _ = make(CUDA.device, averages=averages)
    run(cuda_impl.step, tensors, Watched([], []), [settings()])
    count = sum(p.numel() for p in tensors.params)
    assert moved == [(4 * count, 0), ((12 + 4 * averages) * count, (8 + 4 * averages) * count)]


def test_buffers_alone_take_no_part_in_the_norm(functions):
    """Buffers with NaN are averaged and do not cause a skipped step. Integers are copied bit by bit."""
    tensors, _ = make(CUDA.device, shapes=((3,), (2,)))
    nan = torch.tensor([0x7F800001FFC00001, -1, 5])  # as fp32 some of these bits are NaN
    watched = Watched([torch.full((1500,), torch.nan), nan], [torch.zeros(1500), torch.zeros(3, dtype=torch.int64)])
    assert run(cuda_impl.step, tensors, watched, [settings()])[1] == 0
    assert watched.averages[0].isnan().all() and torch.equal(watched.averages[1], nan)


def test_a_launch_that_fails_is_told(monkeypatch):
    launches = {"jf_novograd_squares": lambda *_: b"an illegal memory access", "jf_novograd_update": None}
    monkeypatch.setattr(cuda_launch, "functions", lambda: SimpleNamespace(**launches))
    tensors, watched = make(CUDA.device)
    with pytest.raises(RuntimeError, match=r"novograd \(cuda\): an illegal memory access"):
        run(cuda_impl.step, tensors, watched, [settings()])


# ---- the library, NVRTC, dispatch ----


@pytest.mark.parametrize("functions", [{}, {"jf_novograd_size": lambda: 8}])
def test_a_library_of_another_version_is_refused(functions, monkeypatch):
    """The library has no NovoGrad kernels, or kernels with other arguments, and CuPy is not installed."""
    monkeypatch.setattr(native, "cuda_library", lambda: SimpleNamespace(_name="libjasper_fast_cuda.so", **functions))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvrtc, "missing", lambda: "CuPy is not installed")
    with pytest.raises(native.Missing, match=r"libjasper_fast_cuda.so is of another version .*CuPy is not installed"):
        cuda_launch.functions.__wrapped__()


@pytest.fixture
def turing(monkeypatch):
    """Simulates a built CUDA library and a GPU that is too old for Triton. Returns a list; each requested verdict is
    appended to it."""
    asked = []

    def check(device, op, face, dtype):
        asked.append((op, face, dtype))
        return verdict(op, quick=True)

    monkeypatch.setattr(backends, "why_missing", lambda name, _: {"triton": "too old", "cpu": "a CPU's"}.get(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(verdicts, "_check_now", check)
    monkeypatch.setattr(verdicts, "key", lambda device: {"device": "NVIDIA Imaginary 75", "driver": "580"})
    return asked


def test_below_sm_80_novograd_steps_in_cuda_and_can_be_graphed(turing):
    p = torch.nn.Parameter(torch.randn(4))
    for backend in ("auto", "cuda"):
        optimizer = NovoGrad([p], backend=backend)
        assert optimizer._face(GPU, [p]) == "cuda" and backends.face("novograd", "cuda") is cuda_impl
        optimizer._face = lambda device, params, of=optimizer: NovoGrad._face(of, GPU, params)
        assert optimizer.in_kernels()
    assert turing == [("novograd", "cuda", "float32")]  # a backend requested by name is not checked
    assert NovoGrad([p])._face(GPU, [p.double()]) == "reference"
    plan = checks.plan(GPU, quick=True, ops=("novograd",), dtypes=("float32",))
    assert {(c.op, c.face, c.variant) for c in plan} == {("novograd", "cuda", v) for v in checks.STEP_VARIANTS}


# ---- mutants: as in test_conv1d_cuda_mutants.py ----


@pytest.mark.slow
@pytest.mark.parametrize("name", mutant_rig.chosen(NOVOGRAD))
def test_a_mutant_is_found(name: str, tmp_path: Path) -> None:
    folder = mutant_rig.mutated(NOVOGRAD[name], tmp_path)
    library = cuda_host.build([folder / "cuda/emulate/novograd.cpp"], ["-Wno-error"], folder=folder)
    assert mutant_rig.outcome(lambda: check(library)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [None, "sums are read before they are written"])
def test_thread_sanitizer_finds_the_race_of_a_mutant_and_no_other(mutant: str | None, tmp_path: Path) -> None:
    folder = mutant_rig.mutated(NOVOGRAD[mutant], tmp_path) if mutant else cuda_host.CSRC
    library = cuda_host.build([folder / "cuda/emulate/novograd.cpp"], ["-Wno-error"], "thread", folder=folder)
    reports = mutant_rig.races(f"from test_novograd_cuda import *; check({str(library)!r}, mutant_rig.SEEDS[1:])")
    assert ("data race" in reports) == (mutant is not None)
