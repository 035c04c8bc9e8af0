"""fuse() on other projects' models: the same results with the same parameters, and unfuse() undoes everything."""

import copy
import itertools
import json
from pathlib import Path

import engines
import pytest
import torch
from close import assert_close
from conftest import assert_raises
from engines import block, draw_statistics
from lookalikes import nemo, nvidia
from standins import spied
from torch import nn

from jasper_fast import Jasper, JasperConfig, fuse, ops, unfuse
from jasper_fast.kernels.layout import mask
from jasper_fast.nn.eager import EagerJasper

KINDS = ("nvidia", "nemo", "eager")
# "separable": a QuartzNet; NVIDIA's Jasper has no separable convs
MODELS = [*itertools.product(KINDS, ("dense", "plain", "none")), ("nemo", "separable"), ("eager", "separable")]
LENGTHS = torch.tensor([61, 40, 13])


def blocks(kind: str, dropout: float = 0.0) -> list[dict]:
    residual = {"residual": kind != "none", "dense": kind == "dense"}
    made = [
        block(16, k=11, s=2, dropout=dropout),
        block(16, 2, 5, dropout=dropout, **residual),
        block(24, 3, 7, dropout=dropout, **residual),
        block(32, k=9, d=2, dropout=dropout),
    ]
    return [*(b | {"separable": kind == "separable"} for b in made), block(40, k=1, dropout=dropout)]


def make(which: str, blocks: list[dict], masks: bool = True) -> nn.Module:
    """Returns a model for 8 features and 7 classes. `which`: one of KINDS."""
    if which == "eager":
        return EagerJasper(engines.config(blocks, masks))
    if which == "nemo":
        return nemo.EncDecCTCModel(8, blocks, 7, masks)
    encoder = {"in_feats": 8, "blocks": blocks, "use_conv_masks": masks}
    return nvidia.Jasper(encoder, {"in_feats": blocks[-1]["filters"], "n_classes": 7})


def build(which: str, kind: str = "dense", masks: bool = True, dropout: float = 0.0) -> nn.Module:
    """Returns a small model with random running statistics."""
    torch.manual_seed(0)
    return draw_statistics(make(which, blocks(kind, dropout), masks))


def twins(which: str, kind: str = "dense", masks: bool = True, **how) -> tuple[nn.Module, nn.Module]:
    """Returns the same model in evaluation mode twice, as it is and fused with the options `how`."""
    plain, fused = build(which, kind, masks).eval(), build(which, kind, masks).eval()
    fuse(fused, **how)
    return plain, fused


def layers(model: nn.Module) -> list[nn.Module]:
    return list(getattr(model.encoder, "layers", None) or model.encoder.encoder)


def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns log-probabilities (N, T', 7), zero beyond the lengths if the model has masks."""
    out = model(x, LENGTHS)
    out, lengths = out if isinstance(out, tuple) else (out, None)
    if lengths is not None and not torch.equal(lengths, LENGTHS):
        assert torch.equal(lengths, torch.tensor([31, 20, 7]))
        out = mask(out.transpose(1, 2), lengths).transpose(1, 2)
    return out


def features(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 8, 61, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    return call(model, features() if x is None else x)


def gradients_and_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


def steps(model: nn.Module, training: bool, number: int = 2) -> dict[str, torch.Tensor]:
    """Runs a few steps; returns the first output and gradients, and the final buffers and parameters."""
    dtype = next(model.parameters()).dtype
    x, found = features(dtype), {}
    model.train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    up = torch.randn(3, 31, 7, generator=torch.Generator().manual_seed(2)).to(dtype)
    for step in range(number):
        taken = x.clone().requires_grad_(step == 0)
        out = call(model, taken)
        optimizer.zero_grad()
        (out * up).mean().backward()
        if step == 0:
            found["output"], found["features"] = out.detach(), taken.grad
            found |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    found |= {f"{name} at the end": p.detach().clone() for name, p in model.named_parameters()}
    return found | {f"{name} at the end": b.clone() for name, b in model.named_buffers()}


def equal_steps(single: nn.Module, training: bool, number: int = 2, rtol: float = 1e-9, factor: float = 4.0) -> tuple:
    """Checks that a few steps of a model give the same results with and without fusion, in fp32 and in fp64.

    Returns the model in fp64, the fused one in fp32 and the report of fuse().
    """
    exact = copy.deepcopy(single).double()
    doubles, fused = copy.deepcopy(exact), copy.deepcopy(single)
    for model in (doubles, fused):
        report = fuse(model, strict=True)
        assert len(report.fused) == len(layers(model)) and not report.left
    ref, low, wide, got = (steps(model, training, number) for model in (exact, single, doubles, fused))
    assert ref.keys() == wide.keys() == got.keys()
    for name, want in ref.items():
        close = {"rtol": rtol, "atol": rtol / 100 * max(1.0, want.abs().max().item())}
        torch.testing.assert_close(wide[name], want, **close, msg=lambda m, n=name: f"{n}: {m}")
        if want.is_floating_point():
            assert_close(name, got[name], low[name], want, factor)
    return exact, fused, report


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("which", "kind"), MODELS)
def test_steps_equal_those_without_fusion(which, kind, masks, training, monkeypatch):
    """In both steps, one fused op leads from each conv of a block to the next, in each of the two fused models."""
    ran = spied(monkeypatch, ops, "separable_sub_block" if kind == "separable" else "sub_block")
    equal_steps(build(which, kind, masks), training, factor=6.0 if kind == "separable" else 4.0)
    assert len(ran) == 2 * 2 * sum(b["repeat"] - 1 for b in blocks(kind))


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("which", KINDS)
def test_lengths_and_lists_are_those_of_the_block(which, masks):
    """Without masks NVIDIA's blocks return no lengths, and NeMo's blocks return the lengths that they were given."""
    lengths = LENGTHS if masks or which != "eager" else None
    states = [([features()], lengths) for _ in range(2)]
    for pair in zip(*map(layers, twins(which, masks=masks)), strict=True):
        states = [layer(s) if which == "nemo" else layer(*s) for layer, s in zip(pair, states, strict=True)]
        (want, want_lengths), (got, got_lengths) = states
        assert type(got) is type(want) and [x.shape for x in got] == [x.shape for x in want]
        torch.testing.assert_close(got_lengths, want_lengths)


@pytest.mark.parametrize(("which", "kind"), [*((which, "dense") for which in KINDS), ("nemo", "separable")])
def test_names_objects_and_keys_stay_and_unfuse_gives_back_what_was_there(which, kind):
    model, plain = build(which, kind, dropout=0.2), build(which, kind, dropout=0.2)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    state, said = list(model.state_dict()), repr(model)
    types, held = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    fuse(model)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(m is modules[n] for n, m in model.named_modules())
    assert list(model.state_dict()) == state and repr(model) == said
    assert model.load_state_dict(plain.state_dict())
    assert [type(m) for m in model.modules()] != types
    unfuse(model)
    assert [type(m) for m in model.modules()] == types and [set(vars(m)) for m in model.modules()] == held
    results = []
    for m in (model, plain):
        torch.manual_seed(3)
        results.append(call(m.train(), features()))
    assert torch.equal(*results)


@pytest.mark.parametrize("which", KINDS)
def test_autocast(which):
    exact, single, fused = build(which).double(), build(which), build(which)
    fuse(fused)
    results = []
    for model in (single, fused, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            out = call(model.train(), features(next(model.parameters()).dtype))
        out.to(torch.promote_types(out.dtype, torch.float32)).square().mean().backward()
        results.append({"output": out.detach()} | {n: p.grad for n, p in model.named_parameters()})
    for name, want in results[2].items():
        assert_close(name, results[1][name], results[0][name], want, factor=3.0)


@pytest.mark.slow
def test_compile():
    _, model = twins("nvidia")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(evaluate(compiled), evaluate(model), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dropout_drops_as_often_and_follows_the_modules():
    model = build("nvidia", "none", masks=False, dropout=0.4).train()
    fuse(model)
    first, second = model.encoder.layers[:2]
    x = torch.randn(4, 8, 200)
    kept, _ = first([x])
    first.out[1].p = 0.0
    whole, _ = first([x])
    share = (kept[0] > 0).float().mean() / (whole[0] > 0).float().mean()
    assert 0.57 < share < 0.63
    at = kept[0] > 0
    torch.testing.assert_close(kept[0][at], whole[0][at] / 0.6, rtol=1e-4, atol=1e-5)
    second.eval()
    assert torch.equal(second(whole)[0][0], second(whole)[0][0])


def add_in_place(module, given, out):
    out[0][-1].add_(1.0)


def add(module, given, out):
    return [out[0][-1] + 1.0], out[1]


@pytest.mark.parametrize(("hook", "training"), [(add, False), (add_in_place, False), (add, True)])
def test_a_hook_that_changes_a_block_output_is_seen(hook, training):
    """A block masks an input that a hook has changed. It skips the masking of unchanged outputs of fused blocks."""
    models = twins("nvidia", "none", backend="reference")  # a face that reads the padding
    for model in models:
        model.double().train(training).encoder.layers[0].register_forward_hook(hook)
    torch.testing.assert_close(*(evaluate(model, features(torch.float64)) for model in models))


class QuantConv1d(nn.Conv1d):
    def forward(self, x):
        return super().forward(x.round())


class SqueezeExcite(nn.Identity):
    pass


LEFT = {
    "GroupNorm, not batch norm": lambda b: b.mconv.__setitem__(1, nn.GroupNorm(4, 16)),
    "residual_mode max": lambda b: setattr(b, "residual_mode", "max"),
    "heads = 4": lambda b: setattr(b.mconv[0], "heads", 4),
    "future_context": lambda b: setattr(b.mconv[0], "pad_layer", nn.ConstantPad1d((2, 0), 0.0)),
    "a depthwise conv without": lambda b: setattr(b.mconv[0], "conv", nn.Conv1d(16, 16, 5, groups=16, bias=False)),
    "groups = 2": lambda b: setattr(b.mconv[0], "conv", nn.Conv1d(16, 16, 5, groups=2, bias=False)),
    "squeeze-excite": lambda b: b.mconv.append(SqueezeExcite()),
    "quantised": lambda b: setattr(b.mconv[0], "conv", QuantConv1d(16, 16, 5, bias=False)),
    "adapters": lambda b: setattr(b, "adapter_layer", nn.ModuleDict({"a": nn.Identity()})),
    "Hardtanh, not ReLU": lambda b: b.mout.__setitem__(0, nn.Hardtanh(0, 20)),
    r"a hook \(print\) on mconv.1": lambda b: b.mconv[1].register_forward_hook(print),
    "a forward method was set on mconv.0 itself": lambda b: setattr(b.mconv[0], "forward", b.mconv[0].forward),
    "only some of its convs have masks": lambda b: setattr(b.mconv[4], "use_mask", False),
    "captured": lambda b: setattr(b, "is_access_enabled", lambda guid: True),
    "a conv with a bias": lambda b: setattr(b.mconv[0], "conv", nn.Conv1d(16, 16, 5, padding=2)),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_cannot_be_fused_is_left_with_a_reason(reason):
    model = build("nemo")
    LEFT[reason](layers(model)[1])
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=rf"encoder\.encoder\.1: .*{reason}"):
        fuse(model, strict=True)
    assert [type(m) for m in model.modules()] == kinds, "strict must change nothing"
    report = fuse(model)
    ((name, why),) = report.left
    assert name == "encoder.encoder.1" and len(report.fused) == len(layers(model)) - 1
    assert f"left alone: {name}: {why}" in str(report) and str(report).startswith("4 of 5 blocks")
    assert json.loads(json.dumps(report.data())) == {"fused": report.fused, "whole": [], "left": [[name, why]]}


@pytest.mark.parametrize("kind", ["dense", "plain"])
def test_a_block_left_alone_works_among_fused_ones(kind):
    plain, mixed = build("nemo", kind).eval(), build("nemo", kind).eval()
    for model in (plain, mixed):
        layers(model)[2].residual_mode = "max"
    assert len(fuse(mixed).left) == 1
    torch.testing.assert_close(call(mixed, features()), call(plain, features()), rtol=1e-4, atol=1e-5)


def test_a_block_of_separable_and_ordinary_convs_is_fused_but_no_engine_runs_its_encoder():
    plain = build("nemo", "separable").eval()
    layers(plain)[1].mconv[0] = nemo.MaskedConv1d(16, 16, 5, padding=2, bias=False)
    del layers(plain)[1].mconv[1]
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert len(report.fused) == 5 and not report.whole and "different settings" in str(report)
    torch.testing.assert_close(call(fused, features()), call(plain, features()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", KINDS)
def test_lengths_beyond_the_frames_and_below_zero(which):
    """A length beyond the frames masks none of them and a negative length masks all, with an engine and without."""
    lengths = torch.tensor([70, 40, -3])
    plain, fused = twins(which)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            (want, want_lengths), (got, got_lengths) = plain(features(), lengths), fused(features(), lengths)
        assert torch.equal(got_lengths, want_lengths)
        torch.testing.assert_close(got[:2, :20], want[:2, :20], rtol=1e-4, atol=1e-5)
    for model in (plain, fused):
        model.train()(features(), lengths)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["nvidia", "nemo"])
def test_masks_without_lengths_are_refused(which):
    model = build(which)
    fuse(model)
    with pytest.raises(ValueError, match="needs the lengths"):
        model(features(), None)


def test_utterances_shorter_than_an_unpadded_conv():
    plain = layers(build("nvidia", "none").eval())[3]
    plain.conv[0].padding = (0,)
    fused = copy.deepcopy(plain)
    fuse(fused)
    given = [torch.ones(3, 24, 61)], torch.tensor([61, 40, 2])
    (want, want_lengths), (got, got_lengths) = plain(*given), fused(*given)
    assert torch.equal(got_lengths, want_lengths) and want_lengths[2] < 0
    torch.testing.assert_close(got[0][0], want[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", KINDS)
def test_torch_export(which):
    """NVIDIA's and NeMo's blocks use one ReLU in several places. While torch.export traces them, it replaces such a
    module by an instance of a subclass, which must still count as a ReLU."""
    plain, fused = twins(which)
    exported = torch.export.export(fused, (features(), LENGTHS)).module()
    torch.testing.assert_close(call(exported, features()), call(plain, features()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("undo", [fuse, unfuse])
def test_a_class_derived_from_the_fused_one(undo):
    """fully_shard (FSDP2) replaces the class of a block by a subclass of FSDPModule and of that class."""

    class FSDPModule:
        pass

    model = build("nvidia").eval()
    want = call(model, features())
    fuse(model)
    for m in layers(model):
        m.__class__ = type("FSDPJasperBlock", (FSDPModule, type(m)), {"own": True})
    with pytest.raises(RuntimeError, match=r"its class is FSDPJasperBlock.*fuse\(model\) again"):
        call(model, features())
    report = undo(model)
    assert torch.equal(call(model, features()), want)
    assert report is None or not report.fused
    assert all(type(m).__mro__[1:3] == (FSDPModule, nvidia.JasperBlock) and m.own for m in layers(model))


@pytest.mark.parametrize("kind", ["dense", "plain"])
def test_outputs_that_the_residual_does_not_take_are_refused(kind):
    block = layers(build("nvidia", kind))[1]
    fuse(block)
    x = torch.randn(3, 16, 31)
    with pytest.raises(ValueError, match="1 residual convs was given 2 block outputs"):
        block([x, x], LENGTHS)


def test_a_block_changed_after_fusion_is_refused():
    model = build("nemo").eval()
    fuse(model)
    handle = layers(model)[1].mconv[0].register_forward_hook(print)
    with pytest.raises(RuntimeError, match=r"a hook \(print\) on mconv\.0.*fuse\(model\) again"):
        call(model, features())
    ((name, _),) = fuse(model).left
    assert name == "encoder.encoder.1" and type(layers(model)[1]) is nemo.JasperBlock
    handle.remove()
    call(model, features())
    assert fuse(model).left == []


def test_a_model_of_another_kind_is_refused():
    other = nn.Sequential(nn.Conv1d(3, 3, 3), nn.ReLU())
    assert_raises(
        [
            (lambda: fuse(other), r"no Jasper blocks in Sequential: looked for .*JasperBlock.*EagerBlock"),
            (lambda: fuse(Jasper(engines.config())), "which are already fused"),
            (lambda: fuse(build("nemo"), "fast"), "backend 'fast' is not one of"),
        ]
    )


def test_a_block_or_an_encoder_alone_and_twice():
    model = build("nvidia").eval()
    want = call(model, features())
    assert fuse(model.encoder.layers[0]).fused == [""]
    assert len(fuse(model.encoder).fused) == 5
    torch.testing.assert_close(call(model, features()), want, rtol=1e-4, atol=1e-5)
    unfuse(model)
    assert torch.equal(call(model, features()), want)


# ---- Jasper 10x5 of other projects, at full depth and a sixteenth of the width ----


def deep(which: str, masks: bool) -> nn.Module:
    """Returns a model with random weights, whose running statistics come from a few forward passes."""
    made = JasperConfig.from_yaml(Path(__file__).parents[1] / "configs" / "jasper10x5dr.yaml")
    blocks = [
        block(b.filters // 16, b.repeat, b.k, b.s, b.d, 0.0, b.residual, b.residual_dense) for b in made.encoder.blocks
    ]
    model = make(which, blocks, masks)
    for _ in range(8):
        evaluate(model.train())
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "masks", "training"),
    [("nvidia", True, True), ("nvidia", False, False), ("nemo", True, False), ("nemo", False, True)],
)
def test_steps_at_full_depth(which, masks, training):
    """The fused model has the original's outputs, gradients, parameters and buffers. Afterwards both evaluate equally,
    and each loads the state dict of the other."""
    single = deep(which, masks)
    # in evaluation the statistics do not change, so one step is enough
    exact, fused, report = equal_steps(single, training, 2 if training else 1, rtol=1e-7)
    assert len(report.fused) == 13 and report.whole == ["encoder"]
    single.load_state_dict(fused.state_dict())
    exact.load_state_dict(single.state_dict())
    want, ref = evaluate(single.eval()), evaluate(exact.eval(), features(torch.float64))
    assert_close("evaluation", evaluate(fused.eval()), want, ref, 4.0)
    fused.load_state_dict(exact.state_dict())
    unfuse(fused)
    assert torch.equal(evaluate(fused), want)
