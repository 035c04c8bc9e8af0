"""Every batch norm of a Jasper, panes' included, obeys its own settings, as nn.BatchNorm1d defines them."""

import engines
import pytest
import torch
from engines import valid
from test_model import config
from torch import nn

from jasper_fast import InferenceEngine, Jasper
from jasper_fast.nn.eager import EagerJasper

LENGTHS = torch.tensor([40, 23])


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
    torch.manual_seed(3)
    eager, fused = (model.double().train() for model in engines.pair(config("dense"), "reference", panes=form))
    for bn in norms(eager):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
    fused.load_state_dict(eager.state_dict())
    for model in (eager, fused):
        for i, bn in enumerate(norms(model)):
            change(bn, i)
    return eager, fused


def equal(eager: EagerJasper, fused: Jasper, features: torch.Tensor) -> None:
    (want, lengths), (got, _) = (model(features, LENGTHS) for model in (eager, fused))
    # log-probabilities are fp32
    torch.testing.assert_close(valid(got, lengths), valid(want, lengths), atol=1e-5, rtol=1e-5)


def equal_buffers(eager: EagerJasper, fused: Jasper) -> None:
    torch.testing.assert_close(dict(fused.named_buffers()), dict(eager.named_buffers()))


def features_of(model: EagerJasper) -> torch.Tensor:
    return torch.randn(2, model.config.encoder.in_feats, 40, dtype=torch.float64)


CHANGES = (own_eps, own_momentum, frozen, untracked, counted_or_untracked, all_at_once)


@pytest.mark.parametrize("form", ["gram", "plain"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_norm_does_what_its_settings_say(form, change):
    eager, fused = pair(form, change)
    for _ in range(2):
        equal(eager, fused, features_of(eager))
    equal_buffers(eager, fused)
    features = features_of(eager)
    weight = torch.randn(2, 20, fused.config.decoder.n_classes, dtype=torch.float64)
    for model in (eager, fused):
        log_probs, lengths = model(features, LENGTHS)
        valid(log_probs * weight[:, : log_probs.shape[1]], lengths).sum().backward()
    want, got = ({name: p.grad for name, p in model.named_parameters()} for model in (eager, fused))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    eager.eval(), fused.eval()
    with torch.no_grad():
        equal(eager, fused, features)


def test_update_bn_recomputes_the_statistics():
    eager, fused = pair("plain")
    batches = [features_of(eager) for _ in range(3)]
    for model in (eager, fused):
        model.register_forward_pre_hook(lambda _, given: (*given, LENGTHS))  # update_bn passes one argument
        torch.optim.swa_utils.update_bn(batches, model)
    equal_buffers(eager, fused)


def test_an_engine_refuses_a_norm_without_running_statistics():
    _, fused = pair("plain", untracked)
    with pytest.raises(ValueError, match="without running statistics"):
        InferenceEngine(fused.eval())
