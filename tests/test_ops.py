"""The registered ops: opcheck, statistics, packs, halo, argument errors, seeds, running statistics."""

import functools

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from conftest import assert_raises, check_op, settle

from jasper_fast import ops
from jasper_fast.dispatch import backends
from jasper_fast.kernels import philox
from jasper_fast.kernels.layout import mask
from jasper_fast.kernels.operands import Geometry
from jasper_fast.ops import conv1d_op

assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # for tensors and lists of them


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
    call = (args[0], mean, rstd, args[1], args[2], res, lengths, seed, None, 0.25, True, 3, "", backend)
    check_op(torch.ops.jasper_fast.bn_relu_dropout, call)
    check_op(torch.ops.jasper_fast.bn_stats, (y.detach(), backend))


def packed_by_triton(weight):
    return backends.face("conv1d", "triton").pack(weight).data


@pytest.mark.slow
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck_conv1d(backend, stats):
    x, w = torch.randn(2, 8, 11, requires_grad=True), torch.randn(5, 8, 3, requires_grad=True)
    pack = packed_by_triton(w) if backend == "triton" and stats else None
    call = (x, w, torch.tensor([11, 6]), pack, 1, 1, 1, stats, backend, backend.replace("reference", "aten"))
    check_op(torch.ops.jasper_fast.conv1d, call)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_conv1d_and_its_statistics_equal_pytorch(backend, stride, dilation):
    x, w = torch.randn(2, 8, 31) + 3, torch.randn(20, 8, 7)
    how = {"stride": stride, "padding": 3 * dilation, "dilation": dilation}
    results = []
    for run in (F.conv1d, functools.partial(ops.conv1d, backend=backend)):
        leaves = [w.clone().requires_grad_(), x.clone().requires_grad_()][: 2 if stride == 1 else 1]
        y = run(leaves[1] if stride == 1 else x, leaves[0], **how)
        torch.manual_seed(1)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, torch.randn(y.shape))])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    y, (mean, m2) = ops.conv1d(x, w.requires_grad_(), **how, backend=backend, stats=True)
    assert torch.equal(y, results[1][0]) and not mean.requires_grad and not m2.requires_grad
    want, ref = F.conv1d(x, w, **how), F.conv1d(x.double(), w.double(), **how)
    rows = ref.shape[0] * ref.shape[2]
    assert_close("mean", mean, want.mean((0, 2)), ref.mean((0, 2)))
    assert_close("M2", m2, want.var((0, 2)) * (rows - 1), ref.var((0, 2)) * (rows - 1))


def test_a_pack_changes_no_bit():
    """Output, statistics and gradients are the same with and without a pack of the weight."""
    settle("triton")
    results = []
    for use in (False, True):
        torch.manual_seed(3)
        x, w = torch.randn(2, 8, 19, requires_grad=True), torch.randn(20, 8, 5, requires_grad=True)
        packed = packed_by_triton(w) if use else None
        y, stats = ops.conv1d(x, w, padding=2, backend="triton", stats=True, packed=packed)
        results.append([y.detach(), *stats, *torch.autograd.grad(y, (x, w), torch.randn(y.shape))])
    assert_equal(*results)


def test_a_weight_changed_before_backward_is_noticed():
    """Backward rejects a weight that has changed since forward. Autograd notices it because the weight is saved, and
    not the pack."""
    settle("triton")
    x, w = torch.randn(2, 8, 19), torch.randn(20, 8, 5, requires_grad=True)
    y = ops.conv1d(x, w, padding=2, backend="triton", packed=packed_by_triton(w))
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_master_weight(backend, low):
    """Under autocast activations have 16 bits, while the weight and its gradient stay fp32. No 16-bit copy of the
    weight is saved for backward."""
    x, w = torch.randn(2, 8, 19), torch.randn(24, 8, 5, requires_grad=True)
    kept = []
    with (
        torch.autocast(x.device.type, low),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = ops.conv1d(x, w, padding=2, backend=backend)
    assert y.dtype == low
    assert {t.dtype for t in kept if t.shape == w.shape} == {torch.float32}
    up = torch.randn(y.shape)
    (dw,) = torch.autograd.grad(y, w, up.to(low))
    results = []
    for dtype in (torch.float64, low):
        xs, ws = x.to(low).to(dtype), w.detach().to(dtype).requires_grad_()
        out = F.conv1d(xs, ws, padding=2)
        results.append([out, *torch.autograd.grad(out, ws, up.to(low).to(dtype))])
    (ref, ref_dw), (want, want_dw) = results
    assert dw.dtype == torch.float32
    assert_close("y", y, want, ref)
    assert_close("dw", dw.to(low), want_dw, ref_dw)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_sub_block_equals_its_two_halves(backend, p):
    """Results, gradients and statistics are those of bn_relu_dropout followed by conv1d."""
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
    near = 1e-5 if backend == "triton" else 0.0  # in Triton dgrad computes dbeta and dgamma, as sums over other tiles
    torch.testing.assert_close(*results, atol=near, rtol=near)


@pytest.mark.slow
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck_sub_block(backend, stats):
    y, gamma, beta, mean, var = inputs(c=8, t=21)
    leaves = [v.requires_grad_() for v in (y, gamma, beta, torch.randn(6, 8, 5))]
    pack = packed_by_triton(leaves[3]) if backend == "triton" and not stats else None
    lengths, seed = torch.tensor([21, 9]), torch.tensor([5])
    call = (leaves[0], mean, var, *leaves[1:3], lengths, seed, None, leaves[3], pack, 0.25, True, 2, 2, 1, stats, "")
    check_op(torch.ops.jasper_fast.sub_block, (*call, backend, backend.replace("reference", "aten")))


def test_sub_block_takes_and_gives_statistics(backend):
    """Passing the statistics of y changes no result. With next_stats, sub_block returns the statistics of its
    output."""
    y, gamma, beta, mean, var = inputs(c=8, t=21)
    weight, lengths = torch.randn(6, 8, 5), torch.tensor([21, 9])
    how = {"lengths": lengths, "padding": 2, "p": 0.25, "seed": 5, "backend": backend}
    results = []
    for stats in (None, ops.bn_stats(y, backend)):
        running = mean.clone(), var.clone()
        out, following = ops.sub_block(y, gamma, beta, *running, weight, stats=stats, next_stats=True, **how)
        results.append([out, *running, *following])
    assert_equal(*results)
    torch.testing.assert_close(following, ops.bn_stats(out, backend), atol=1e-5, rtol=1e-5)


def grads_of_sub_block(backend, halo, dtype):
    """Returns the output and all gradients of a sub-block. Its y is the output of a conv whose input is masked."""
    torch.manual_seed(7)
    lengths = torch.tensor([37, 11, 1, 0])
    x = mask(torch.randn(4, 8, 37), lengths).to(dtype)
    first, weight = torch.randn(24, 8, 7) * 0.3, torch.randn(16, 24, 5) * 0.1
    _, gamma, beta, mean, var = inputs(c=24)
    leaves = [v.requires_grad_() for v in (gamma, beta, weight)]
    y = ops.conv1d(x, first, lengths=lengths, padding=3, backend=backend).detach().requires_grad_()
    how = {"lengths": lengths, "p": 0.2, "seed": 5, "backend": backend, "halo": halo}
    out = ops.sub_block(y, gamma, beta, mean, var, weight, padding=2, **how)
    up = torch.randn(out.shape).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, [y, *leaves], up)], (y.detach(), gamma, beta, weight, lengths, up)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_halo_changes_no_bit(backend, dtype):
    plain, hinted = (grads_of_sub_block(backend, halo, dtype)[0] for halo in (None, 3))
    assert_equal(plain, hinted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sub_block_against_fp64(backend, dtype):
    """The output and all gradients are as close to fp64 as those of PyTorch's ops."""
    got, (y, gamma, beta, weight, lengths, up) = grads_of_sub_block(backend, 3, dtype)
    keep = philox.keep_mask(*y.shape, 0.2, 5, y.device) & (torch.arange(y.shape[2]) < lengths[:, None])[:, None]
    results = []
    for low in (torch.float64, dtype):
        of_norm = torch.promote_types(low, torch.float32)
        dtyped = zip((y, gamma, beta, weight), (low, of_norm, of_norm, low), strict=True)
        leaves = [v.detach().to(d).requires_grad_() for v, d in dtyped]
        z = F.relu(F.batch_norm(leaves[0], None, None, *leaves[1:3], True, 0.0, 1e-3)) * (1 / 0.8)
        out = F.conv1d(z.masked_fill(~keep, 0), leaves[3], padding=2)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, up.to(low))])
    for name, g, low, ref in zip(("out", "dy", "dgamma", "dbeta", "dw"), got, *reversed(results), strict=True):
        assert_close(name, g.to(low.dtype), low, ref)


@pytest.mark.parametrize("layout", ["nct", "ntc", "sliced", "expanded"])
def test_public_function_equals_pytorch_for_any_strides(backend, layout):
    y, gamma, beta, mean, var = inputs()
    y = {
        "nct": y,
        "ntc": y.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([y, y], 1)[:, ::2][:, :13],
        "expanded": y[:1].expand(2, 13, 9),
    }[layout]
    leaf = y.detach().clone().requires_grad_()
    strided = y.detach().requires_grad_()
    residual, lengths = torch.randn(y.shape), torch.tensor([9, 4])
    want_mean, want_var = mean.clone(), var.clone()
    want = F.relu(F.batch_norm(leaf, want_mean, want_var, gamma, beta, True, 0.1, 1e-3) + residual)
    want = want.masked_fill(torch.arange(9) >= lengths[:, None, None], 0)
    got = ops.bn_relu_dropout(strided, gamma, beta, mean, var, residual=residual, lengths=lengths, backend=backend)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((mean, var), (want_mean, want_var))
    assert got.stride() == (9 * 13, 1, 13)
    up = torch.randn(want.shape)
    want.backward(up)
    (dy,) = torch.autograd.grad(got, strided, up.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(dy, leaf.grad, atol=1e-5, rtol=1e-5)


def test_given_statistics_are_used(backend):
    y, gamma, beta, mean, var = inputs()
    stats = ops.bn_stats(y, backend)
    want = ops.bn_relu_dropout(y, gamma, beta, mean.clone(), var.clone(), backend=backend)
    assert torch.equal(ops.bn_relu_dropout(y, gamma, beta, mean, var, stats=stats, backend=backend), want)
    shifted = (stats[0] + 1, stats[1])
    assert not torch.equal(ops.bn_relu_dropout(y, gamma, beta, mean, var, stats=shifted, backend=backend), want)


def test_modes(backend):
    """Evaluation drops nothing and does not change the running statistics. `frozen` does not change them either, but
    drops elements."""
    y, gamma, beta, mean, var = inputs()
    mean += 0.3
    before = mean.clone(), var.clone()
    evaluated = ops.bn_relu_dropout(y, gamma, beta, mean, var, p=0.5, training=False, backend=backend)
    want = F.relu(F.batch_norm(y, mean, var, gamma, beta, False, 0.1, 1e-3))
    torch.testing.assert_close(evaluated, want, atol=1e-6, rtol=1e-5)
    frozen = ops.bn_relu_dropout(y, gamma, beta, mean, var, p=0.5, frozen=True, seed=3, backend=backend)
    keep = philox.keep_mask(2, 13, 9, 0.5, torch.tensor([3]), y.device)
    torch.testing.assert_close(frozen, want * keep * 2, atol=1e-6, rtol=1e-5)
    assert_equal((mean, var), before)


def test_lengths_and_vectors_may_be_strided(backend):
    def spread(x: torch.Tensor) -> torch.Tensor:
        """Returns the values of `x` (N,) in every second element of a longer tensor, with others in between."""
        return torch.stack([x, x + 4], 1)[:, 0]

    x, gamma, beta, mean, var = inputs()
    lengths = torch.tensor([5, 2])
    x = mask(x, lengths)
    taps, weight = torch.randn(13, 1, 3), torch.randn(4, 13, 1)
    for call in (
        lambda n, *vectors: ops.bn_relu_dropout(x, *vectors, lengths=n, training=False, backend=backend),
        lambda n, *vectors: ops.sub_block(x, *vectors, weight, lengths=n, training=False, backend=backend),
        lambda n, *_: ops.conv1d(x, weight, lengths=n, backend=backend),
        lambda n, *_: ops.depthwise(x, taps, lengths=n, out_lengths=n, padding=1, backend=backend),
        lambda n, *_: ops.separable_conv(x, taps, weight, lengths=n, out_lengths=n, padding=1, backend=backend),
        lambda n, *_: ops.panes_plain([x], [weight], [weight[:, 0, 0]], [weight[:, 1, 0]], lengths=n, backend=backend),
    ):
        given = lengths, gamma, beta, mean, var
        assert_equal(call(*given), call(*map(spread, given)))


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
    before = mean.clone(), var.clone()
    call = functools.partial(ops.bn_relu_dropout, y, gamma, beta)
    assert_raises((
        (lambda: ops.bn_relu_dropout(y[:1, :, :1], gamma, beta, mean, var), "more than 1 value per channel"),
        (lambda: ops.bn_relu_dropout(y[:0], gamma, beta, mean, var), "more than 1 value per channel"),
        (lambda: ops.bn_stats(y[0]), r"y must be \(N, C, T\), got \(13, "),
        (lambda: ops.bn_relu_dropout(y, gamma[:5], beta, mean, var), r"gamma must be \(13,\)"),
        (lambda: call(mean, var, residual=y[:, :, :3]), "residual"),
        (lambda: call(mean, var, lengths=torch.tensor([1])), "lengths"),
        (lambda: call(mean, var, p=1.0), "p must lie"),
        (lambda: call(mean, var, p=0.5, seed=torch.tensor([3], dtype=torch.int32)), "one int64"),
        (lambda: call(mean, var, p=0.5, seed=torch.tensor([3, 4])), "one int64"),
        (lambda: call(mean, var, stats=(mean[:1], var[:1])), r"each of stats must be \(13,\)"),
        (lambda: call(mean, var, halo=-1), "halo, the number of frames"),
        (lambda: call(None, None, training=False), "running_mean and running_var"),
    ))  # fmt: skip
    with pytest.raises(backends.BackendMissing, match="cuda"):
        call(mean, var, backend="cuda")
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1]), "running statistics changed before the error"


def test_a_strided_conv_runs_in_aten_only_for_the_gradient_of_x(backend):
    x, weight = torch.randn(2, 8, 9, requires_grad=True), torch.randn(4, 8, 3)
    face = lambda: conv1d_op.conv_face(x, weight, Geometry(stride=2), backend, None)[0]  # noqa: E731
    assert face() == "aten"
    with torch.no_grad():
        assert face() == ("aten" if backend == "reference" else backend)


def test_a_conv_names_what_does_not_fit(backend):
    x, weight, one = torch.zeros(2, 16, 9), torch.zeros(8, 32, 3), torch.ones(16)
    conv = functools.partial(ops.conv1d, x, weight[:, :16], backend=backend)
    assert_raises((
        (lambda: ops.conv1d(x, weight, backend=backend), r"do not fit: \(2, 16, 9\), \(8, 32, 3\)"),
        (lambda: ops.sub_block(x, one, one, None, None, weight, backend=backend), "do not fit"),
        (lambda: ops.sub_block(x, one, one, None, None, weight[:, :16], dilation=8, backend=backend), "y has 9 frames"),
        (lambda: conv(dilation=8), "x has 9 frames, too few"),
        (lambda: conv(stride=0), "at least 1"),
        (lambda: conv(lengths=torch.tensor([9])), r"lengths must be \(2,\) int64"),
        (lambda: conv(lengths=torch.tensor([9.0, 9.0])), r"lengths must be \(2,\) int64"),
        (lambda: conv(lengths=torch.tensor([9, 9], dtype=torch.int32)), r"lengths must be \(2,\) int64"),
    ))  # fmt: skip


def twice_differentiable() -> dict:
    """Returns {op: (function that calls the op on leaf tensors, these leaf tensors)}."""
    x, w = torch.randn(2, 4, 9, requires_grad=True), torch.randn(5, 4, 3, requires_grad=True)
    gamma, beta = torch.rand(4, requires_grad=True), torch.randn(4, requires_grad=True)
    pane = torch.randn(5, 4, 1, requires_grad=True)
    wide = [torch.rand(5, requires_grad=True) for _ in range(2)]
    stats = torch.zeros(4), torch.ones(4)

    def given(xs, weights, *norms):
        return ops.panes(xs, ops.pane_stats(ops.gram(xs[0]), weights), weights, *norms)

    scores, lengths = torch.randn(2, 5, 4).log_softmax(2).requires_grad_(), torch.tensor([5, 4])
    ctc = lambda: ops.ctc_loss(scores, lengths, lengths.new_zeros(2, 1), lengths.new_ones(2))  # noqa: E731
    return {
        "ctc_loss": (ctc, [scores]),
        "conv1d": (lambda: ops.conv1d(x, w, padding=1), [x, w]),
        "bn_relu_dropout": (lambda: ops.bn_relu_dropout(x, gamma, beta, *stats), [x, gamma, beta]),
        "sub_block": (lambda: ops.sub_block(x, gamma, beta, *stats, w, padding=1), [x, gamma, beta, w]),
        "gram": (lambda: ops.gram(x).cov, [x]),
        "panes": (lambda: ops.panes([x], [ops.gram(x)], [pane], wide[:1], wide[1:])[0], [x, pane, *wide]),
        "pane_stats": (lambda: ops.pane_stats(ops.gram(x), [pane])[0].stats[1], [x, pane]),
        "panes_given": (lambda: given([x], [pane], wide[:1], wide[1:])[0], [x, pane, *wide]),
        "panes_plain": (lambda: ops.panes_plain([x], [pane], wide[:1], wide[1:])[0], [x, pane, *wide]),
    }


class NoGradient(torch.autograd.Function):
    """Passes no gradient on."""

    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, g: None)


@pytest.mark.parametrize("op", twice_differentiable())
def test_a_second_derivative_is_an_error_and_no_gradient_gives_none(op):
    call, leaves = twice_differentiable()[op]
    none = torch.autograd.grad(NoGradient.apply(call()).sum(), leaves, allow_unused=True)
    assert all(g is None or not g.any() for g in none)
    first = torch.autograd.grad(call().square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        sum(g.square().sum() for g in first).backward()
