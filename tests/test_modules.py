"""A Jasper reads the weights and settings of its convs and norms, but never calls these modules.

Hooks on them would not run, so they are refused. Parametrizations work, and every batch norm, panes' included,
obeys its own settings, as nn.BatchNorm1d defines them.
"""

import copy

import engines
import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from conftest import assert_raises
from engines import valid
from test_model import config
from torch import nn
from torch.nn.utils import prune

from jasper_fast import InferenceEngine, Jasper
from jasper_fast.nn.eager import EagerJasper

LENGTHS = torch.tensor([40, 23])
HOOKS = {
    "forward": lambda m: m.register_forward_hook(print),
    "forward_pre": lambda m: m.register_forward_pre_hook(print),
    "backward": lambda m: m.register_full_backward_hook(print),
    "backward_pre": lambda m: m.register_full_backward_pre_hook(print),
}
PLACES = {
    "conv": lambda model: model.encoder.layers[0].conv["0"],
    "norm": lambda model: model.encoder.layers[0].conv["1"],
    "pane": lambda model: model.encoder.layers[1].res[0][0],
    "pane's norm": lambda model: model.encoder.layers[1].res[0][1],
    "decoder": lambda model: model.decoder.layers[0],
}


@pytest.fixture
def model() -> Jasper:
    return Jasper(config("dense"), backend="reference").eval()


def features(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, model.config.encoder.in_feats, 40, dtype=next(model.parameters()).dtype)


def refused(model: Jasper, what: str) -> None:
    said = rf"in a Jasper has {what}.* would never run"
    assert_raises((
        (lambda: model.train()(features(model), LENGTHS), said),
        (lambda: model.eval()(features(model), LENGTHS), said),
        (lambda: InferenceEngine(model), what),
    ), RuntimeError)  # fmt: skip


@pytest.mark.parametrize(
    ("place", "hook"),
    [*((place, "forward") for place in PLACES), *(("conv", hook) for hook in HOOKS if hook != "forward")],
)
def test_a_hook_that_would_never_fire_is_refused(model, place, hook):
    handle = HOOKS[hook](PLACES[place](model))
    refused(model, r"a hook \(print\)")
    handle.remove()
    model(features(model), LENGTHS)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("place", ["conv", "pane", "decoder"])
def test_weights_that_a_hook_makes_are_refused(model, place):
    for make, remove, said in (
        (nn.utils.weight_norm, nn.utils.remove_weight_norm, "WeightNorm"),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, "SpectralNorm"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight"), "L1Unstructured"),
    ):
        make(PLACES[place](model))
        refused(model, rf"a hook \({said}\)")
        remove(PLACES[place](model))
    model(features(model), LENGTHS)


def test_a_conv_with_its_own_forward_is_refused(model):
    class Quantised(nn.Conv1d):
        def forward(self, x):
            return super().forward(x.round())

    conv = PLACES["conv"](model)
    conv.forward = lambda x: x
    refused(model, "its own forward")
    del conv.forward
    model(features(model), LENGTHS)
    model.encoder.layers[0].conv["0"] = Quantised(conv.in_channels, conv.out_channels, conv.kernel_size, bias=False)
    refused(model, "its own forward")


def test_hooks_on_blocks_and_parameters_fire(model):
    fired = []
    model.encoder.layers[0].register_forward_hook(lambda *_: fired.append("block"))
    PLACES["conv"](model).weight.register_hook(lambda _: fired.append("weight"))
    model.train()(features(model), LENGTHS)[0].sum().backward()
    assert fired == ["block", "weight"]


def parametrized(model: nn.Module) -> list[nn.Parameter]:
    for i, conv in enumerate([m for m in model.modules() if isinstance(m, nn.Conv1d)]):
        (parametrizations.weight_norm if i % 2 else parametrizations.spectral_norm)(conv)
    return [p for name, p in model.named_parameters() if "parametrizations" in name]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_parametrizations_work(backend):
    """Parametrized weights train, evaluate and run in the engine as in EagerJasper."""
    eager, results = EagerJasper(config("dense")), []
    fused = Jasper(eager.config, backend=backend)
    fused.load_state_dict(eager.state_dict())
    xs = [features(eager) for _ in range(3)]
    up = torch.randn(2, 20, eager.config.decoder.n_classes)
    for model in (eager, fused):
        torch.manual_seed(2)
        chosen = parametrized(model.train())
        optimizer = torch.optim.SGD(chosen, lr=0.01)
        for x in xs[:2]:
            optimizer.zero_grad()
            log_probs, lengths = model(x, LENGTHS)
            valid(log_probs * up, lengths).sum().backward()
            assert all(p.grad is not None for p in chosen)
            optimizer.step()
        with torch.no_grad():
            results.append(valid(*model.eval()(xs[2], LENGTHS)))
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(valid(*InferenceEngine(fused)(xs[2], LENGTHS)), results[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_parametrized_model_can_be_copied(model):
    parametrized(model)
    x = features(model)
    assert torch.equal(copy.deepcopy(model)(x, LENGTHS)[0], model(x, LENGTHS)[0])


# ---- batch norms with settings of their own ----


def norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]


def own_eps(bn: nn.BatchNorm1d, i: int) -> None:
    bn.eps = 10.0 ** -(i % 4)


def own_momentum(bn: nn.BatchNorm1d, i: int) -> None:
    bn.momentum = (None, 0.1, 0.5, 1.0)[i % 4]


def frozen(bn: nn.BatchNorm1d, i: int) -> None:
    bn.train(i % 3 != 0)


def untracked(bn: nn.BatchNorm1d, i: int) -> None:
    if i % 2:
        bn.track_running_stats, bn.running_mean, bn.running_var, bn.num_batches_tracked = False, None, None, None


def counted_or_untracked(bn: nn.BatchNorm1d, i: int) -> None:
    bn.momentum = None
    untracked(bn, i)


def all_at_once(bn: nn.BatchNorm1d, i: int) -> None:
    own_eps(bn, i)
    own_momentum(bn, i // 2)
    frozen(bn, i // 3)
    untracked(bn, i // 5)


def pair(form: str, change=lambda bn, i: None) -> tuple[EagerJasper, Jasper]:
    """Returns an eager and a fused model in fp64 with the same weights and the same `change` to their batch norms."""
    eager, fused = (model.double().train() for model in engines.pair(config("dense"), "reference", panes=form))
    for bn in norms(eager):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
    fused.load_state_dict(eager.state_dict())
    for model in (eager, fused):
        for i, bn in enumerate(norms(model)):
            change(bn, i)
    return eager, fused


def assert_equal(eager: EagerJasper, fused: Jasper) -> None:
    x = features(eager)
    want, got = (valid(*model(x, LENGTHS)) for model in (eager, fused))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # log-probabilities are fp32


@pytest.mark.parametrize("form", ["gram", "plain"])
@pytest.mark.parametrize(
    "change",
    [own_eps, own_momentum, frozen, untracked, counted_or_untracked, all_at_once],
    ids=lambda f: f.__name__,
)
def test_a_norm_does_what_its_settings_say(form, change):
    eager, fused = pair(form, change)
    for _ in range(2):
        assert_equal(eager, fused)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(eager.named_buffers()))
    x = features(eager)
    up = torch.randn(2, 20, fused.config.decoder.n_classes, dtype=torch.float64)
    for model in (eager, fused):
        log_probs, lengths = model(x, LENGTHS)
        valid(log_probs * up, lengths).sum().backward()
    want, got = ({name: p.grad for name, p in model.named_parameters()} for model in (eager, fused))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    eager.eval(), fused.eval()
    with torch.no_grad():
        assert_equal(eager, fused)


def test_update_bn_recomputes_the_statistics():
    eager, fused = pair("plain")
    batches = [features(eager) for _ in range(3)]
    for model in (eager, fused):
        model.register_forward_pre_hook(lambda _, given: (*given, LENGTHS))  # update_bn passes one argument
        torch.optim.swa_utils.update_bn(batches, model)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(eager.named_buffers()))


def test_an_engine_refuses_a_norm_without_running_statistics():
    _, fused = pair("plain", untracked)
    with pytest.raises(ValueError, match="without running statistics"):
        InferenceEngine(fused.eval())
