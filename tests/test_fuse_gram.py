"""Fused blocks whose panes take their statistics from Gram matrices, as on a GPU. All blocks that read an output
share its matrix."""

import gc
import weakref

import pytest
import test_fuse
import torch
from standins import spied
from test_fuse import KINDS, build, call, equal_steps, features, gradients_and_buffers, layers, twins
from torch.utils.checkpoint import checkpoint

from jasper_fast import fuse, ops
from jasper_fast.dispatch import choose
from jasper_fast.kernels.layout import mask
from jasper_fast.nn.shared import Shared, shared


@pytest.fixture(autouse=True)
def counted(monkeypatch) -> list[str]:
    """Forces the Gram form; returns the names of the ops for panes that ran, in order."""
    ran: list[str] = []

    monkeypatch.setattr(choose, "pane_form", lambda *of: "gram")
    for name in ("gram", "pane_stats", "panes", "panes_plain"):
        spied(monkeypatch, ops, name, lambda *of, name=name, **how: ran.append(name))
    return ran


@pytest.mark.parametrize(("kind", "masks"), [("dense", True), ("dense", False), ("plain", True)])
@pytest.mark.parametrize("which", KINDS)
def test_steps_equal_those_without_fusion(which, kind, masks, counted):
    equal_steps(build(which, kind, masks), training=True, rtol=1e-8)
    assert "panes_plain" not in counted


def test_a_gram_matrix_serves_all_blocks_that_read_it(counted):
    model = build("nvidia").train()
    fuse(model)
    call(model, features())
    assert [counted.count(of) for of in ("gram", "pane_stats", "panes")] == [2, 2, 2], "2 blocks of 1 and 2 panes"


def test_nothing_of_a_forward_pass_remains(counted, monkeypatch):
    """What blocks share does not outlive a forward pass, even if no backward pass follows, or an error ends the
    forward pass."""
    made = spied(monkeypatch, Shared, "__init__", lambda self, *of: weakref.ref(self))
    model = build("nemo").train()
    fuse(model)
    call(model, features())
    handle = layers(model)[2].register_forward_hook(lambda *of: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(model, features())
    handle.remove()
    gc.collect()
    assert len(made) == 2 and [of() for of in made] == [None, None] and shared() is None


def louder(module, given):
    given[0][0].mul_(2.0)


def shorter(module, given):
    return given[0], given[1] - 3


@pytest.mark.parametrize("hook", [louder, shorter])
@torch.no_grad()
def test_a_block_output_that_changes_between_two_readers_is_made_ready_again(hook):
    results = []
    for model in twins("nvidia"):
        model.double().train().encoder.layers[2].register_forward_pre_hook(hook)
        (out,), lengths = model.encoder(features(torch.float64), torch.tensor([61, 40, 33]))
        results.append(mask(out, lengths))
    torch.testing.assert_close(*results)


def test_autocast(counted):
    test_fuse.test_autocast("nvidia")
    assert "panes" in counted and "panes_plain" not in counted


def test_activation_checkpointing_of_a_block(counted, monkeypatch):
    """The second pass of a checkpointed block runs outside the encoder's forward, and must save the same tensors as the
    first."""
    results = []
    for model in twins("nvidia"):
        kind = type(model.double().train().encoder.layers[2])
        real = kind.__call__
        monkeypatch.setattr(
            kind,
            "__call__",
            lambda self, *of, real=real: checkpoint(lambda *o: real(self, *o), *of, use_reentrant=False),
        )
        out = call(model, features(torch.float64))
        out.square().mean().backward()
        monkeypatch.delattr(kind, "__call__")
        results.append({"output": out.detach(), **gradients_and_buffers(model)})
    # the second pass updates the running statistics again, in both models
    kept = [{n: x for n, x in found.items() if "running" not in n and "num_batches" not in n} for found in results]
    torch.testing.assert_close(*kept, rtol=1e-8, atol=1e-10)
    assert "panes_plain" in counted and "gram" not in counted
