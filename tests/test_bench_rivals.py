"""Rivals compute what eager computes, and an unknown one is named."""

from __future__ import annotations

import pytest
import torch
from bench_runs import CPU

from bench import __main__ as cli
from bench import limits, models, rivals
from jasper_fast.eager import EagerJasper


def test_rivals_compute_what_eager_computes():
    config = models.config("small")
    model = models.eager(config, models.weights(config, CPU, 64)).eval()
    x, lengths = models.features(config, 2, 64, CPU, 1)
    with torch.no_grad():
        want, out_lengths = model(x, lengths)
        for build in (rivals.eager_no_masks, rivals.ChannelsLast2d):
            got, got_lengths = build(model)(x, lengths)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
            assert torch.equal(got_lengths, out_lengths)
    assert want.std() > 0.3, "activations vanished: a wrong layer would not show"
    assert model.config.encoder.use_conv_masks


def test_dropout_off_and_on_again():
    model = EagerJasper(models.config("small")).train()
    x, lengths = models.features(model.config, 2, 64, CPU, 1)
    with models.dropout_off(model):
        assert torch.equal(model(x, lengths)[0], model(x, lengths)[0])
    assert not torch.equal(model(x, lengths)[0], model(x, lengths)[0])


def test_unknown_rival_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no rival 'nobody'"):
        rivals.choose("inference", CPU, "nobody")
    assert rivals.only("training", "eager,cuda_graph") == rivals.only("training", "cuda_graph") == "eager"
    assert rivals.only("inference", "eager,cuda_graph") == "eager,cuda_graph"
    with pytest.raises(ValueError, match="no rival 'nobody'"):
        rivals.only("training", "eager,nobody")
    monkeypatch.setattr(limits, "measure", lambda *_: {})
    with pytest.raises(SystemExit, match="--rivals: no rival 'openvino' for training; known: eager"):
        cli.main(["train", "--device", "cpu", "--rivals", "openvino", "--out", str(tmp_path)])
