"""Dense-residual panes in training, Gram and plain form, against their definition: fp64, low precision, large means."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from conftest import assert_raises, check_op, settle
from standins import spied
from test_model import batch, config
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast import Jasper, ops
from jasper_fast.kernels.layout import ntc
from jasper_fast.kernels.panes import cpu_impl, gram, reference
from jasper_fast.kernels.panes.gram import lower
from jasper_fast.ops import panes_plain_op

LOW = [torch.float32, torch.float16, torch.bfloat16]


def ahead(xs, weights, gammas, betas):
    """Returns the sum of the panes in the Gram form. Each pane's statistics come from a call of `pane_stats` for
    two panes of the same input."""
    others = [torch.ones_like(w)[:3] for w in weights]
    grams = [ops.pane_stats(ops.gram(x), pair)[1] for x, *pair in zip(xs, others, weights, strict=True)]
    return ops.panes(xs, grams, weights, gammas, betas)


# Functions of (xs, weights, gammas, betas) that return the sum of the panes, their means and unbiased variances.
FORMS = {
    "gram": lambda x, w, g, b: ops.panes(x, [ops.gram(v) for v in x], w, g, b),
    "ahead": ahead,
    "plain": lambda x, w, g, b: ops.panes_plain(x, w, g, b, backend="reference"),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def pane_inputs(dtype=torch.float64, m=(2, 7), widths=(3, 4), c_out=5):
    n, t = m
    xs = [torch.randn(n, c, t, dtype=dtype).relu().requires_grad_() for c in widths]
    weights = [torch.randn(c_out, c, 1, dtype=dtype, requires_grad=True) for c in widths]
    gammas = [torch.rand(c_out, dtype=dtype).add(0.5).requires_grad_() for _ in xs]
    betas = [torch.randn(c_out, dtype=dtype, requires_grad=True) for _ in xs]
    return xs, weights, gammas, betas


def definition(xs, weights, gammas, betas):
    terms = zip(xs, weights, gammas, betas, strict=True)
    return sum(F.batch_norm(F.conv1d(x, w), None, None, g, b, training=True, eps=1e-3) for x, w, g, b in terms)


def test_opcheck_gram_form():
    xs, weights, gammas, betas = pane_inputs(torch.float32)
    check_op(torch.ops.jasper_fast.gram, (xs[0], ""))
    grams = [ops.gram(x.detach()) for x in xs]
    means, covs = ([v.clone().requires_grad_() for v in vs] for vs in list(zip(*grams, strict=True))[:2])
    check_op(torch.ops.jasper_fast.panes, (xs, means, covs, weights, gammas, betas, 1e-3, False))
    check_op(torch.ops.jasper_fast.pane_stats, (means[0], covs[0], [weights[0], weights[0]]))
    given = [torch.rand(5, requires_grad=True) for _ in xs]
    check_op(torch.ops.jasper_fast.panes_given, (xs, means, given, weights, gammas, betas, 1e-3, False))


def test_statistics_of_all_readers_of_a_source_are_taken_at_once(monkeypatch):
    """Shows that one call computes the statistics of all panes of a source. Gradients equal those of separate calls."""
    once = ops.pane_stats
    calls = spied(monkeypatch, ops, "pane_stats", lambda gram, weights: len(weights))
    model = Jasper(config("dense"), backend="reference", panes="gram").train().double()
    features, lengths = batch()
    found = []
    for alone in (False, True):
        if alone:  # computes the statistics of each pane separately
            each = lambda gram, weights: [once(gram, [w])[0]._replace(stats=None) for w in weights]  # noqa: E731
            monkeypatch.setattr(ops, "pane_stats", each)
        model.zero_grad()
        log_probs, _ = model(features.double(), lengths)
        (log_probs * torch.linspace(-1, 1, log_probs.shape[2])).sum().backward()
        found.append([log_probs.detach(), *(p.grad for p in model.parameters())])
    assert calls == [3, 2, 1]  # three blocks read the first source, two blocks the second
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_opcheck_plain_form(backend, keep):
    xs, weights, *vectors = pane_inputs(torch.float32)
    gamma, beta = (torch.stack(v).detach().requires_grad_() for v in vectors)
    check_op(
        torch.ops.jasper_fast.panes_plain, (xs, weights, gamma, beta, torch.tensor([7, 4]), 1e-3, keep, "", backend)
    )


@pytest.mark.parametrize("c", [1, 2, 7, 24])
def test_gram_is_mean_and_covariance(c):
    x = torch.randn(3, c, 11, dtype=torch.float64).add(4).requires_grad_()
    got, rows = ops.gram(x), x.transpose(1, 2).flatten(0, 1)
    cov = torch.cov(rows.T, correction=0).view(c, c)
    assert got.rows is None
    for ours, want in ((got.mean, rows.mean(0)), (got.cov, lower(cov))):
        torch.testing.assert_close(ours, want)
        up = torch.randn_like(want)
        grads = (torch.autograd.grad(v, x, up, retain_graph=True)[0] for v in (ours, want))
        torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-10)


def test_fp64_equals_the_definition(form):
    inputs = pane_inputs()
    leaves = [v for vs in inputs for v in vs]
    out, mean, var = form(*inputs)
    want = definition(*inputs)
    torch.testing.assert_close(out, want)
    y = F.conv1d(inputs[0][1], inputs[1][1])
    torch.testing.assert_close(mean[1], y.mean((0, 2)))
    torch.testing.assert_close(var[1], y.var((0, 2)))
    assert not mean.requires_grad and not var.requires_grad
    up = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, up), torch.autograd.grad(want, leaves, up))


def test_gradcheck(form):
    inputs = pane_inputs(m=(1, 6))

    def run(*leaves):
        return form(*(list(leaves[i : i + 2]) for i in (0, 2, 4, 6)))[0]

    assert torch.autograd.gradcheck(run, [v for vs in inputs for v in vs])


def run_all(run, inputs, dtype, up, master=None):
    """Returns the sum and all gradients of `run` with activations in `dtype` and parameters in `master`."""
    dtypes = (dtype, *[master or dtype] * 3)
    x, *parameters = ([v.detach().to(d).requires_grad_() for v in vs] for vs, d in zip(inputs, dtypes, strict=True))
    out = run(x, *parameters)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out, [*x, *(v for vs in parameters for v in vs)], up.to(dtype))]


def judge(form, inputs, low, up):
    """Checks `form` with activations in `low` and fp32 parameters, as under autocast, by the tolerance rule. All
    precisions see the same numbers, which are rounded to `low`.

    In fp32 a gradient may have 16 times the error of PyTorch's: ours sums fp32 products over all rows, while ATen's
    CPU batch norm sums in fp64. In 16 bits that sum does not limit the precision.
    """
    inputs, up = [[v.detach().to(low).double() for v in vs] for vs in inputs], up.to(low).double()
    ref = run_all(definition, inputs, torch.float64, up)
    theirs = run_all(definition, inputs, low, up)
    ours = run_all(form, inputs, low, up, torch.float32)
    for i, (r, t, o) in enumerate(zip(ref, theirs, ours, strict=True)):
        assert_close(f"tensor {i}", o.to(low), t, r, factor=16.0 if i > 0 and low == torch.float32 else 2.0)


@pytest.mark.parametrize("low", LOW, ids=str)
def test_precision(form, low):
    judge(form, pane_inputs(m=(8, 200)), low, torch.randn(8, 5, 200))


@pytest.mark.parametrize("upstream", ["centred", "shifted"])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_large_means_do_not_cancel(form, low, upstream):
    """Checks precision for block outputs with means of 30 to 60 standard deviations, and for gradients with a large
    mean."""
    xs, *parameters = pane_inputs(m=(4, 300), widths=(24, 32), c_out=16)
    xs = [x.detach().add(30 * x.detach().std() * (1 + torch.rand(x.shape[1])[:, None])) for x in xs]
    judge(form, [xs, *parameters], low, torch.randn(4, 16, 300) + (3.0 if upstream == "shifted" else 0.0))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_small_gradients_do_not_underflow(form, low):
    """The term of dx with B = W^T diag(...) W must not be lost, although B is far below fp16's smallest number."""
    judge(form, pane_inputs(m=(8, 400), widths=(8, 8), c_out=6), low, torch.randn(8, 6, 400) * 0.05)


@pytest.mark.parametrize("low", LOW, ids=str)
def test_on_a_gpu_dtypes_fit(low):
    """Checks dtypes and strides on fake GPU tensors, because `torch.mm(..., out_dtype=...)` accepts 16-bit inputs
    only on a GPU."""
    with FakeTensorMode():
        x = torch.empty(2, 9, 24, device="cuda", dtype=low).transpose(1, 2)
        mean, cov = gram.gram(x)
        dx = gram.gram_backward(x, mean, mean, cov, 18)
        p = gram.product(torch.empty(18, 8, device="cuda", dtype=low).T, x.transpose(1, 2).flatten(0, 1))
    assert {(t.dtype, t.device.type) for t in (mean, cov, p)} == {(torch.float32, "cuda")}
    assert (dx.dtype, dx.shape, dx.stride(), p.shape) == (low, x.shape, x.stride(), (8, 24))


def test_the_gram_form_writes_each_activation_once():
    """Lists the ops that write a matrix with all rows. Each further op would be another pass over the
    largest tensors."""
    written = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and len(out) == 18 and not func.is_view:
                written.append(func.overloadpacket.__name__)
            return out

    def run(of, *args):
        written.clear()
        with Watch():
            return of(*args)

    with FakeTensorMode():  # the GPU's branch
        x = torch.empty(2, 9, 24, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        mean, cov = run(gram.gram, x)
        assert written == ["empty_like", "sub"]
        run(gram.gram_backward, x, mean, mean, cov, 18)
        assert written == ["new_empty", "mm", "addcdiv"]
    xs = [torch.randn(2, 9, c).transpose(1, 2) for c in (24, 16, 24)]
    weights, vectors = [torch.randn(32, x.shape[1], 1) for x in xs], [torch.rand(32) for _ in xs]
    means, covs = zip(*(gram.gram(x) for x in xs), strict=True)
    variances = [gram.statistics(mean, cov, [w])[1] for mean, cov, w in zip(means, covs, weights, strict=True)]
    out = run(gram.forward, xs, means, variances, weights, vectors, vectors, 1e-3)
    assert written == ["addmm", "addmm_", "addmm_"]
    run(gram.backward, out, xs, means, variances, weights, vectors, 1e-3, False)
    assert written == ["addmm"] * 3


def test_one_row_raises_what_pytorch_raises(form):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        form(*pane_inputs(m=(1, 1)))


def test_panes_that_do_not_fit_are_named(form):
    """Without the check, the reference face of the plain form would return numbers for outputs of unequal length."""
    xs, weights, gammas, betas = pane_inputs()
    assert_raises((
        (lambda: form([xs[0], xs[1][:, :, :5]], weights, gammas, betas), "of a pane must have the shapes"),
        (lambda: form(xs, weights, [gammas[0], gammas[1][:1]], betas), "of a pane must have the shapes"),
        (lambda: form([], [], [], []), "at least one pane"),
    ))  # fmt: skip


# ---- the plain form on its faces ----

# (N, T, lengths, channels of the xs, C). Some numbers of channels are below and some above the number of lanes of a
# vector. The second and the third case have more rows than a chunk. The first utterance of the third case has more rows
# than one task of a matrix product takes.
FACE_CASES = [
    (1, 5, None, (3,), 1),
    (3, 29, (29, 0, 17), (33, 64), 40),
    (2, 300, (300, 131), (16, 300), 70),
    (1, 1, (1,), (7, 5, 2), 17),
]


def pass_through(face, case, dtype=torch.float32, activations=None, like=torch.float32) -> list[torch.Tensor]:
    """Returns all results of a face of `panes`: outputs, sums, reduction, dx (zero in the padding) and dweight.

    Weights and vectors have `dtype`. The xs, y and the gradient have the dtype `activations`, by default `dtype`. The
    values of xs, weights and gradient are rounded to the dtype `like`.
    """
    n, t, lengths, widths, c = case
    g = torch.Generator().manual_seed(3)
    randn = lambda *size: torch.randn(size, generator=g).to(dtype)  # noqa: E731
    active = lambda *size: randn(*size).to(like).to(activations or dtype)  # noqa: E731
    lengths = None if lengths is None else torch.tensor(lengths)
    live = torch.arange(t) < (torch.full((n,), t) if lengths is None else lengths)[:, None]
    xs = [ntc(active(n, w, t) * live[:, None]) for w in widths]
    weights = [randn(c, w, 1).to(like).to(dtype) for w in widths]
    y = torch.full((len(xs), n * t, c), float("nan"), dtype=activations or dtype)
    face.outputs(xs, weights, lengths, y)
    mean, scale, slope, up = randn(len(xs), c), randn(len(xs), c), randn(len(xs), c), active(n * t, c)
    before = y.clone()
    outs = face.forward(y, mean, scale, randn(c)), face.forward(y, mean, scale, randn(n * t, c))
    reduction = face.backward_reduce(up, y, mean)
    dxs, dweights = face.gradients(up, randn(c), y, mean, scale, slope, xs, weights, lengths)
    assert torch.equal(y, before), "a pass writes into what is kept"
    return [y, *outs, reduction, *(dx * live[:, None] for dx in dxs), *dweights]


@pytest.mark.parametrize("case", FACE_CASES, ids=str)
def test_the_cpu_face_is_the_definition(case):
    settle("cpu")
    want = pass_through(reference, case, torch.float64)
    for i, (ours, exact) in enumerate(zip(pass_through(cpu_impl, case), want, strict=True)):
        error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 3e-6, (i, error)  # false for NaN too


@pytest.mark.parametrize("case", FACE_CASES, ids=str)
def test_the_cpu_face_in_bf16(case):
    settle("cpu")
    if not cpu_impl.takes(torch.empty(0, dtype=torch.bfloat16)):
        pytest.skip("this process' instruction set does not multiply bf16 (AVX512-BF16)")
    how = {"activations": torch.bfloat16, "like": torch.bfloat16}
    found = (pass_through(face, case, **how) for face in (cpu_impl, reference))
    exact = pass_through(reference, case, torch.float64, like=torch.bfloat16)
    for i, (ours, plain_bf16, want) in enumerate(zip(*found, exact, strict=True)):
        assert_close(str(i), ours, plain_bf16, want)


def gradients_of(inputs, **how) -> list[torch.Tensor]:
    """Returns the sum, the statistics and all gradients of the plain form."""
    leaves = [v for vs in inputs for v in vs]
    out, *stats = ops.panes_plain(*inputs, **how)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).to(out.dtype)
    return [out.detach(), *stats, *torch.autograd.grad(out, leaves, up)]


def test_the_cpu_face_gives_the_same_bits_whatever_the_threads():
    settle("cpu")
    inputs, found = pane_inputs(torch.float32, m=(3, 211), widths=(20, 35), c_out=70), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients_of(inputs))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("face", "dtype"), [("reference", torch.float64), ("cpu", torch.float32), ("triton", torch.float32)]
)
def test_the_plain_form_with_padding_and_without(face, dtype, padded):
    """Padding counts in the statistics and in the gradients of gamma and beta, although the op skips its frames."""
    settle(face)
    xs, *parameters = pane_inputs(dtype, m=(2, 9), widths=(3, 20), c_out=18)
    lengths = torch.tensor([9, 4 if padded else 9])
    live = torch.arange(9) < lengths[:, None, None]
    inputs = [[(x.detach() * live).requires_grad_() for x in xs], *parameters]
    got = gradients_of(inputs, lengths=lengths if padded else None, backend=face)
    for i, (g, w) in enumerate(zip(got, gradients_of(inputs, backend="reference"), strict=True)):
        torch.testing.assert_close(g * live if i in (3, 4) else g, w * live if i in (3, 4) else w, atol=1e-5, rtol=1e-5)


def saved(inputs, **how) -> int:
    """Returns the number of elements of the pane outputs that the plain form saves for backward."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.dim(), t.numel())), lambda _: None):
        ops.panes_plain(*inputs, **how)
    of_three = [numel for dim, numel in sizes if dim == 3]
    assert len(of_three) == 2 * len(inputs[0]) + 1, "xs, weights and one tensor of pane outputs"
    return of_three[-1]


def test_a_cpu_keeps_the_outputs_of_the_newest_panes():
    """Shows that the CPU face saves the outputs of the newest KEPT panes, and that other faces and dtypes save none."""
    settle("cpu")
    kept = panes_plain_op.KEPT
    inputs = pane_inputs(torch.float32, m=(2, 20), widths=(3,) * (kept + 2), c_out=6)
    assert saved(inputs, backend="cpu") == kept * 40 * 6
    assert saved([vs[:2] for vs in inputs], backend="cpu") == 2 * 40 * 6
    assert saved(inputs, backend="reference") == 0
    # The C++ face has no fp16.
    assert saved([[x.detach().half().requires_grad_() for x in inputs[0]], *inputs[1:]], backend="cpu") == 0


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_what_is_made_again_is_what_would_be_kept(kept, monkeypatch):
    settle("cpu")
    inputs = pane_inputs(torch.float32, m=(3, 50), widths=(20, 35, 9), c_out=33)
    want = gradients_of(inputs)
    monkeypatch.setattr(panes_plain_op, "KEPT", kept)
    torch.testing.assert_close(gradients_of(inputs), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("face", ["reference", "cpu"])
def test_backward_twice_through_one_graph(face):
    """Shows that backward leaves saved tensors as they are, and that no two gradients share memory."""
    settle(face)
    inputs = pane_inputs(torch.float32, m=(2, 30), widths=(4, 5, 6), c_out=7)
    leaves = [v for vs in inputs for v in vs]
    out = ops.panes_plain(*inputs, backend=face)[0]
    up = torch.randn(out.shape)
    first = torch.autograd.grad(out, leaves, up, retain_graph=True)
    kept = [v.clone() for v in first]
    assert len({v.data_ptr() for v in first}) == len(first)
    for v in first:
        v.add_(1)
    assert all(map(torch.equal, torch.autograd.grad(out, leaves, up), kept))


@pytest.mark.parametrize(
    ("lengths", "message"), [([3, 10], r"lengths\[1\] = 10 is not in \[0, 9\]"), ([3], "lengths must")]
)
def test_wrong_lengths_are_named(lengths, message):
    settle("cpu")
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.panes_plain(*pane_inputs(torch.float32, m=(2, 9)), lengths=torch.tensor(lengths), backend="cpu")
