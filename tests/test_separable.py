"""A separable sub-block, which is one autograd node, gives the results of its separate ops and of eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from conftest import assert_raises, check_op, settle
from torch import Tensor

from jasper_fast import ops
from jasper_fast.kernels.layout import mask
from jasper_fast.kernels.operands import Geometry

C, C_OUT, K, T = 12, 20, 5, 17
LENGTHS = [17, 6, 0]


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request) -> str:
    return settle(request.param)


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = torch.rand(C) + 0.5, torch.randn(C), torch.randn(C, 1, K) / K**0.5, torch.randn(C_OUT, C, 1) / C**0.5
    return [w.to(dtype).requires_grad_() for w in made]


def eager(y: Tensor, gamma, beta, taps, weight, geometry: Geometry, lengths, out_lengths, norm: bool) -> Tensor:
    z = F.relu(F.batch_norm(y, None, None, gamma, beta, True, eps=1e-3)) if norm else y
    d = F.conv1d(mask(z, lengths), taps, None, *geometry, taps.shape[0])
    return F.conv1d(mask(d, out_lengths), weight)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_a_separable_sub_block_is_eagers(backend: str, stride: int, dilation: int, norm: bool) -> None:
    geometry = Geometry(stride, 2 * dilation, dilation)
    x, leaves, lengths = torch.randn(3, C, T, requires_grad=True), weights(), torch.tensor(LENGTHS)
    lens = {"lengths": lengths, "out_lengths": geometry.frames(lengths, K)}
    up = torch.randn(3, C_OUT, geometry.frames(T, K))
    how = {"stride": stride, "padding": 2 * dilation, "dilation": dilation, "backend": backend, **lens}
    gamma, beta, taps, weight = leaves
    if norm:
        y, (mean, m2) = ops.separable_sub_block(x, gamma, beta, None, None, taps, weight, next_stats=True, **how)
    else:
        y, (mean, m2) = ops.separable_conv(x, taps, weight, stats=True, **how)
    results = []
    for dtype in (torch.float32, torch.float64):
        copies = [v.detach().to(dtype).requires_grad_() for v in (x, *leaves)]
        want = eager(*copies, geometry, **lens, norm=norm)
        used = copies if norm else [copies[0], *copies[3:]]
        results.append([want.detach(), want.detach().mean((0, 2)), *torch.autograd.grad(want, used, up.to(dtype))])
    used = [x, *leaves] if norm else [x, taps, weight]
    ours = [y.detach(), mean, *torch.autograd.grad(y, used, up)]
    for name, a, low, ref in zip(("y", "mean", *map(str, range(5))), ours, *results, strict=False):
        assert_close(name, a, low, ref, 4.0)
    assert (y[2] == 0).all() and (m2 >= 0).all()


def test_backward_keeps_the_input_alone() -> None:
    backend = settle("cpu")
    y, (gamma, beta, taps, weight) = torch.randn(2, C, T, requires_grad=True), weights()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.separable_sub_block(y, gamma, beta, None, None, taps, weight, padding=2, backend=backend)
    large = [t for t in kept if t.dim() == 3 and t.shape[0] == 2]
    assert len(large) == 1 and large[0].data_ptr() == y.data_ptr()


def test_dropout_and_running_statistics_are_those_of_bn_relu_dropout(backend: str) -> None:
    y, (gamma, beta, taps, weight) = torch.randn(2, C, T), weights()
    running = [[torch.zeros(C), torch.ones(C)] for _ in range(2)]
    how = {"lengths": torch.tensor([T, 4]), "p": 0.4, "seed": 7, "backend": backend}
    both = ops.separable_sub_block(y, gamma, beta, *running[0], taps, weight, padding=2, **how)
    z = ops.bn_relu_dropout(y, gamma, beta, *running[1], **how)
    halves = ops.separable_conv(z, taps, weight, padding=2, lengths=how["lengths"], backend=backend)
    torch.testing.assert_close([both, *running[0]], [halves, *running[1]], rtol=0, atol=0)


def test_gradcheck() -> None:
    y, leaves = torch.randn(2, 12, 7, dtype=torch.float64, requires_grad=True), weights(torch.float64)
    lengths = torch.tensor([7, 3])
    how = {"lengths": lengths, "out_lengths": (lengths + 1) // 2, "stride": 2, "padding": 2, "backend": "reference"}

    def call(y, gamma, beta, taps, weight):
        return ops.separable_sub_block(y, gamma, beta, None, None, taps, weight, p=0.3, seed=5, **how)

    assert torch.autograd.gradcheck(call, (y, *leaves), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x, taps, weight: ops.separable_conv(x, taps, weight, **how), (y, *leaves[2:]), fast_mode=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm: bool) -> None:
    settle("cpu")
    x, (gamma, beta, taps, weight) = torch.randn(3, C, T, requires_grad=True), weights()
    vectors = (torch.zeros(C), torch.ones(C), gamma, beta) if norm else (None,) * 4
    lengths = torch.tensor(LENGTHS)
    call = (
        x, *vectors, lengths, torch.tensor([7]) if norm else None, None, taps, weight, None, (lengths + 1) // 2,
        0.25 if norm else 0.0, norm, 0, 2, 2, 1, True, "", "cpu", "cpu", "cpu",
    )  # fmt: skip
    check_op(torch.ops.jasper_fast.separable, call)


def test_wrong_shapes_are_named() -> None:
    _, _, taps, weight = weights()
    x, wide = torch.randn(2, C, T), torch.randn(C_OUT, C, 3)
    assert_raises([
        (lambda: ops.separable_conv(x[:, :9], taps, weight), "do not fit"),
        (lambda: ops.separable_conv(x, taps, wide), r"weight must be \(C_out, 12, 1\)"),
    ])  # fmt: skip
