"""Compares NovoGrad's step on every face with the reference in fp64."""

import ctypes
import math

import cuda_host
import pytest
import torch
from close import assert_close
from conftest import Face, make_face
from torch import Tensor

from jasper_fast.kernels.novograd import cuda_launch, reference
from jasper_fast.kernels.novograd.operands import Settings, Tensors, Watched

# The last is longer than the run of a Triton program or CUDA block, and no multiple of it.
SHAPES = ((5, 3, 11), (7,), (1,), (4, 5, 1), (), (0, 3), (3, 1025), (8192 + 1024 + 5,))


@pytest.fixture(params=["reference", "cpu", "triton", "cuda", "cuda emulated"])
def face(request, monkeypatch) -> Face:
    """Returns each face in turn. "cuda emulated": the CUDA face, with its kernels emulated on the CPU."""
    if request.param != "cuda emulated":
        return make_face(request.param)
    monkeypatch.setattr(cuda_launch, "functions", emulated)
    return Face("cuda", torch.device("cpu"))


def emulated() -> cuda_launch.Functions:
    return cuda_launch.Functions(ctypes.CDLL(str(cuda_host.build([cuda_host.CSRC / "cuda/emulate/novograd.cpp"]))))


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
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        for a, b in zip(getattr(tensors, name), getattr(exact, name), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


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
