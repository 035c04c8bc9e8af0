"""Models against results of NVIDIA's Jasper: evaluation, first gradients, batch norms' buffers, four NovoGrad steps.

The models are EagerJasper, Jasper on each face except CUDA, and the look-alike of NVIDIA's model, plain and fused.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, interpreted, make_face
from engines import valid
from lookalikes import nvidia

from jasper_fast import InferenceEngine, Jasper, JasperConfig, NovoGrad, fuse
from jasper_fast.nn.eager import EagerJasper


@pytest.fixture(scope="module")
def golden():
    from safetensors import safe_open

    with safe_open(GOLDEN / "jasper_small_dense.safetensors", "pt") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    encoder = {"in_feats": int(meta["in_feats"]), "use_conv_masks": True, "blocks": json.loads(meta["blocks"])}
    return JasperConfig.from_dict({"encoder": encoder, "decoder": {"in_feats": 64, "n_classes": 29}}), tensors


def _named(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _build(which, config, tensors):
    if which.startswith("nvidia"):  # the look-alike
        made = config.to_dict()["jasper"]["encoder"]
        encoder = {key: made[key] for key in ("in_feats", "blocks", "use_conv_masks")}
        model = nvidia.Jasper(encoder, {"in_feats": 64, "n_classes": 29})
    else:
        model = EagerJasper(config) if which == "eager" else Jasper(config, backend=which)
    model.load_state_dict(_named(tensors, "state."))
    if which == "nvidia, fused":
        fuse(model, strict=True)
    return model


def _loss(model, tensors):
    log_probs, lengths = model(tensors["features"], tensors["feature_lengths"])
    losses = F.ctc_loss(
        log_probs.transpose(0, 1),
        tensors["targets"],
        lengths,
        tensors["target_lengths"],
        blank=log_probs.shape[2] - 1,
        reduction="none",
    )
    return log_probs, lengths, losses.mean()


def _relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.fixture(
    params=["eager", "reference", "cpu", pytest.param("triton", marks=pytest.mark.slow), "nvidia", "nvidia, fused"]
)
def which(request):
    if request.param == "triton":
        interpreted()
    elif request.param == "cpu":
        make_face("cpu")
    return request.param


@torch.no_grad()
def test_evaluation(golden, which):
    config, tensors = golden
    model = _build(which, config, tensors).eval()
    # all utterances but the longest
    features, lengths = tensors["features"][1:, :, :121], tensors["feature_lengths"][1:]
    for forward in [model, InferenceEngine(model)] if isinstance(model, Jasper) else [model]:
        log_probs, out_lengths = forward(features, lengths)
        assert torch.equal(out_lengths, tensors["eval.lengths"][1:])
        want = tensors["eval.log_probs"][1:, : log_probs.shape[1]]
        assert valid(log_probs - want, out_lengths).abs().max() <= 1e-4


def test_first_training_step(golden, which):
    config, tensors = golden
    model = _build(which, config, tensors).train()
    log_probs, lengths, loss = _loss(model, tensors)
    assert valid(log_probs - tensors["train.log_probs"], lengths).abs().max() <= 1e-3
    assert _relative(loss.detach(), tensors["train.losses"][0]) <= 1e-4

    want = _named(tensors, "stats_after_1.")
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(buffer, want[name])
        else:
            assert _relative(buffer, want[name]) <= 1e-4, name

    loss.backward()
    want = _named(tensors, "grad.")
    assert want.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert _relative(parameter.grad, want[name]) <= 1e-3, name


# test_first_training_step covers the first step of the other models
@pytest.mark.parametrize("which", ["eager", "reference", "cpu"], indirect=True)
def test_four_novograd_steps(golden, which):
    config, tensors = golden
    model = _build(which, config, tensors).train()
    face = "auto" if which == "eager" else which
    optimizer = NovoGrad(model.parameters(), lr=0.01, betas=(0.95, 0.0), weight_decay=1e-3, eps=1e-8, backend=face)
    for step in range(4):
        loss = _loss(model, tensors)[2]
        assert _relative(loss.detach(), tensors["train.losses"][step]) <= 1e-4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    want = _named(tensors, "param_after_4.")
    decays = []
    for name, parameter in model.named_parameters():
        assert _relative(parameter.detach(), want[name]) <= 1e-3, name
        if name.endswith("weight") and parameter.dim() == 1:
            before, off = tensors[f"state.{name}"], parameter.detach() - want[name]
            decays.append((off @ before / before.square().sum()).item())
    # Weight decay changes the scales of batch norms by only 1e-4, far less than the bound above. A wrong decay
    # shifts all scales by the same fraction of their initial values, while rounding shifts them in random directions.
    # So the mean of the shifts is checked, with a tighter bound.
    assert abs(sum(decays) / len(decays)) <= 5e-6
