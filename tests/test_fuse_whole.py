"""In evaluation one engine runs a whole fused encoder, with the model's current weights."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import nemo_files
import pytest
import torch
from close import assert_close
from conftest import settle
from engines import Replays, block, poison
from lookalikes import nvidia
from standins import spied
from test_fuse import KINDS, LENGTHS, MODELS, add, build, call, evaluate, features, layers, make, twins
from torch import nn

from jasper_fast import fuse, unfuse
from jasper_fast.inference import engine as engine_module, fuse as fuse_module
from jasper_fast.inference.engine import EncoderEngine
from jasper_fast.kernels.layout import mask
from jasper_fast.nn.fuse import STATE
from jasper_fast.nn.watch import Watch
from jasper_fast.training.optim import EMA

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def runs(monkeypatch) -> list[EncoderEngine]:
    """Records the engine of every call, in order."""
    return spied(monkeypatch, EncoderEngine, "__call__", lambda self, *of: self)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("which", "kind"), MODELS)
@torch.no_grad()
def test_an_engine_gives_what_the_model_gives(which, kind, masks, runs):
    """The engine gives the model's outputs, also after a weight has changed."""
    exact, single = build(which, kind, masks).double().eval(), build(which, kind, masks).eval()
    doubles, fused = copy.deepcopy(exact), copy.deepcopy(single)
    for model in (doubles, fused):
        assert fuse(model, strict=True).whole == ["" if which == "eager" else "encoder"]
    x = features(torch.float64)
    for _ in range(2):
        want = evaluate(exact, x)
        torch.testing.assert_close(evaluate(doubles, x), want, rtol=1e-9, atol=1e-11)
        assert_close("outputs", evaluate(fused), evaluate(single), want, factor=4.0)
        for model in (exact, doubles, single, fused):
            next(layers(model)[1].parameters()).mul_(-1.5)
    assert len(runs) == 4


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("which", ["nvidia", "nemo"])
@torch.no_grad()
def test_an_encoder_returns_what_it_did(which, masks, runs):
    """The encoder's outputs and lengths stay the same, also for a length greater than the number of frames."""
    lengths = torch.tensor([200, 40, 0], dtype=torch.int32)
    results = []
    for model in twins(which, masks=masks):
        if which == "nvidia":
            xs, out = model.encoder(features(), lengths)
            assert type(xs) is list and len(xs) == 1
            results.append((xs[0], out))
        else:
            results.append(model.encoder(audio_signal=features(), length=lengths))
    (want, want_lengths), (got, got_lengths) = results
    assert got.shape == want.shape and len(runs) == 1
    torch.testing.assert_close(got_lengths, want_lengths)
    valid = torch.arange(31) < want_lengths[:, None] if masks else torch.ones(3, 31, dtype=torch.bool)
    torch.testing.assert_close(got.transpose(1, 2)[valid], want.transpose(1, 2)[valid], **CLOSE)


@torch.no_grad()
def test_without_masks_nvidias_encoder_needs_no_lengths(runs):
    plain, fused = twins("nvidia", masks=False)
    torch.testing.assert_close(fused(features()), plain(features()), **CLOSE)
    assert len(runs) == 1


def weight_of(model: nn.Module) -> nn.Parameter:
    return model.encoder.layers[1].conv[0].weight


def scaled(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v * 1.5 + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}


def step(model: nn.Module, **how) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.05)
    torch.optim.SGD(model.parameters(), lr=1.0, **how).step()


def average(model: nn.Module) -> None:
    """Replaces the model's weights by others, as `EMA.applied_to` does."""
    ema = EMA(model)
    ema.average = {k: v.clone() for k, v in scaled(model).items()}
    ema._exchange(model)


def by_transposing(model: nn.Module) -> None:
    weight = model.encoder.layers[1].conv[4].weight  # (16, 16, 5), so its transpose has the same shape
    weight.data = weight.detach().transpose(0, 1)


CHANGES = {
    "in place": lambda m: weight_of(m).mul_(1.5),
    "in inference mode": torch.inference_mode()(lambda m: weight_of(m).mul_(1.5)),
    "by lists": lambda m: torch._foreach_mul_(list(m.parameters()), 1.1),
    "load_state_dict": lambda m: m.load_state_dict(scaled(m)),
    "load_state_dict by assignment": lambda m: m.load_state_dict(scaled(m), assign=True),
    "p.data = x": lambda m: setattr(weight_of(m), "data", weight_of(m).detach() * 1.5),
    "p.data = a view": by_transposing,
    "another parameter": lambda m: setattr(m.encoder.layers[1].conv[0], "weight", nn.Parameter(weight_of(m) * 1.5)),
    "an optimiser": step,
    "a fused optimiser": lambda m: step(m, fused=True),
    "averaged weights": average,
    "a pane's gamma": lambda m: m.encoder.layers[2].res[1][1].weight.mul_(3),
    "a running mean": lambda m: m.encoder.layers[0].conv[1].running_mean.add_(1),
    "another eps": lambda m: setattr(m.encoder.layers[0].conv[1], "eps", 0.5),
}


@pytest.mark.parametrize(("change", "graphs"), [(change, True) for change in CHANGES] + [("in place", False)])
def test_a_change_is_in_the_next_output(change, graphs, runs, monkeypatch):
    """The next output has the change, on an engine, block by block and in training."""
    monkeypatch.setattr(engine_module, "CudaGraphs", Replays)
    plain, model = twins("nvidia", backend="reference", graphs=graphs)
    before = evaluate(model)
    evaluate(model)
    assert runs[0] is runs[1], "nothing has changed, so nothing is folded"
    assert (runs[0]._run.shapes.graphs is not None) == graphs
    for m in (model, plain):
        call(m, features())
        with torch.no_grad():
            CHANGES[change](m)
    got = evaluate(model)
    torch.testing.assert_close(got, evaluate(plain), **CLOSE)
    assert not torch.allclose(got, before, **CLOSE) and runs[-1] is not runs[0]
    for training in (False, True):
        torch.testing.assert_close(*(call(m.train(training), features()) for m in (model, plain)), **CLOSE)


def test_new_memory_never_lies_where_the_folded_weight_lay():
    conv = nn.Conv1d(64, 64, 5)
    watch, at = Watch([conv]), conv.weight.data_ptr()
    for _ in range(4):
        conv.weight.data = conv.weight.detach() + 1
        assert watch._held[0].data_ptr() == at != conv.weight.data_ptr() and not watch.same()


@torch.no_grad()
def test_a_parametrised_weight_is_folded_as_it_is_computed(runs):
    model, plain = build("nvidia").eval(), build("nvidia").eval()
    results = []
    for m in (model, plain):
        nn.utils.parametrizations.weight_norm(m.encoder.layers[1].conv[0])
    assert fuse(model, strict=True).whole == ["encoder"]
    for m in (model, plain):
        results.append([evaluate(m)])
        m.encoder.layers[1].conv[0].parametrizations.weight.original0.mul_(1.5)
        results[-1].append(evaluate(m))
    torch.testing.assert_close(*results, **CLOSE)
    assert len(runs) == 2 and not torch.allclose(*results[0], **CLOSE)


@pytest.mark.parametrize("fold_anew", ["refresh", "eval", "eval of the model"])
def test_a_write_without_a_trace_is_seen_after_refresh_or_eval(fold_anew, runs):
    plain, model = build("nvidia").eval(), build("nvidia").eval()
    report = fuse(model)
    before = evaluate(model)
    for m in (model, plain):
        weight_of(m).data.mul_(1.5)
    assert torch.equal(evaluate(model), before), "this write is noticed now, so the docs need no longer ask for refresh"
    {"refresh": report.refresh, "eval": model.encoder.eval, "eval of the model": model.eval}[fold_anew]()
    torch.testing.assert_close(evaluate(model), evaluate(plain), **CLOSE)
    assert len(runs) == 3


def test_training_between_two_evaluations(runs):
    """Training drops the engine, and the next evaluation uses the trained weights and statistics."""
    plain, model = twins("nemo")
    results = []
    for m in (plain, model):
        found = []
        for _ in range(3):
            found.append(evaluate(m.eval()))
            out = call(m.train(), features())
            m.zero_grad()
            out.square().mean().backward()
            torch.optim.SGD(m.parameters(), lr=0.01).step()
        results.append(found)
    assert vars(model.encoder)[STATE]._engines == {} and len(set(map(id, runs))) == 3
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


OWN_FORWARD = {
    "gradients": (lambda m: None, torch.enable_grad),
    "a hook on a block": (lambda m: layers(m)[0].register_forward_hook(add), torch.no_grad),
    "batch statistics": (lambda m: layers(m)[1].mconv[1].train(), torch.no_grad),
    "dropout": (lambda m: layers(m)[1].mout[1].train(), torch.no_grad),
    "captured outputs": (lambda m: setattr(m, "captured", True), torch.no_grad),
}


@pytest.mark.parametrize("why", OWN_FORWARD)
def test_the_blocks_run_where_an_engine_would_not_do_the_same(why, runs):
    change, mode = OWN_FORWARD[why]
    plain, fused = build("nemo").eval(), build("nemo").eval()
    layers(fused)[1].is_access_enabled = lambda guid: hasattr(fused, "captured")
    fuse(fused)
    evaluate(fused)
    for model in (plain, fused):
        change(model)
    if why == "captured outputs":
        with pytest.raises(RuntimeError, match="captured"):
            evaluate(fused)
    else:
        with mode():
            torch.testing.assert_close(call(fused, features()), call(plain, features()), **CLOSE)
    assert len(runs) == 1


def test_a_hook_on_the_encoder_is_called_and_one_on_a_block_may_go_again(runs):
    model, seen = build("nvidia").eval(), []
    fuse(model)
    model.encoder.register_forward_hook(lambda *of: seen.append(1))
    handle = model.encoder.layers[0].register_forward_hook(lambda *of: seen.append(2))
    evaluate(model)
    handle.remove()
    evaluate(model)
    handle = model.encoder.layers[0].conv[0].register_forward_hook(print)
    with pytest.raises(RuntimeError, match="a hook"):
        evaluate(model)
    handle.remove()
    evaluate(model)
    assert seen == [2, 1, 1, 1] and len(runs) == 2


def test_masks_switched_off_are_followed(runs):
    plain, fused = twins("nemo")
    evaluate(fused)
    for model in (plain, fused):
        for m in model.modules():
            if hasattr(m, "use_mask"):
                m.use_mask = False
    torch.testing.assert_close(evaluate(fused), evaluate(plain), **CLOSE)
    torch.testing.assert_close(call(fused, features()), call(plain, features()), **CLOSE)
    assert len(runs) == 2


@pytest.mark.parametrize("which", KINDS)
def test_autocast_has_an_engine_of_its_own(which, runs):
    exact, (single, fused) = build(which).double().eval(), twins(which)
    evaluate(fused)
    with torch.autocast("cpu", torch.bfloat16):
        got, low = evaluate(fused), evaluate(single)
    assert_close("outputs", got, low, evaluate(exact, features(torch.float64)), factor=3.0)
    evaluate(fused)
    assert len(runs) == 3 and runs[0] is runs[2] is not runs[1]


FEW = [block(16, k=5, s=2), block(16, 1, 3, residual=True, dense=True), block(16, k=1)]


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "graphs"), [(FEW, True), (FEW, False), ([block(16, k=3)], True)])
@torch.no_grad()
def test_as_triton_launches(blocks, graphs, runs, monkeypatch):
    """With Triton the outputs are right, with and without graphs, and the next call does not overwrite them."""
    settle("triton")
    monkeypatch.setattr(engine_module, "CudaGraphs", Replays)
    plain = make("nvidia", blocks)
    fused = copy.deepcopy(plain.eval())
    fuse(fused, backend="triton", graphs=graphs)
    results = []
    for t in (29, 20):
        (want,), want_lengths = plain.encoder(features()[:, :, :t], torch.tensor([t, 13, 0]))
        (got,), lengths = fused.encoder(features()[:, :, :t], torch.tensor([t, 13, 0]))
        assert torch.equal(lengths, want_lengths) and got.shape == want.shape
        poison(runs[-1])
        results.append((got, mask(want, lengths)))
    for got, want in results:
        torch.testing.assert_close(got, want, **CLOSE)
    assert len(runs) == 2


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    return torch.load(io.BytesIO(nemo_files.saved(model)), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("which", KINDS)
def test_copies_are_fused_and_independent(which, copied, runs):
    """A copy has weights and an engine of its own. It gives the original's results, on its engine and block by
    block. A report that is kept in the model is copied with it."""
    plain, model = twins(which)
    model.report = fuse(model)
    want, by_blocks = evaluate(model), call(model, features())
    other = copied(model)
    assert type(layers(other)[0]) is type(layers(model)[0])
    for _ in range(2):
        assert torch.equal(evaluate(other), want) and torch.equal(call(other, features()), by_blocks)
        nn.init.zeros_(next(model.parameters()))
    assert runs[0] is not runs[1] and other.report == model.report
    other.report.refresh()
    assert torch.equal(evaluate(other), want) and runs[-1] is not runs[1]
    unfuse(other)
    torch.testing.assert_close(evaluate(other), want, **CLOSE)
    assert len(runs) == 4 and [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]


def test_inference_mode_and_after_it(runs):
    model = build("nvidia").eval()
    fuse(model, backend="reference")
    with torch.inference_mode():
        want = call(model, features())
    assert torch.equal(evaluate(model), want) and runs[0] is runs[1]


@torch.no_grad()
def test_threads_share_a_fused_encoder():
    model = build("nvidia").eval()
    fuse(model)
    want = evaluate(model)
    weight_of(model).add_(0)  # all threads find the folded weights out of date
    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(x, want) for x in threads.map(evaluate, [model] * 4))


@pytest.mark.parametrize("x", [features()[:0], features().half(), features()[:, :5], features()[0]])
def test_arguments_that_do_not_fit_are_for_the_blocks(x, runs):
    model, results = build("nvidia").eval(), []
    fuse(model, backend="reference")
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            try:
                results.append(model.encoder(x, LENGTHS[: len(x)])[0][0].detach())
            except (RuntimeError, ValueError, IndexError) as error:
                results.append(str(error))
    assert str(results[0]) == str(results[1]) and not runs


def test_an_encoder_that_no_engine_computes_is_left_with_a_reason():
    residual = [block(16, 1, 3, residual=True, dense=dense) for dense in (True, False)]
    model = make("nvidia", [block(16, k=5), *residual, block(16, k=1)])
    with pytest.raises(ValueError, match=r"cannot fuse encoder: .* a plain residual follows one with a dense"):
        fuse(model, strict=True)
    assert type(model.encoder) is nvidia.JasperEncoder
    report = fuse(model)
    assert len(report.fused) == 4 and report.whole == [] and report.left[0][0] == "encoder"
    assert str(report).startswith("4 of 4 blocks")
    model = build("nvidia")
    model.encoder.layers[1].res = None
    assert "other channels than those of a Jasper" in fuse(model).left[0][1]


@torch.no_grad()
def test_a_last_block_whose_list_is_wanted(runs):
    dense = {"residual": True, "dense": True}
    plain = make("nvidia", [block(16, k=5), block(16, 2, 3, **dense), block(24, 1, 3, **dense)]).eval()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert report.whole == [] and "outputs of all blocks" in report.left[0][1]
    torch.testing.assert_close(*(m.encoder(features(), torch.tensor([61] * 3))[0] for m in (fused, plain)), **CLOSE)
    assert not runs


def test_watching_is_undone_with_the_model():
    """The set of encoders that the optimiser hook looks through does not keep a model alive."""
    model = build("nvidia").eval()
    fuse(model)
    evaluate(model)
    alive = len(fuse_module._live)
    del model
    assert len(fuse_module._live) < alive
