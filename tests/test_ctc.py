"""On every face, the CTC loss and its gradient equal PyTorch's, and nothing beyond the lengths matters."""

import math

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from conftest import Face, assert_raises, make_face
from torch import Tensor

from jasper_fast import ops
from jasper_fast.kernels.ctc import triton_impl
from jasper_fast.training import step

# numpy warns when Triton's interpreter computes log(0)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

N, T, V, U = 7, 14, 6, 5
LENGTHS = [14, 9, 7, 3, 0, 0, 6]
# The fourth target, a label repeated four times, does not fit into three frames. The fifth utterance has labels but no
# frames. The last target just fits.
COUNTS = [5, 3, 0, 4, 5, 0, 5]


@pytest.fixture(params=["reference", "triton"])
def face(request) -> Face:
    return make_face(request.param)


def inputs(device: torch.device, dtype: torch.dtype = torch.float32, blank: int = V - 1) -> tuple[Tensor, ...]:
    """Returns (log_probs, lengths, targets, target_lengths). Some labels repeat; beyond a target's length there are
    other numbers."""
    log_probs = torch.randn(N, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(2)
    targets = torch.tensor(
        [[0, 1, 1, 2, 4], [1, 1, 1, 9, 9], [9] * 5, [3, 3, 3, 3, 9], [0] * 5, [9] * 5, [0, 1, 1, 2, 3]]
    )
    targets = torch.where((targets >= blank) & (targets < V - 1), targets + 1, targets)
    given = torch.tensor(LENGTHS), targets, torch.tensor(COUNTS)
    return log_probs.to(device, dtype), *(x.to(device) for x in given)


def torchs(log_probs: Tensor, lengths, targets, counts, up: Tensor, blank: int, zero_infinity: bool):
    """Returns PyTorch's losses and gradient, computed on the CPU."""
    leaf = log_probs.cpu().detach().requires_grad_()
    targets = targets.cpu().clamp(max=log_probs.shape[2] - 1)
    losses = F.ctc_loss(
        leaf.transpose(0, 1), targets, lengths.cpu(), counts.cpu(), blank, "none", zero_infinity=zero_infinity
    )
    return losses.detach(), torch.autograd.grad(losses, leaf, up.cpu())[0]


def ours(face: Face, log_probs: Tensor, *given: Tensor, up: Tensor | None = None, **settings) -> tuple[Tensor, Tensor]:
    """Returns the face's losses, and the gradient of log_probs for the upstream gradient `up` (default: ones)."""
    leaf = log_probs.detach().requires_grad_()
    losses = ops.ctc_loss(leaf, *given, backend=face.name, **settings)
    (dx,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses) if up is None else up)
    return losses.detach(), dx


@pytest.mark.parametrize(("blank", "zero_infinity"), [(V - 1, False), (0, True)])
def test_it_is_pytorchs(face, blank, zero_infinity):
    exact, low = inputs(face.device, torch.float64, blank), inputs(face.device, blank=blank)
    up = torch.rand(N, dtype=torch.float64).to(face.device)
    want = torchs(*exact, up, blank, zero_infinity)
    theirs = torchs(low[0], *low[1:], up.float(), blank, zero_infinity)
    for dtype, given in ((torch.float32, low), (torch.float64, exact)):
        losses, dx = ours(face, *given, up=up.to(dtype), blank=blank, zero_infinity=zero_infinity)
        assert losses.dtype == dtype
        for name, got, plain, ref in zip(("loss", "dx"), (losses.cpu(), dx.cpu()), theirs, want, strict=True):
            assert torch.equal(got.isnan(), ref.isnan()) and torch.equal(got.isinf(), ref.isinf()), name
            got, plain, ref = (x.nan_to_num(0.0, 0.0, 0.0) for x in (got, plain, ref))
            assert_close(name, got, plain.to(dtype), ref, factor=4.0)
    assert losses.isfinite().tolist() == [zero_infinity or n not in (3, 4) for n in range(N)]


def test_it_is_right_through_a_softmax():
    """The gradient through a log-softmax equals numerical differences in fp64. Without a log-softmax it would not,
    because the gradient of log_probs has the additional term exp(log_probs), which a log-softmax cancels."""
    x = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    given = torch.tensor([4, 2, 3]), torch.tensor([[0, 0], [1, 0], [1, 0]]), torch.tensor([2, 2, 1])
    assert torch.autograd.gradcheck(lambda x: ops.ctc_loss(x.log_softmax(2), *given), x)


def test_it_is_the_same_in_any_memory_order_and_amid_others(face):
    """Strides, other utterances, longer targets and frames beyond the lengths make no difference."""
    log_probs, lengths, targets, counts = inputs(face.device)
    late = torch.arange(T, device=face.device)[:, None] >= lengths[:, None, None]
    wide = F.pad(log_probs.masked_fill(late, math.nan), (0, 0, 0, 3), value=math.nan)
    found = []
    for form, labels in [
        (log_probs, targets),
        (log_probs.transpose(1, 2).contiguous().transpose(1, 2), targets),
        (wide.transpose(0, 1).contiguous().transpose(0, 1), F.pad(targets, (0, 4), value=2)),
    ]:
        losses, dx = ours(face, form, lengths, labels, counts, zero_infinity=True)
        assert not dx[:, T:].any()
        found.append((losses, dx[:, :T]))
    for losses, dx in found[1:]:
        assert torch.equal(losses, found[0][0])
        torch.testing.assert_close(dx, found[0][1], rtol=1e-5, atol=1e-6)  # padding of targets adds zeros to sums
    alone = ops.ctc_loss(log_probs[1:2], lengths[1:2], targets[1:2], counts[1:2], backend=face.name)
    assert torch.equal(alone, found[0][0][1:2])


def test_more_labels_than_a_program_has_threads(face):
    """The loss is right for long targets (several warps) and for many symbols (several programs)."""
    log_probs = torch.randn(2, 75, 45).log_softmax(2).to(face.device)
    targets = torch.randint(0, 44, (2, 68)).to(face.device)
    given = torch.tensor([75, 71], device=face.device), targets, torch.tensor([66, 40], device=face.device)
    up = torch.tensor([1.0, -2.0], device=face.device)
    losses, dx = ours(face, log_probs, *given, up=up)
    plain = torchs(log_probs, *given, up, 44, False)
    exact = torchs(log_probs.double(), *given, up.double(), 44, False)
    assert losses.isfinite().all()
    for name, got, low, ref in zip(("loss", "dx"), (losses, dx), plain, exact, strict=True):
        assert_close(name, got.cpu(), low, ref, factor=4.0)


def test_a_nan_in_one_utterance_is_its_own(face):
    log_probs, *given = inputs(face.device)
    log_probs[1, 4] = math.nan
    losses, dx = ours(face, log_probs, *given)
    assert losses.isnan().tolist() == [n == 1 for n in range(N)]
    assert dx[1, : LENGTHS[1]].isnan().any() and not dx[[0, 2, 5, 6]].isnan().any()


def test_wrong_arguments_are_named():
    log_probs, lengths, targets, counts = inputs(torch.device("cpu"))
    assert_raises((
        (lambda: ops.ctc_loss(log_probs.half(), lengths, targets, counts), "fp32 or fp64"),
        (lambda: ops.ctc_loss(log_probs, lengths[:2], targets, counts), "must have N = 7"),
        (lambda: ops.ctc_loss(log_probs, lengths, targets.flatten(), counts), "must have N = 7"),
        (lambda: ops.ctc_loss(log_probs, lengths[:, None], targets, counts), "must have N = 7"),
        (lambda: ops.ctc_loss(log_probs, lengths, targets, counts[0]), "must have N = 7"),
        (lambda: ops.ctc_loss(log_probs.sum(), lengths, targets, counts), r"must be \(N, T, V\)"),
        (lambda: ops.ctc_loss(log_probs, lengths.int(), targets, counts), "int64"),
        (lambda: ops.ctc_loss(log_probs, lengths, targets, counts, blank=6), "one of the 6 symbols"),
    ))  # fmt: skip


def test_the_op_is_registered_well(face):
    log_probs, *given = inputs(face.device)
    losses, alpha = torch.ops.jasper_fast.ctc_loss(log_probs, *given, V - 1, True, face.name)
    saved = torch.rand(N, device=face.device), log_probs, *given, losses, alpha
    for op, args in (("ctc_loss", (log_probs, *given)), ("ctc_loss_backward", saved)):
        torch.library.opcheck(
            getattr(torch.ops.jasper_fast, op).default,
            (*args, V - 1, True, face.name),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_a_step_uses_the_loss_that_a_graph_can_capture(monkeypatch):
    log_probs, lengths, targets, counts = inputs(torch.device("cpu"))
    targets = targets.clamp(max=V - 2)
    want = step.ctc_loss(log_probs, lengths, targets, counts)
    assert want.any()
    monkeypatch.setattr(step, "loss_is_capturable", lambda device: True)
    monkeypatch.setattr(F, "ctc_loss", None)
    torch.testing.assert_close(
        step.ctc_loss(log_probs.bfloat16().float(), lengths.int(), targets, counts), want, rtol=0.05, atol=0
    )
    assert triton_impl._states(300) == {"BLOCK_U": 512, "num_warps": 8}
