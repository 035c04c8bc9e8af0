"""Compares every face of bn_relu_dropout with PyTorch in fp64. The limits come from the errors of PyTorch's ops at the
same precision with the same dropout mask."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from close import assert_close
from conftest import make_face
from torch import Tensor
from torch.nn import functional as F

from jasper_fast import ops
from jasper_fast.kernels import philox
from jasper_fast.kernels.layout import mask, ntc, padding
from jasper_fast.kernels.operands import Mask, Norm

EPS = 1e-3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
residuals = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@dataclass
class Case:
    """Inputs of one call. They are drawn in the dtype of the test, so that their fp64 copies are exact."""

    y: Tensor
    gamma: Tensor
    beta: Tensor
    residual: Tensor | None
    lengths: Tensor | None
    seed: Tensor | None
    p: float
    dz: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        residual = None if self.residual is None else self.residual.to(dtype)
        vectors = torch.float64 if dtype == torch.float64 else torch.float32
        gamma, beta = self.gamma.to(vectors), self.beta.to(vectors)
        return replace(self, y=self.y.to(dtype), gamma=gamma, beta=beta, residual=residual, dz=self.dz.to(dtype))

    @property
    def mask(self) -> Mask:
        return Mask(self.lengths, self.seed, self.p)

    def alive(self) -> Tensor:
        """Returns bool (N, C, T): True where an element is neither dropped nor padding."""
        n, c, t = self.y.shape
        alive = torch.ones_like(self.y, dtype=torch.bool)
        if self.p > 0:
            alive &= philox.keep_mask(n, c, t, self.p, self.seed, self.y.device)
        if self.lengths is not None:
            alive &= ~padding(self.lengths, t)
        return alive


def make(n, c, t, *, dtype, device, residual=False, lengths=None, p=0.0, offset=0.0) -> Case:
    def activation(shift: float = 0.0) -> Tensor:
        return ntc((torch.randn(n, c, t) + shift).to(device, dtype))

    return Case(
        y=activation(offset),
        gamma=(torch.rand(c) + 0.5).to(device),
        beta=torch.randn(c).to(device),
        residual=activation() if residual else None,
        lengths=None if lengths is None else torch.tensor(lengths, device=device),
        seed=torch.randint(-(2**62), 2**62, (1,)).to(device) if p > 0 else None,
        p=p,
        dz=activation(),
    )


def run(op, case: Case, training: bool, soiled: Tensor | None = None, halo: int | None = None) -> dict[str, Tensor]:
    """Runs one forward and backward through the four functions of a face, as autograd calls them.

    soiled: a tensor that `backward_apply` gets instead of the case's y. halo: the argument of `backward_apply`.
    """
    n, _, t = case.y.shape
    if training:
        mean, m2 = op.stats(case.y)
    else:
        mean, m2 = case.beta * 0.1, case.gamma * n * t
    norm = Norm(mean, (m2 / (n * t) + EPS).rsqrt(), case.gamma, case.beta)
    z = op.forward(case.y, norm, case.residual, case.mask)
    kept = z if case.residual is not None else None
    dbeta, dgamma = op.backward_reduce(case.dz, case.y, kept, norm, case.mask)
    means = (dbeta / (n * t), dgamma / (n * t)) if training else None
    y = case.y if soiled is None else soiled
    dy, dres = op.backward_apply(case.dz, y, kept, norm, means, case.mask, kept is not None, halo)
    out = {"z": z, "dy": dy, "dgamma": dgamma, "dbeta": dbeta, "mean": mean, "m2": m2}
    return out if dres is None else out | {"dres": dres}


def rectified(op, y: Tensor, mask: Mask) -> Tensor:
    """Returns mask(dropout(relu(y))), computed by `forward` with mean 0, rstd 1, gamma 1 and beta 0."""
    one = torch.ones(y.shape[1], device=y.device)
    return op.forward(y, Norm(0 * one, one, one, 0 * one), None, mask)


def assert_statistics(stats, y: Tensor, mean: float, m2: float) -> None:
    """Compares the statistics of y with fp64. mean, m2: the allowed relative errors."""
    found = [x.double() for x in stats(y)]
    var64, mean64 = torch.var_mean(y.double(), (0, 2), correction=0)
    assert torch.allclose(found[0], mean64, rtol=mean, atol=0)
    assert torch.allclose(found[1], var64 * (y.shape[0] * y.shape[2]), rtol=m2, atol=0)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def chain(case: Case, training: bool) -> dict[str, Tensor]:
    """Computes the results of `run` with PyTorch's batch norm, sum, ReLU, dropout mask, masked_fill and autograd."""
    n, _, t = case.y.shape
    y, gamma, beta = (x.detach().clone().requires_grad_() for x in (case.y, case.gamma, case.beta))
    residual = None if case.residual is None else case.residual.clone().requires_grad_()
    mean, var = (None, None) if training else (case.beta * 0.1, case.gamma)
    pre = F.batch_norm(y, mean, var, gamma, beta, training, 0.0, EPS)
    if residual is not None:
        pre = pre + residual
    z = (F.relu(pre) * (1 / (1 - case.p))).masked_fill(~case.alive(), 0.0)
    z.backward(case.dz)
    if training:
        var, mean = torch.var_mean(case.y if case.y.dtype == torch.float64 else case.y.float(), (0, 2), correction=0)
    out = {"z": z, "dy": y.grad, "dgamma": gamma.grad, "dbeta": beta.grad, "mean": mean, "m2": var * n * t}
    return out if residual is None else out | {"dres": residual.grad}


def check(face, case: Case, training: bool = True) -> None:
    got = run(face.load("bn_relu_dropout"), case, training)
    low, ref = chain(case, training), chain(case.to(torch.float64), training)
    for name in ref.keys() - {"mean", "m2"}:
        assert_close(name, got[name], low[name], ref[name])
    # The order of the sums changes results by a few eps. A mistake such as 1/(M-1) changes them far more.
    rows, bound = case.y.shape[0] * case.y.shape[2], 4e-6 if case.y.is_cuda else 1e-6  # a GPU's division rounds twice
    off = (got["mean"] - ref["mean"]).abs() / (ref["mean"].abs() + (ref["m2"] / rows).sqrt())
    assert off.max() <= bound, f"mean is off by {off.max():.1e} deviations"
    off = (got["m2"] - ref["m2"]).abs() / (ref["m2"] + 1e-12)
    assert off.max() <= bound, f"M2 is off by {off.max():.1e} of itself"
    for name in ("z", "dy", *(["dres"] if case.residual is not None else [])):
        assert ntc(got[name]).data_ptr() == got[name].data_ptr(), f"{name} is not in NTC memory"


# (N, C, T, lengths): odd sizes, one frame, channels that fill no vector or tile, lengths 0, 1, partial and full
SHAPES = [
    (2, 8, 37, [20, 37]),
    (1, 3, 45, [31]),
    (3, 33, 1, [1, 0, 1]),
    (4, 29, 19, [0, 1, 12, 19]),
    (2, 20, 70, None),
    (2, 256, 21, [21, 5]),
    (3, 136, 50, [50, 2, 0]),
]
# utterances so short that one program of a reduction reads rows of several utterances
SHORT = [(300 // t, 24, t, [7 * i % (t + 1) for i in range(300 // t)]) for t in (1, 2, 5, 40)]


@dtypes
@pytest.mark.parametrize(
    "shape",
    [*(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES), *SHORT],
    ids=lambda s: "x".join(map(str, s[:3])),
)
def test_training_forward_and_every_gradient(face, shape, dtype):
    n, c, t, lengths = shape
    # half of the cases have a residual: some of each shape and of each dtype
    residual = ((SHAPES + SHORT).index(shape) + DTYPES.index(dtype)) % 2 == 1
    check(face, make(n, c, t, dtype=dtype, device=face.device, residual=residual, lengths=lengths, p=0.2))


@dtypes
@pytest.mark.parametrize(
    ("training", "residual", "lengths"), [(False, False, [23, 9]), (False, True, [23, 9]), (True, False, None)]
)
def test_without_dropout(face, training, residual, lengths, dtype):
    check(face, make(2, 40, 23, dtype=dtype, device=face.device, residual=residual, lengths=lengths), training)


def test_statistics_do_not_cancel_under_a_large_offset(face):
    y = make(4, 24, 75, dtype=torch.float32, device=face.device, offset=3000.0).y
    # The variance is 1. The squares are about 9e6, where fp32 numbers are 1 apart, so E[y^2] - E[y]^2 would lose it.
    assert_statistics(face.load("bn_relu_dropout").stats, y, mean=1e-6, m2=1e-3)


def test_statistics_survive_an_outlier_in_the_first_row(face):
    y = torch.randn(2, 16, 1000)
    y[0, :, 0] = 1e4  # an algorithm that subtracts the first row from all others would lose precision
    assert_statistics(face.load("bn_relu_dropout").stats, ntc(y.to(face.device)), mean=1e-4, m2=1e-5)


@dtypes
@pytest.mark.parametrize("c", [1, 6, 29, 64, 260])
def test_dropout_bits_are_the_same_on_every_face(face, c, dtype):
    n, t, p = 2, 13, 0.3
    seed = torch.tensor([-(5 << 40) + 17], device=face.device)
    y = ntc(torch.ones(n, c, t, dtype=dtype, device=face.device))
    z = rectified(face.load("bn_relu_dropout"), y, Mask(None, seed, p))
    keep = philox.keep_mask(n, c, t, p, seed, face.device)
    assert torch.equal(z != 0, keep)
    off = (z[keep].double() * (1 - p) - 1).abs().max()
    assert off <= torch.finfo(dtype).eps  # one eps and not half of it, because Triton's interpreter truncates to bf16


@dtypes
@residuals
@trainings
def test_garbage_in_padding_changes_nothing(face, training, residual, dtype):
    """NaN in padding changes neither outputs nor gradients. In training the test writes no NaN to y, because the
    statistics read all of y. For the same reason dy is then not zero in padding."""
    op = face.load("bn_relu_dropout")
    case = make(3, 36, 17, dtype=dtype, device=face.device, residual=residual, lengths=[17, 6, 0], p=0.2)
    clean = run(op, case, training)
    inside = padding(case.lengths, 17).expand_as(case.y)
    for x in (None if training else case.y, case.dz, case.residual):
        if x is not None:
            x[inside] = math.nan
    assert_same(run(op, case, training), clean)
    for name, value in clean.items():
        assert value.dim() < 3 or (training and name == "dy") or (value[inside] == 0).all(), name


def halo_case(face, dtype, residual, halo, c=40) -> Case:
    """Returns a case in which y is zero at t >= length + halo."""
    case = make(4, c, 61, dtype=dtype, device=face.device, residual=residual, lengths=[61, 30, 1, 0], p=0.2)
    case.y = ntc(mask(case.y, case.lengths + halo))
    return case


@pytest.mark.slow
@pytest.mark.parametrize(("halo", "dtype"), [*zip([0, 3, 100], DTYPES, strict=True)])
@residuals
def test_halo_changes_no_bit(face, residual, halo, dtype):
    op, case = face.load("bn_relu_dropout"), halo_case(face, dtype, residual, halo)
    assert_same(run(op, case, training=True, halo=halo), run(op, case, training=True))


@pytest.mark.slow
@pytest.mark.parametrize(("c", "dtype"), [*zip([40, 29, 136], DTYPES, strict=True)])
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_beyond_the_halo_y_is_not_read(name, c, dtype):
    """NaN in y at t >= length + halo has no effect if `halo` is given. Without `halo` the NaN reaches dy."""
    face = make_face(name)
    op, case = face.load("bn_relu_dropout"), halo_case(face, dtype, False, 3, c)
    soiled = ntc(mask(case.y, case.lengths + 3, math.nan))
    got = run(op, case, training=True, soiled=soiled, halo=3)
    assert got["dy"].isfinite().all()
    assert_same(got, run(op, case, training=True))
    assert run(op, case, training=True, soiled=soiled)["dy"].isnan().any()


@dtypes
@pytest.mark.parametrize("c", [8, 29])
def test_nan_in_a_valid_frame_reaches_outputs_and_gradients(face, c, dtype):
    op = face.load("bn_relu_dropout")
    case = make(2, c, 9, dtype=dtype, device=face.device, lengths=[9, 5])
    case.y[0, 3, 2] = math.nan
    for training in (False, True):
        got = run(op, case, training)
        assert got["z"][0, 3, 2].isnan()
        assert got["dgamma"][3].isnan()
        assert not got["z"][:, :3].isnan().any()
        assert (got["z"][1, :, 5:] == 0).all()
    assert got["dy"][:, 3].isnan().all()
    case.dz[0, 1, 0] = math.nan
    case.y[0, 1, 0] = 5.0  # opens the ReLU there
    case.beta[1] = 1.0
    got = run(op, case, training=False)
    assert got["dy"][0, 1, 0].isnan()
    assert got["dbeta"][1].isnan()


def test_dropped_nan_is_zero(face):
    seed = torch.tensor([7], device=face.device)
    y = ntc(torch.full((1, 16, 12), math.nan, device=face.device))
    z = rectified(face.load("bn_relu_dropout"), y, Mask(None, seed, 0.5))
    keep = philox.keep_mask(1, 16, 12, 0.5, seed, face.device)
    assert z[keep].isnan().all()
    assert (z[~keep] == 0).all()


def test_p_out_of_range_is_refused(face):
    y, seed = ntc(torch.ones(1, 8, 2, device=face.device)), torch.tensor([1], device=face.device)
    with pytest.raises((ValueError, RuntimeError), match=r"\bp\b"):
        rectified(face.load("bn_relu_dropout"), y, Mask(None, seed, 1.0))


@trainings
@residuals
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_backward_is_the_derivative_of_its_forward(p, residual, training):
    case = make(2, 5, 4, dtype=torch.float64, device="cpu", residual=residual, lengths=[4, 2], p=p)
    inputs = [case.y, case.gamma.double(), case.beta.double(), *([case.residual] if residual else [])]
    for x in inputs:
        x.requires_grad_()
    running = (None, None) if training else (0.1 * torch.ones(5).double(), torch.ones(5).double())
    how = {"lengths": case.lengths, "p": p, "seed": case.seed, "frozen": not training, "backend": "reference"}

    def call(y, gamma, beta, res=None):
        return ops.bn_relu_dropout(y, gamma, beta, *running, residual=res, **how)

    assert torch.autograd.gradcheck(call, inputs)


def test_triton_takes_no_fp64():
    triton_impl = pytest.importorskip("jasper_fast.kernels.bn_relu_dropout.triton_impl")
    with pytest.raises(TypeError, match="reference"):
        triton_impl.stats(torch.ones(1, 2, 3, dtype=torch.float64))


def test_triton_indexes_beyond_32_bits_of_counters():
    """Dropout bits equal the definition's if a tile's first counter needs more than 32 bits."""
    device = make_face("triton").device
    from draw_kernel import draw

    p, seed, rows = 0.4, 99, 4
    for c, vec in ((16, 8), (18, 1)):
        m0 = (1 << 36) // c - 2  # counters cross 2**34, so they need more than 32 bits
        out = torch.empty(rows, 32, dtype=torch.int8, device=device)
        threshold, _ = philox.signed_threshold(p)
        draw[(1,)](out, m0, c, torch.tensor([seed], device=device), threshold, BLOCK_M=rows, BLOCK_C=32, VEC=vec)
        first = m0 * c
        words = philox.words(first // 4, rows * c // 4 + 2, seed).reshape(-1)[first % 4 :][: rows * c]
        assert torch.equal(out[:, :c].bool().cpu(), (words >= philox.threshold(p)).reshape(rows, c))


@pytest.mark.parametrize("m0", [0, 208, (1 << 31) - 32, (1 << 31) + 16, 5 << 40])
@pytest.mark.parametrize("frames", [1, 3, 16, 37, 2000, (1 << 31) - 1])
def test_triton_finds_utterance_and_frame_of_a_row(frames, m0):
    """Each row of a tile gets the right utterance and frame, for row numbers below and above 2**31, and for tiles of
    several utterances or of a part of one."""
    n, t = (torch.empty(16, dtype=torch.int64, device=make_face("triton").device) for _ in range(2))
    from draw_kernel import places

    places[(1,)](n, t, m0, m0 + 16, frames, BLOCK_M=16)
    row = torch.arange(m0, m0 + 16)
    assert torch.equal(n.cpu(), row // frames)
    assert torch.equal(t.cpu(), row % frames)
