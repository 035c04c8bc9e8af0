"""Other projects' Jasper 10x5 at full depth and a sixteenth of the width, with and without fusion."""

from pathlib import Path

import pytest
import torch
from close import assert_close
from engines import block
from test_fuse import call, equal_steps, features, make
from torch import nn

from jasper_fast import JasperConfig, unfuse


def deep(which: str, masks: bool) -> nn.Module:
    """Returns a model with random weights, whose running statistics come from a few forward passes."""
    made = JasperConfig.from_yaml(Path(__file__).parents[1] / "configs" / "jasper10x5dr.yaml")
    blocks = [
        block(b.filters // 16, b.repeat, b.k, b.s, b.d, 0.0, b.residual, b.residual_dense) for b in made.encoder.blocks
    ]
    model = make(which, blocks, masks)
    with torch.no_grad():
        for _ in range(8):
            call(model.train(), features())
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "masks", "training"),
    [("nvidia", True, True), ("nvidia", False, False), ("nemo", True, False), ("nemo", False, True)],
)
def test_steps(which, masks, training):
    """The fused model has the original's outputs, gradients, parameters and buffers. Afterwards both evaluate equally,
    and each loads the state dict of the other."""
    single = deep(which, masks)
    # in evaluation the statistics do not change, so one step is enough
    exact, fused, report = equal_steps(single, training, 2 if training else 1, rtol=1e-7)
    assert len(report.fused) == 13 and report.whole == ["encoder"]
    single.load_state_dict(fused.state_dict())
    exact.load_state_dict(single.state_dict())
    with torch.no_grad():
        want = call(single.eval(), features())
        assert_close(
            "evaluation", call(fused.eval(), features()), want, call(exact.eval(), features(torch.float64)), 4.0
        )
        fused.load_state_dict(exact.state_dict())
        unfuse(fused)
        assert torch.equal(call(fused, features()), want)
