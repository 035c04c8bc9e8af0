"""Configurations: the published sizes, and errors that name the key and the file."""

from pathlib import Path

import pytest
import torch

from jasper_fast import Jasper, JasperConfig
from jasper_fast.nn.config import ConfigError
from jasper_fast.nn.eager import EagerJasper

CONFIGS = Path(__file__).parents[1] / "configs"


def small(**encoder):
    block = {"filters": 16, "repeat": 2, "kernel_size": [5], "stride": [1], "dilation": [1], "dropout": 0.1}
    block |= {"residual": True, "residual_dense": True}
    encoder = {"in_feats": 8, "activation": "relu", "use_conv_masks": True, "blocks": [block]} | encoder
    return {"encoder": encoder, "decoder": {"in_feats": 16, "n_classes": 5}}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_committed_configs_load_and_survive_a_round_trip(path):
    config = JasperConfig.from_yaml(path)
    assert JasperConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        ours, eager = Jasper(config, backend="reference"), EagerJasper(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in eager.state_dict().items()}


def test_jasper_10x5_has_the_reference_size():
    config = JasperConfig.from_yaml(CONFIGS / "jasper10x5dr.yaml")
    with torch.device("meta"):
        model = Jasper(config, backend="reference")
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 332_632_349
    assert len(state) == 650
    for name, shape in {
        "encoder.layers.10.conv.16": (768, 768, 25),
        "encoder.layers.10.res.9.0": (768, 768, 1),
        "encoder.layers.11.conv.0": (896, 768, 29),
        "decoder.layers.0": (29, 1024, 1),
    }.items():
        assert state[f"{name}.weight"].shape == shape, name
    assert config.input_train["spec_augment"]["max_time"] == 75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c["encoder"].update(width=1), "encoder.width"),
        (lambda c: c["encoder"]["blocks"][0].update(kernel=3), r"encoder.blocks\[0\].kernel"),
        (lambda c: c["encoder"]["blocks"][0].pop("filters"), r"encoder.blocks\[0\].filters is missing"),
        (lambda c: c["encoder"]["blocks"][0].update(dropout=1.0), "dropout"),
        (lambda c: c["encoder"]["blocks"][0].update(kernel_size=[3, 5]), "kernel_size"),
        (lambda c: c["encoder"]["blocks"][0].update(stride=[2]), "stride 1"),
        (lambda c: c["encoder"]["blocks"][0].update(kernel_size=None), "kernel_size"),
        (lambda c: c["encoder"]["blocks"][0].update(filters=16.0), r"encoder.blocks\[0\].filters must be of type int"),
        (lambda c: c["encoder"]["blocks"][0].update(residual="no"), "residual must be of type bool, not 'no'"),
        (lambda c: c["encoder"].update(use_conv_masks="false"), "use_conv_masks must be of type bool, not 'false'"),
        (lambda c: c["encoder"].update(in_feats="8"), "encoder.in_feats must be of type int, not '8'"),
        (lambda c: c["encoder"].update(in_feats=0), "in_feats must be at least 1"),
        (lambda c: c["encoder"].update(activation="tanh"), "tanh"),
        (lambda c: c["encoder"].update(blocks=None), "encoder.blocks must be a list, not NoneType"),
        (lambda c: c["encoder"].update(blocks=[]), "blocks is empty"),
        (lambda c: c["decoder"].update(in_feats=7), "decoder.in_feats is 7"),
        (lambda c: c["decoder"].pop("n_classes"), "n_classes is missing"),
        (lambda c: c["decoder"].update(n_classes=0), "n_classes must be at least 1"),
        (lambda c: c.update(labels=[" ", "a", 1, False]), "labels must be a list of texts"),
        (lambda c: c.update(input_val={"filterbank_features": [1]}), "input_val.filterbank_features must be a mapping"),
        (lambda c: c.update(jasper=small()), "unknown key encoder; known keys: name, labels"),
        (lambda c: c.pop("decoder"), "key decoder is missing"),
    ],
)
def test_errors_name_the_key(change, message):
    config = small()
    change(config)
    with pytest.raises(ConfigError, match=message):
        JasperConfig.from_dict(config)


def test_the_given_dictionary_is_left_alone():
    config = small()
    JasperConfig.from_dict(config)
    assert config == small()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such"),
        (b"jasper: [unclosed", "not valid YAML"),
        (b"PK\3\4 \x80", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"just a sentence", ".* must be a mapping"),
    ],
    ids=["missing", "unclosed", "a checkpoint", "too deep", "a sentence"],
)
def test_files_are_named_in_errors(tmp_path, text, message):
    if text:
        (tmp_path / "a.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"a\.yaml: {message}"):
        JasperConfig.from_yaml(tmp_path / "a.yaml")
