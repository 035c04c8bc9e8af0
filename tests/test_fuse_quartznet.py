"""fuse() on QuartzNets, as EagerJasper and as the look-alike of NeMo's model."""

import pytest
import torch
from engines import block, draw_statistics
from lookalikes import nemo
from standins import spied
from test_fuse import call, equal_steps, features, layers, make
from torch import nn

from jasper_fast import fuse, ops, unfuse

SEPARABLE = {"separable": True}
BLOCKS = [
    block(16, k=11, s=2) | SEPARABLE,
    block(16, 2, 5, residual=True) | SEPARABLE,
    block(24, 3, 7, residual=True) | SEPARABLE,
    block(32, k=9, d=2) | SEPARABLE,
    block(40, k=1),
]


def build(which: str, masks: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return draw_statistics(make(which, BLOCKS, masks))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("which", ["nemo", "eager"])
def test_steps_equal_those_without_fusion(which: str, masks: bool, training: bool) -> None:
    equal_steps(build(which, masks), training, 2, factor=6.0)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("which", ["nemo", "eager"])
def test_evaluation_is_one_engine_that_notices_new_weights(which: str, masks: bool, monkeypatch) -> None:
    plain, fused = build(which, masks).eval(), build(which, masks).eval()
    assert len(fuse(fused).whole) == 1
    monkeypatch.setattr(ops, "separable_conv", None)  # fails if the blocks run one by one
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(call(fused, features()), call(plain, features()), rtol=1e-4, atol=1e-5)
            for model in (plain, fused):
                layers(model)[1].get_parameter(next(n for n, _ in layers(model)[1].named_parameters())).mul_(-1.5)


def test_every_sub_block_runs_one_op_and_unfuse_is_bit_equal(monkeypatch) -> None:
    model, ran = build("nemo"), spied(monkeypatch, ops, "separable_sub_block")
    before = call(model.eval(), features()).detach()
    fuse(model)
    call(model, features())
    assert len(ran) == sum(b["repeat"] - 1 for b in BLOCKS)
    unfuse(model)
    assert torch.equal(call(model, features()), before)


def test_a_mixed_block_is_fused_block_by_block() -> None:
    """A block with separable and ordinary convs is fused, but no engine runs its encoder."""
    plain, fused = build("nemo").eval(), build("nemo").eval()
    for model in (plain, fused):
        torch.manual_seed(3)
        layer = layers(model)[1]
        layer.mconv[0] = nemo.MaskedConv1d(16, 16, 5, padding=2, bias=False)
        del layer.mconv[1]
    report = fuse(fused)
    assert len(report.fused) == 5 and not report.whole and "different settings" in str(report)
    torch.testing.assert_close(call(fused, features()), call(plain, features()), rtol=1e-4, atol=1e-5)
