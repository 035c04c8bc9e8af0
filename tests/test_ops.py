"""The registered ops: opcheck, gradients of the panes, argument errors, seeds, running statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from conftest import make_face
from torch.library import opcheck

from jasper_fast import ops
from jasper_fast.backends import BackendMissing
from jasper_fast.kernels import philox

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    return make_face(request.param).name


@pytest.fixture(params=["reference", "cpu"])
def conv_backend(request):
    return make_face(request.param).name


def inputs(n=2, c=13, t=9, dtype=torch.float32):
    y = torch.randn(n, c, t, dtype=dtype)
    gamma, beta = torch.rand(c) + 0.5, torch.randn(c)
    return y, gamma, beta, torch.zeros(c), torch.ones(c)


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck_bn_relu_dropout(backend, residual):
    y, gamma, beta, *_ = inputs()
    mean, m2 = ops.bn_stats(y, backend)
    rstd = (m2 / 18 + 1e-3).rsqrt()
    args = [v.requires_grad_() for v in (y, gamma, beta)]
    res = torch.randn(y.shape, requires_grad=True) if residual else None
    lengths, seed = torch.tensor([9, 4]), torch.tensor([7])
    call = (args[0], mean, rstd, args[1], args[2], res, lengths, seed, 0.25, True, backend)
    opcheck(torch.ops.jasper_fast.bn_relu_dropout, call, test_utils=CHECKS)
    opcheck(torch.ops.jasper_fast.bn_stats, (y.detach(), backend), test_utils=CHECKS)


def test_opcheck_conv1d(conv_backend):
    face = "cpu" if conv_backend == "cpu" else "aten"
    x, w = torch.randn(2, 8, 11, requires_grad=True), torch.randn(5, 8, 3, requires_grad=True)
    opcheck(torch.ops.jasper_fast.conv1d, (x, w, torch.tensor([11, 6]), 1, 1, 1, face), test_utils=CHECKS)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_sub_block_equals_its_two_halves(backend, p):
    """One node from y to y gives the bits of bn_relu_dropout and conv1d, forward, backward and running statistics."""
    y, gamma, beta, mean, var = inputs(c=8, t=21)
    weight, lengths = torch.randn(6, 8, 5), torch.tensor([21, 9])
    common = {"lengths": lengths, "p": p, "seed": 5, "backend": backend}

    def halves(y, gamma, beta, weight, mean, var):
        z = ops.bn_relu_dropout(y, gamma, beta, mean, var, **common)
        return ops.conv1d(z, weight, lengths=lengths, padding=4, dilation=2, backend=backend)

    def whole(y, gamma, beta, weight, mean, var):
        return ops.sub_block(y, gamma, beta, mean, var, weight, padding=4, dilation=2, **common)

    results = []
    for run in (halves, whole):
        leaves = [v.clone().requires_grad_() for v in (y, gamma, beta, weight)]
        running = mean.clone(), var.clone()
        out = run(*leaves, *running)
        torch.manual_seed(1)
        results.append([out.detach(), *running, *torch.autograd.grad(out, leaves, torch.randn(out.shape))])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_opcheck_sub_block(backend):
    y, gamma, beta, mean, var = inputs(c=8, t=21)
    conv = "cpu" if backend == "cpu" else "aten"
    leaves = [v.requires_grad_() for v in (y, gamma, beta, torch.randn(6, 8, 5))]
    lengths, seed = torch.tensor([21, 9]), torch.tensor([5])
    call = (leaves[0], mean, var, *leaves[1:3], lengths, seed, 0.25, True, leaves[3], 2, 1, backend, conv)
    opcheck(torch.ops.jasper_fast.sub_block, call, test_utils=CHECKS)


def pane_inputs(dtype=torch.float64, m=(2, 7)):
    n, t = m
    xs = [torch.randn(n, c, t, dtype=dtype).relu().requires_grad_() for c in (3, 4)]
    weights = [torch.randn(5, c, 1, dtype=dtype, requires_grad=True) for c in (3, 4)]
    gammas = [torch.rand(5, dtype=dtype).add(0.5).requires_grad_() for _ in xs]
    betas = [torch.randn(5, dtype=dtype, requires_grad=True) for _ in xs]
    return xs, weights, gammas, betas


def test_opcheck_panes():
    xs, weights, gammas, betas = pane_inputs(torch.float32)
    opcheck(torch.ops.jasper_fast.gram, (xs[0],), test_utils=CHECKS)
    means, covs = zip(*(ops.gram(x.detach()) for x in xs), strict=True)
    means, covs = ([v.requires_grad_() for v in vs] for vs in (means, covs))
    opcheck(torch.ops.jasper_fast.panes, (xs, means, covs, weights, gammas, betas, 1e-3), test_utils=CHECKS)


def plain_panes(xs, weights, gammas, betas):
    terms = zip(xs, weights, gammas, betas, strict=True)
    return sum(F.batch_norm(F.conv1d(x, w), None, None, g, b, training=True, eps=1e-3) for x, w, g, b in terms)


def test_panes_equal_their_definition_in_fp64():
    xs, weights, gammas, betas = pane_inputs()
    leaves = [*xs, *weights, *gammas, *betas]
    out, mean, var = ops.panes(xs, [ops.gram(x) for x in xs], weights, gammas, betas)
    want = plain_panes(xs, weights, gammas, betas)
    torch.testing.assert_close(out, want)
    y = F.conv1d(xs[1], weights[1])
    torch.testing.assert_close(mean[1], y.mean((0, 2)))
    torch.testing.assert_close(var[1], y.var((0, 2), correction=0))
    up = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, up)
    for name, (g, w) in enumerate(zip(got, torch.autograd.grad(want, leaves, up), strict=True)):
        torch.testing.assert_close(g, w, msg=str(name))


def test_gradcheck_panes():
    xs, weights, gammas, betas = pane_inputs(m=(1, 6))

    def run(*leaves):
        x, w, g, b = (list(leaves[i : i + 2]) for i in (0, 2, 4, 6))
        return ops.panes(x, [ops.gram(v) for v in x], w, g, b)[0]

    assert torch.autograd.gradcheck(run, [*xs, *weights, *gammas, *betas])


def test_panes_keep_fp32_accuracy():
    """Outputs by the tolerance rule. Gradients at 16 times: they sum g^T x in fp32, where ATen's CPU batch norm sums in
    fp64; in fp16 and bf16, where that sum is not what limits, the rule itself holds (next test)."""
    check_pane_accuracy(torch.float32, factor=16.0)


def test_panes_keep_bf16_accuracy():
    check_pane_accuracy(torch.bfloat16, factor=2.0)


def check_pane_accuracy(low_dtype, factor):
    inputs = pane_inputs(m=(8, 200))
    results = []
    for dtype, form in ((torch.float64, plain_panes), (low_dtype, plain_panes), (low_dtype, None)):
        x, w, g, b = ([v.detach().to(dtype).requires_grad_() for v in vs] for vs in inputs)
        if form is None:
            w, g, b = ([v.detach().float().requires_grad_() for v in vs] for vs in (w, g, b))  # as under autocast
        out = form(x, w, g, b) if form else ops.panes(x, [ops.gram(v) for v in x], w, g, b)[0]
        torch.manual_seed(2)
        up = torch.randn(out.shape, dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad(out, [*x, *w, *g, *b], up)
        results.append([out.detach(), *(v.to(dtype) for v in grads)])
    for i, (ref, low, got) in enumerate(zip(*results, strict=True)):
        assert_close(f"tensor {i}", got, low, ref, factor=2.0 if i == 0 else factor)


def test_public_function_equals_pytorch(backend):
    y, gamma, beta, mean, var = inputs()
    residual, lengths = torch.randn(y.shape), torch.tensor([9, 4])
    want_mean, want_var = mean.clone(), var.clone()
    want = F.relu(F.batch_norm(y, want_mean, want_var, gamma, beta, True, 0.1, 1e-3) + residual)
    want = want.masked_fill(torch.arange(9) >= lengths[:, None, None], 0)
    got = ops.bn_relu_dropout(y, gamma, beta, mean, var, residual=residual, lengths=lengths, backend=backend)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(var, want_var)
    assert got.stride() == (9 * 13, 1, 13)


def test_given_statistics_are_used(backend):
    y, gamma, beta, mean, var = inputs()
    stats = ops.bn_stats(y, backend)
    want = ops.bn_relu_dropout(y, gamma, beta, mean.clone(), var.clone(), backend=backend)
    got = ops.bn_relu_dropout(y, gamma, beta, mean, var, stats=stats, backend=backend)
    assert torch.equal(got, want)
    shifted = (stats[0] + 1, stats[1])
    assert not torch.equal(ops.bn_relu_dropout(y, gamma, beta, mean, var, stats=shifted, backend=backend), want)


def test_modes(backend):
    """Evaluation neither drops nor updates; frozen drops with running statistics and leaves them alone."""
    y, gamma, beta, mean, var = inputs()
    mean += 0.3
    before = mean.clone(), var.clone()
    evaluated = ops.bn_relu_dropout(y, gamma, beta, mean, var, p=0.5, training=False, backend=backend)
    want = F.relu(F.batch_norm(y, mean, var, gamma, beta, False, 0.1, 1e-3))
    torch.testing.assert_close(evaluated, want, atol=1e-6, rtol=1e-5)
    frozen = ops.bn_relu_dropout(y, gamma, beta, mean, var, p=0.5, frozen=True, seed=3, backend=backend)
    keep = philox.keep_mask(2, 13, 9, 0.5, torch.tensor([3]), y.device)
    torch.testing.assert_close(frozen, want * keep * 2, atol=1e-6, rtol=1e-5)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("layout", ["nct", "ntc", "sliced", "expanded"])
def test_any_strides(backend, layout):
    y, gamma, beta, mean, var = inputs()
    y = {
        "nct": y,
        "ntc": y.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([y, y], 1)[:, ::2][:, :13],
        "expanded": y[:1].expand(2, 13, 9),
    }[layout]
    leaf = y.detach().clone().requires_grad_()
    strided = y.detach().requires_grad_()
    want = F.relu(F.batch_norm(leaf, None, None, gamma, beta, True, 0.1, 1e-3))
    got = ops.bn_relu_dropout(strided, gamma, beta, mean, var, backend=backend)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    up = torch.randn(want.shape)
    want.backward(up)
    (dy,) = torch.autograd.grad(got, strided, up.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(dy, leaf.grad, atol=1e-5, rtol=1e-5)


def test_a_seed_repeats_its_mask_and_none_draws_from_the_generator(backend):
    y, gamma, beta, mean, var = inputs(c=64)
    run = lambda seed=None: ops.bn_relu_dropout(y, gamma, beta, mean, var, p=0.5, seed=seed, backend=backend)  # noqa: E731
    assert torch.equal(run(11), run(torch.tensor([11])))
    assert not torch.equal(run(11), run(12))
    torch.manual_seed(0)
    first = run()
    assert not torch.equal(first, run())
    torch.manual_seed(0)
    assert torch.equal(first, run())


def test_errors():
    y, gamma, beta, mean, var = inputs()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.bn_relu_dropout(y[:1, :, :1], gamma, beta, mean, var)
    with pytest.raises(ValueError, match=r"gamma must be \(13,\)"):
        ops.bn_relu_dropout(y, gamma[:5], beta, mean, var)
    with pytest.raises(ValueError, match="residual"):
        ops.bn_relu_dropout(y, gamma, beta, mean, var, residual=y[:, :, :3])
    with pytest.raises(ValueError, match="lengths"):
        ops.bn_relu_dropout(y, gamma, beta, mean, var, lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="p must lie"):
        ops.bn_relu_dropout(y, gamma, beta, mean, var, p=1.0)
    with pytest.raises(ValueError, match="running_mean and running_var"):
        ops.bn_relu_dropout(y, gamma, beta, None, None, training=False)
    with pytest.raises(BackendMissing, match="cuda"):
        ops.bn_relu_dropout(y, gamma, beta, mean, var, backend="cuda")


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_conv1d_equals_pytorch(conv_backend, stride, dilation):
    x, w = torch.randn(2, 8, 31), torch.randn(20, 8, 7)
    pad = 3 * dilation
    need = stride == 1
    grads = []
    for run in (
        lambda x, w: F.conv1d(x, w, None, stride, pad, dilation),
        lambda x, w: ops.conv1d(x, w, stride=stride, padding=pad, dilation=dilation, backend=conv_backend),
    ):
        xs, ws = x.clone().requires_grad_(need), w.clone().requires_grad_()
        y = run(xs, ws)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape))
        grads.append([y.detach(), ws.grad] + ([xs.grad] if need else []))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
