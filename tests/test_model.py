"""The model equals EagerJasper: every kind of block, masks, padding, NaN, modes, autocast."""

import engines
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_raises, make_face, settle
from engines import block, valid

from jasper_fast import InferenceEngine, Jasper
from jasper_fast.dispatch.backends import BackendMissing
from jasper_fast.nn.block import JasperBlock
from jasper_fast.nn.config import BlockConfig


def config(kind="dense", masks=True, dropout=0.0):
    residual = {"dropout": dropout, "residual": kind != "none", "dense": kind == "dense"}
    blocks = [
        block(16, k=11, s=2, dropout=dropout),
        block(16, 2, 5, **residual),
        block(24, 3, 7, **residual),
        block(24, 1, 3, **residual),
        block(32, k=9, d=2, dropout=dropout),
        block(40, k=1, dropout=dropout),
    ]
    return engines.config(blocks, masks)


def pair(cfg, backend, panes="auto"):
    """Returns (eager, ours) in training mode, always with the same parameters and running statistics."""
    torch.manual_seed(0)
    return [model.train() for model in engines.pair(cfg, backend, torch.get_default_device(), panes)]


def batch(lengths=(61, 40, 13)):
    return torch.randn(len(lengths), 8, 61), torch.tensor(lengths)


@pytest.fixture(params=["reference", "cpu"])
def fast_backend(request):
    return make_face(request.param).name


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("kind", ["dense", "plain", "none"])
@torch.no_grad()
def test_evaluation_equals_eager(kind, masks, fast_backend):
    eager, ours = pair(config(kind, masks), fast_backend)
    features, lengths = batch()
    want, want_lengths = eager.eval()(features, lengths)
    for forward in (ours.eval(), InferenceEngine(ours)):
        got, got_lengths = forward(features, lengths)
        assert torch.equal(got_lengths, want_lengths)
        torch.testing.assert_close(valid(got, want_lengths), valid(want, want_lengths), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("panes", ["gram", "plain"])
@pytest.mark.parametrize(
    ("kind", "masks", "frozen"),
    [
        ("dense", True, False), ("dense", False, False), ("plain", True, False), ("none", True, False),
        ("dense", True, True),
    ],
)  # fmt: skip
def test_training_step_equals_eager(kind, masks, frozen, panes, backend):
    """Gradients and running statistics equal those of EagerJasper. `frozen`: batch norms are in evaluation mode."""
    if (kind == "none" or frozen) and panes == "plain":
        pytest.skip("no panes, or none whose form matters")
    eager, ours = pair(config(kind, masks), backend, panes=panes)
    features, lengths = batch((61, 30, 15))
    features.requires_grad_(backend == "reference")
    grads = []
    for model in (eager, ours):
        for bn in (m for m in model.modules() if frozen and isinstance(m, torch.nn.BatchNorm1d)):
            bn.eval()
        log_probs, out = model(features, lengths)
        torch.manual_seed(1)
        valid(log_probs * torch.randn(log_probs.shape), out).sum().backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
        if features.requires_grad:
            grads[-1]["features"], features.grad = features.grad, None
    for name, want in grads[0].items():
        scale = want.abs().max().clamp_min(1e-6)
        assert (grads[1][name] - want).abs().max() <= 2e-4 * scale, name
    torch.testing.assert_close(ours.state_dict(), eager.state_dict(), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_garbage_in_the_padding_changes_nothing(backend, training):
    features, lengths = batch()
    padding = torch.arange(features.shape[2]) >= lengths[:, None, None]
    results = []
    for garbage in (0.0, 1e30, float("nan")):
        _, ours = pair(config(dropout=0.2), backend)
        torch.manual_seed(3)
        picked = valid(*ours.train(training)(features.masked_fill(padding, garbage), lengths))
        if training:
            picked.sum().backward()
            picked = torch.cat([picked.flatten(), *(p.grad.flatten() for p in ours.parameters())])
        results.append(picked.detach())
    assert results[0].isfinite().all()
    assert all(torch.equal(results[0], other) for other in results[1:])


@torch.no_grad()
def test_an_utterance_in_a_batch_scores_as_it_does_alone(fast_backend):
    _, ours = pair(config(), fast_backend)
    features, lengths = batch()
    for forward in (ours.eval(), InferenceEngine(ours)):
        together, out = forward(features, lengths)
        for i, length in enumerate(lengths.tolist()):
            alone, _ = forward(features[i : i + 1, :, :length], lengths[i : i + 1])
            got, want = together[i, : out[i]], alone[0, : out[i]]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            assert torch.equal(got.argmax(1), want.argmax(1))


@pytest.mark.parametrize("training", [True, False])
def test_nan_in_a_valid_frame_reaches_the_loss(backend, training):
    _, ours = pair(config(), backend)
    features, lengths = batch()
    features[1, 3, 7] = float("nan")
    log_probs, out = ours.train(training)(features, lengths)
    loss = F.ctc_loss(log_probs.transpose(0, 1), torch.tensor([[1, 2]] * 3), out, torch.tensor([2, 2, 2]), blank=6)
    assert loss.isnan()


@pytest.mark.parametrize(
    ("k", "s", "d"), [(1, 1, 1), (11, 1, 1), (11, 2, 1), (10, 1, 1), (29, 1, 2), (4, 3, 1), (2, 2, 1)]
)
def test_the_halo_is_where_a_conv_of_masked_frames_ends(k, s, d):
    b = BlockConfig(filters=1, kernel_size=(k,), stride=(s,), dilation=(d,), residual=False)
    halo = JasperBlock(1, b, [], "reference").sub_blocks[0].halo
    for length in (0, 1, 2, 3, 17, 50, 60):
        x = torch.zeros(1, 1, 60)
        x[:, :, :length] = 1
        y = F.conv1d(x, torch.ones(1, 1, k), None, s, b.padding, d)[0, 0]
        assert (y[max(0, b.out_length(length) + halo) :] == 0).all(), length
        if s == 1 and length and b.out_length(length) + halo <= y.shape[0]:
            assert y[b.out_length(length) + halo - 1] != 0, "the halo is longer than it need be"


def test_dropout_differs_between_steps_and_repeats_with_the_generator(fast_backend):
    _, ours = pair(config(dropout=0.3), fast_backend)
    features, lengths = batch()
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append([ours(features, lengths)[0].detach() for _ in range(2)])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.slow
@pytest.mark.parametrize("panes", ["gram", "plain"])
def test_lengths_that_halve_to_nothing_train(backend, panes):
    """The training step of every face is finite, and equals that of the reference face."""
    given, results = batch((61, 30, 15, 0)), []
    for face in ("reference", backend):
        _, ours = pair(config(dropout=0.2), face, panes=panes)
        torch.manual_seed(5)
        log_probs, out = ours(*given)
        assert log_probs.isfinite().all()
        valid(log_probs, out).square().mean().backward()
        results.append([p.grad for p in ours.parameters()] + [b for b in ours.buffers() if b.is_floating_point()])
    for want, got in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, atol=2e-4 * want.abs().max().item(), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("which", "panes"), [("reference", "gram"), ("reference", "plain"), ("triton", "plain")])
def test_bfloat16_autocast_trains_close_to_fp32(which, panes):
    settle(which)
    features, lengths = batch()
    losses = []
    for enabled in (False, True):
        _, ours = pair(config(), which, panes=panes)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=enabled):
            log_probs, out = ours(features, lengths)
        assert log_probs.dtype == torch.float32
        loss = valid(log_probs, out).square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_bad_input_is_named():
    ours, lengths = Jasper(config(), backend="reference"), torch.tensor([20, 20])
    assert_raises(
        (
            (lambda: ours(torch.randn(2, 9, 20), lengths), r"features must be \(N, 8, T\)"),
            (lambda: ours(torch.randn(2, 8, 20), lengths.float()), "lengths"),
            (lambda: ours(torch.randn(1, 8, 2), torch.tensor([2])), "more than 1 value per channel"),
            (lambda: Jasper(config(), backend="metal"), "not one of"),
            (lambda: Jasper(config(), panes="dense"), "'dense' is not one of auto, gram, plain"),
        )
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_cannot_run_here_says_how_to_get_it():
    with pytest.raises(BackendMissing, match="GPU"):
        Jasper(config(), backend="cuda")


def test_lengths_may_be_any_integers():
    model = Jasper(config()).eval()
    features = torch.randn(2, 8, 20)
    results = (model(features, torch.tensor([20, 7], dtype=d)) for d in (torch.int32, torch.int64))
    torch.testing.assert_close(*results, rtol=0, atol=0)
