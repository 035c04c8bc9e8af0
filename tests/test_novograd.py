"""Compares NovoGrad's step on every face with the reference in fp64. Tests its CUDA kernels, emulated on the CPU, and
when dispatch chooses them."""

import ctypes
import math
from pathlib import Path
from types import SimpleNamespace

import cuda_host
import mutant_rig
import pytest
import torch
from close import assert_close
from conftest import Face, make_face
from cuda_mutants import NOVOGRAD
from standins import GPU, spied, verdict, verdicts_of_its_own, wrap  # noqa: F401
from torch import Tensor

from jasper_fast import NovoGrad
from jasper_fast.dispatch import backends, verdicts
from jasper_fast.kernels.novograd import cuda_impl, cuda_launch, reference, table
from jasper_fast.kernels.novograd.operands import Settings, Tensors, Watched
from jasper_fast.selfcheck import checks

# The last has more elements than a run, which one Triton program or CTA handles, and not a multiple of that number.
SHAPES = ((5, 3, 11), (7,), (1,), (4, 5, 1), (), (0, 3), (3, 1025), (8192 + 1024 + 5,))
CUDA = Face("cuda", torch.device("cpu"))
SOURCE = cuda_host.CSRC / "cuda/emulate/novograd.cpp"
GUARD = 3.0e33
LISTS = ("grads", "params", "exp_avgs", "averages")
# Shifts (in elements) of the four LISTS: each tuple misaligns exactly one of them.
EACH = tuple(tuple(int(i == k) for i in range(4)) for k in range(4))


@pytest.fixture(params=["reference", "cpu", "triton", "cuda", "cuda emulated"])
def face(request, monkeypatch) -> Face:
    """Returns each face in turn. "cuda emulated": the CUDA face, with its kernels emulated on the CPU."""
    if request.param != "cuda emulated":
        return make_face(request.param)
    monkeypatch.setattr(cuda_launch, "functions", emulated)
    return CUDA


def emulated() -> ctypes.CDLL:
    return cuda_launch.bind(ctypes.CDLL(str(cuda_host.build([SOURCE]))))


def settings(lr=0.02, beta1=0.95, beta2=0.0, averaging=False, eps=1e-8, weight_decay=1e-2, weight=0.1) -> Settings:
    share = 1 - beta1 if averaging else 1.0
    return Settings(lr, beta1, share, beta2, 1 - beta2, eps, share * weight_decay, weight)


def make(device, shapes=SHAPES, groups=(0,), averages=True, seed=0) -> tuple[Tensors, Watched]:
    draw = torch.Generator().manual_seed(seed)
    new = lambda: [torch.randn(s, generator=draw).to(device) for s in shapes]  # noqa: E731
    squares = [torch.rand((), generator=draw).to(device) * 3 for _ in shapes]
    squares[1].zero_()  # as before the first step
    of = [groups[i % len(groups)] for i in range(len(shapes))]
    tensors = Tensors(new(), new(), new(), squares, new() if averages else [], of)
    if not averages:
        return tensors, Watched([], [])
    counts = torch.tensor([2**40 + 3, -1], device=device)
    lives = [*new()[:2], counts, torch.randn(3, generator=draw).to(device).double()]
    return tensors, Watched(lives, [*new()[:2], torch.zeros_like(counts), torch.zeros_like(lives[-1])])


def mapped(change, tensors: Tensors, watched: Watched) -> tuple[Tensors, Watched]:
    *lists, groups = tensors
    new = [[change(x) for x in of] for of in (*lists, *watched)]
    return Tensors(*new[:-2], groups), Watched(*new[-2:])


def wide(tensors: Tensors, watched: Watched) -> tuple[Tensors, Watched]:
    return mapped(lambda x: x.double() if x.is_floating_point() else x.clone(), tensors, watched)


def copies(tensors: Tensors, watched: Watched) -> tuple[Tensors, Watched]:
    return mapped(torch.clone, tensors, watched)


def run(step, tensors, watched, rows, scale=None, found=None, clip=0.0, guard=True, held=None) -> Tensor:
    device = tensors.params[0].device
    given = [None if x is None else torch.tensor([x], device=device) for x in (scale, found)]
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    return step(tensors, watched, table, *given, clip, guard, {} if held is None else held)


def compare(face: Face, tensors, watched, rows, **how) -> Tensor:
    """Compares one step of the face with the reference in fp64. The errors of the reference in fp32 set the limits.
    Returns the step's outcome."""
    low, exact = copies(tensors, watched), wide(tensors, watched)
    grads = [g.clone() for g in tensors.grads]
    got = run(face.load("novograd").step, tensors, watched, rows, **how)
    plain, want = (run(reference.step, *of, rows, **how) for of in (low, exact))
    assert_close("outcome", got.float().clamp(max=1e30), plain.float().clamp(max=1e30), want.clamp(max=1e30))
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        for i, (a, b, c) in enumerate(zip(*(getattr(of, name) for of in (tensors, low[0], exact[0])), strict=True)):
            if a.numel():
                assert_close(f"{name}[{i}] {tuple(a.shape)}", a, b, c, factor=4.0)
    for i, (a, b, c) in enumerate(zip(watched.averages, low[1].averages, exact[1].averages, strict=True)):
        assert_close(f"watched[{i}]", a, b, c) if a.dtype == torch.float32 else torch.testing.assert_close(a, c)
    assert all(torch.equal(a, b) for a, b in zip(grads, tensors.grads, strict=True)), "a gradient was changed"
    return got


def assert_near(tensors: Tensors, exact: Tensors) -> None:
    """Compares results of several steps, or of very many tensors, with those in fp64."""
    torch.testing.assert_close(wide(tensors, Watched([], []))[0], exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("of", "averages"),
    [
        ({}, False),
        ({"beta2": 0.5}, True),
        ({"beta2": 0.98, "averaging": True}, False),
        ({"weight_decay": 0.0, "eps": 0.1, "beta1": 0.0}, True),
    ],
)
def test_it_is_the_formula(face, of, averages):
    tensors, watched = make(face.device, averages=averages)
    found = compare(face, tensors, watched, [settings(**of)])
    assert found[1] == 0 and found[0] > 0


def test_scale_clip_and_groups(face):
    """Gradients are divided by the scale and clipped by their common norm. Each parameter uses its group's settings."""
    rows = [settings(), settings(lr=0.5, beta2=0.9, eps=1.0), settings(weight_decay=0.0, averaging=True)]
    for part in (1 / 3, 2.0):  # the second clip lies above the norm, so nothing is clipped
        tensors, watched = make(face.device, groups=(0, 2, 1))
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in tensors.grads])) / 8
        found = compare(face, tensors, watched, rows, scale=8.0, clip=float(norm) * part)
        torch.testing.assert_close(found[0], norm)


def test_several_steps_with_what_is_held(face):
    """Every step has new gradient tensors, another learning rate and another weight of the average."""
    tensors, watched = make(face.device)
    held: dict = {}
    twin = wide(tensors, watched)
    for seed in range(4):
        rows = [settings(lr=0.1 / (1 + seed), beta2=0.5, weight=0.5 / (1 + seed))]
        grads = make(face.device, seed=seed + 1)[0].grads
        tensors, twin = tensors._replace(grads=grads), (twin[0]._replace(grads=[g.double() for g in grads]), twin[1])
        run(face.load("novograd").step, tensors, watched, rows, held=held)
        run(reference.step, *twin, rows)
    assert_near(tensors, twin[0])


@pytest.mark.parametrize(("value", "where"), [(math.nan, 0), (math.nan, -1), (math.inf, -1), (-math.inf, 0)])
def test_a_bad_gradient_changes_nothing_but_averages(face, value, where):
    tensors, watched = make(face.device)
    tensors.grads[where].view(-1)[-1] = value
    before, others = copies(tensors, watched)
    found = run(face.load("novograd").step, tensors, watched, [settings()])
    assert found[1] == 1 and not found[0].isfinite()
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert all(map(torch.equal, getattr(tensors, name), getattr(before, name))), name
    for lives, averages, got in (
        (before.params, before.averages, tensors.averages),
        (others.lives, others.averages, watched.averages),
    ):
        reference.average(lives, averages, 0.1)
        torch.testing.assert_close(got, averages)


def test_found_inf_is_obeyed_and_without_a_guard_nan_goes_in(face):
    step = face.load("novograd").step
    tensors, watched = make(face.device, averages=False)
    before = copies(tensors, watched)
    assert run(step, tensors, watched, [settings()], found=1.0, guard=False)[1] == 1
    assert all(map(torch.equal, tensors.params, before[0].params))
    compare(face, tensors, watched, [settings()], found=0.0, guard=False)
    tensors.grads[0].fill_(math.nan)
    assert run(step, tensors, watched, [settings()], guard=False)[1] == 0
    assert tensors.params[0].isnan().all() and tensors.params[1].isfinite().all()


def test_memory_in_another_order_and_unaligned(face):
    flat = torch.randn(4, 1 + 6 * 5 * 3 + 1030, device=face.device)
    grads, params, moments, means = ([x[1:91].view(3, 5, 6).permute(2, 1, 0), x[91:-1]] for x in flat)
    squares = [torch.rand((), device=face.device) for _ in range(2)]
    tensors = Tensors(grads, params, moments, squares, means, [0, 0])
    compare(face, tensors, Watched([], []), [settings(beta2=0.3)])


def test_one_tensor_that_is_not_aligned_leaves_the_others_bits(face):
    """The results of aligned tensors do not depend on whether another tensor is aligned."""
    results = []
    for shift in (0, 1):
        tensors, watched = make(face.device)
        for name in LISTS:
            flat = torch.empty(tensors.params[0].numel() + shift, device=face.device)
            getattr(tensors, name)[0] = flat[shift:].view(SHAPES[0]).copy_(getattr(tensors, name)[0])
        compare(face, tensors, watched, [settings(beta2=0.5)])
        results.append([*tensors.params, *tensors.exp_avgs, *tensors.averages, *watched.averages])
    assert all(map(torch.equal, *results))


def test_many_tensors(face):
    shapes = tuple((i % 9 * (i % 5 + 1),) for i in range(700))  # more than a CTA has threads; every ninth is empty
    tensors, watched = make(face.device, shapes=shapes, groups=(0, 1, 1))
    exact, rows = wide(tensors, watched), [settings(beta2=0.5), settings(lr=0.3)]
    outcome = run(face.load("novograd").step, tensors, watched, rows, clip=2.0)
    torch.testing.assert_close(outcome.double(), run(reference.step, *exact, rows, clip=2.0), rtol=1e-6, atol=0.0)
    assert_near(tensors, exact[0])


def test_buffers_alone_take_no_part_in_the_norm(face):
    """Buffers with NaN are averaged and do not cause a skipped step. Integers are copied bit by bit."""
    tensors, _ = make(face.device, shapes=((3,), (2,)))
    nan = torch.tensor([0x7F800001FFC00001, -1, 5], device=face.device)  # as fp32 some of these bits are NaN
    lives = [torch.full((1500,), torch.nan, device=face.device), nan]
    watched = Watched(lives, [torch.zeros_like(x) for x in lives])
    assert run(face.load("novograd").step, tensors, watched, [settings()])[1] == 0
    assert watched.averages[0].isnan().all() and torch.equal(watched.averages[1], nan)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_threads(threads):
    face, results = make_face("cpu"), []
    for count in (3, threads):
        torch.set_num_threads(count)
        tensors, watched = make(face.device, shapes=((65536 * 2 + 17,), *SHAPES))
        outcome = run(face.load("novograd").step, tensors, watched, [settings(beta2=0.5)])
        results.append([outcome, *tensors.params, *tensors.exp_avg_sqs, *tensors.averages])
    assert all(map(torch.equal, *results))


def test_a_sum_of_squares_beyond_fp32_is_none_beyond_fp64():
    """Finite gradients whose sum of squares overflows fp32 do not count as infinite, because the CPU sums in fp64."""
    face = make_face("cpu")
    tensors, watched = make(face.device)
    tensors.grads[0].fill_(1e30)
    assert run(face.load("novograd").step, tensors, watched, [settings()])[1] == 0


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda t: t._replace(grads=t.grads[:-1]), "gradients"),
        (lambda t: t._replace(exp_avgs=[x.double() for x in t.exp_avgs]), "float32"),
        (lambda t: t._replace(averages=[x.flatten()[1:] for x in t.averages]), "shape"),
        (lambda t: t._replace(grads=[t.grads[0].permute(2, 1, 0), *t.grads[1:]]), "shape"),
        (lambda t: t._replace(groups=[5] * len(t.groups)), "no row 5"),
        (lambda t: t._replace(exp_avg_sqs=t.params), "one float32"),
    ],
)
def test_the_cpu_refuses_what_does_not_fit(spoil, word):
    face = make_face("cpu")
    tensors, watched = make(face.device)
    with pytest.raises(RuntimeError, match=word):
        run(face.load("novograd").step, spoil(tensors), watched, [settings()])


# ---- the CUDA kernels, emulated ----


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
    functions, bits = cuda_launch.bind(loaded), []
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


@pytest.mark.parametrize("averages", [True, False])
def test_it_moves_32_bytes_a_parameter(averages, monkeypatch):
    """Per parameter, the first launch reads 4 bytes, and the second reads 16 and writes 12. Without averages the second
    reads 12 and writes 8."""
    loaded, moved = ctypes.CDLL(str(cuda_host.build([SOURCE]))), []
    functions = cuda_launch.bind(loaded)
    loaded.jf_emulation_count.restype = ctypes.c_int64

    def counted(launch, *arguments):
        error = launch(*arguments)
        moved.append(tuple(loaded.jf_emulation_count(name) for name in (b"load", b"store")))
        return error

    for name in ("jf_novograd_squares", "jf_novograd_update"):
        wrap(monkeypatch, functions, name, counted)
    monkeypatch.setattr(cuda_launch, "functions", lambda: functions)
    tensors, _ = make(CUDA.device, averages=averages)
    run(cuda_impl.step, tensors, Watched([], []), [settings()])
    count = sum(p.numel() for p in tensors.params)
    assert moved == [(4 * count, 0), ((12 + 4 * averages) * count, (8 + 4 * averages) * count)]


def test_a_launch_that_fails_is_told(monkeypatch):
    launches = {"jf_novograd_squares": lambda *_: b"an illegal memory access", "jf_novograd_update": None}
    monkeypatch.setattr(cuda_launch, "functions", lambda: SimpleNamespace(**launches))
    tensors, watched = make(CUDA.device)
    with pytest.raises(RuntimeError, match=r"novograd \(cuda\): an illegal memory access"):
        run(cuda_impl.step, tensors, watched, [settings()])


# ---- the library, NVRTC, dispatch ----


@pytest.fixture
def turing(monkeypatch):
    """Simulates a built CUDA library and a GPU that is too old for Triton. Returns a list; each requested verdict is
    appended to it."""
    monkeypatch.setattr(backends, "why_missing", lambda name, _: {"triton": "too old", "cpu": "a CPU's"}.get(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(verdicts, "key", lambda device: {"device": "NVIDIA Imaginary 75", "driver": "580"})
    monkeypatch.setattr(verdicts, "_check_now", lambda device, op, *_: verdict(op, quick=True))
    return spied(monkeypatch, verdicts, "_check_now", lambda device, *of: of)


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
    reports = mutant_rig.races(f"from test_novograd import *; check({str(library)!r}, mutant_rig.SEEDS[1:])")
    assert ("data race" in reports) == (mutant is not None)
