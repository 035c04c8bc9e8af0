"""Conversion of checkpoints: every format to every other and back bit for bit, and the report."""

import math
import os
from pathlib import Path

import nemo_files
import pytest
import torch
from conftest import raising
from lookalikes import nemo, nvidia
from test_checkpoint import BLOCKS, LABELS, config, outputs, own_document, same, trained_model
from test_checkpoint_models import nemo_archive, v1_entries

from jasper_fast.inference import convert as conversion
from jasper_fast.inference.convert import convert
from jasper_fast.nn import checkpoint, nemo_file
from jasper_fast.nn.checkpoint import CheckpointError
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.formats import read_weights
from jasper_fast.nn.loading import load_model
from jasper_fast.nn.model import Jasper
from jasper_fast.speech.features import LogMelFeatures

TARGETS = tuple(conversion.WRITERS)
FEATURES = {"n_filt": 6, "n_fft": 1024, "pad_align": 8, "preemph": 0.9, "dither": 0.0, "convention": "nemo"}
HEARD = {"audio_dataset": {"sample_rate": 16000}, "filterbank_features": FEATURES}


def full_config(**changes) -> JasperConfig:
    return JasperConfig.from_dict(config().to_dict() | {"input_val": HEARD} | changes)


def odd(state: dict) -> dict:
    """Returns `state` with values that arithmetic would not preserve: NaN payloads, signed zeros, denormals."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    next(iter(state.values())).view(-1)[:4] = torch.tensor(
        [0x7FC12345, -(2**31), 1, 0x7F800001], dtype=torch.int32
    ).view(torch.float32)
    return state


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return trained_model()


@pytest.fixture
def own(tmp_path, model) -> Path:
    """Writes a checkpoint as a training run saves it; returns its path."""
    state, average = odd(model.state_dict()), {k: v * 2 for k, v in model.state_dict().items()}
    more = {"optimizer": {"state": {}}, "scaler": {}, "step": 7, "rng": [torch.zeros(3)]}
    more |= {"config": full_config().to_dict(), "state_dict": state, "ema_state_dict": average}
    checkpoint.save(tmp_path / "own.pt", own_document(model, **more))
    return tmp_path / "own.pt"


# --- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", TARGETS)
@pytest.mark.parametrize("first", TARGETS)
def test_every_format_to_every_other_and_back(tmp_path, own, first, second):
    want, given = read_weights(own).state_dict, full_config()
    at = [tmp_path / name for name in ("a", "b", "c", "d.pt")]
    for source, out, to in zip([own, *at[:3]], at, (first, second, first, "jasper_fast"), strict=True):
        alone = read_weights(source).config is None
        assert alone == (read_weights(source).kind == "reference v2")
        _, found = convert(source, out, to, config=given if alone else None)
        assert found.encoder == given.encoder and found.labels == tuple(LABELS)
    for path in at:
        back = read_weights(path)
        assert same(back.state_dict, want)
        if back.kind != "reference v2":
            assert list(back.labels) == LABELS
            heard = LogMelFeatures.from_config(JasperConfig.from_dict(back.config).input_val["filterbank_features"])
            known = LogMelFeatures.from_config(FEATURES)
            assert {k: v for k, v in vars(heard).items() if not k.startswith("_") or k == "_window_name"} == {
                k: v for k, v in vars(known).items() if not k.startswith("_") or k == "_window_name"
            }
            assert torch.equal(heard.mel, known.mel) and torch.equal(heard.window, known.window)
    assert not list(tmp_path.glob(".*"))


def foreign(folder: Path, kind: str, model) -> Path:
    path, state = folder / "in", model.state_dict()
    if kind == "halves":
        return nemo_files.write_halves(folder, model)[0]
    if kind.startswith("nemo"):
        nemo_archive(path, model, masked=kind != "nemo without masks", compression="gz" if "gz" in kind else "")
    elif kind == "safetensors of another":
        from safetensors.torch import save_file

        save_file({f"module.{name}": tensor for name, tensor in state.items()}, path)
    else:
        wrapped = {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}
        documents = {
            "v2": {"state_dict": state, "epoch": 3, "optimizer": {}, "ema_state_dict": None},
            "bare": {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()},
            "v1": {"state_dict": v1_entries(state), "epoch": 3},
            "Lightning": {"state_dict": wrapped, "hyper_parameters": {"cfg": {"decoder": {"vocabulary": LABELS}}}},
        }
        torch.save(documents[kind], path)
    return path


KINDS = ("v2", "bare", "v1", "Lightning", "halves", "nemo", "nemo gz", "nemo without masks", "safetensors of another")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_others_become_every_format(tmp_path, model, kind):
    source = foreign(tmp_path, kind, model)
    want = read_weights(source).state_dict
    alone = None if kind.startswith("nemo") else config()
    for to in TARGETS:
        report, found = convert(source, tmp_path / to, to, config=alone)
        back = read_weights(tmp_path / to).state_dict
        assert same({k: v for k, v in back.items() if k in want}, want)
        assert (len(back) > len(want)) == (kind == "v1")  # the batch counters, which a v1 file lacks
        assert len([name for name in report.made if "num_batches" in name]) == len(back) - len(want)
        assert found.encoder.use_conv_masks == (kind != "nemo without masks")


def test_what_is_written_is_what_the_others_load(tmp_path, model, own):
    """Look-alikes of NVIDIA's and NeMo's modules load the converted files strictly, and give nearly equal outputs."""
    clean = tmp_path / "clean.pt"
    checkpoint.save(clean, own_document(model, config=full_config().to_dict()))
    want = outputs(load_model(clean, backend="reference"))
    blocks = [{"dilation": [1], "stride": [1], "residual_dense": False, "dropout": 0.0, **b} for b in BLOCKS]
    head = {"in_feats": 12, "n_classes": 9}
    features, lengths = torch.linspace(-1, 1, 2 * 6 * 32).view(2, 6, 32), torch.tensor([32, 20])
    valid = torch.tensor([16, 10])[:, None] > torch.arange(16)

    convert(clean, tmp_path / "a.pt", "nvidia")
    nvidias = nvidia.Jasper({"in_feats": 6, "blocks": blocks, "use_conv_masks": True}, head)
    nvidias.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"], strict=True)

    convert(clean, tmp_path / "a.nemo", "nemo")
    document, state = nemo_files.read(tmp_path / "a.nemo")
    front = {name: state.pop(f"preprocessor.featurizer.{name}") for name in ("window", "fb")}
    assert front["window"].shape == (320,) and front["fb"].shape == (1, 6, 513)
    nemos = nemo.EncDecCTCModel(6, [b | {"kernel_size": b["kernel"]} for b in document["encoder"]["jasper"]], 9)
    nemos.load_state_dict(state, strict=True)
    assert document["decoder"]["vocabulary"] == document["labels"] == LABELS
    assert document["preprocessor"]["preemph"] == 0.9 and document["preprocessor"]["log_zero_guard_value"] == 2**-24

    for theirs in (nvidias, nemos):
        with torch.no_grad():
            torch.testing.assert_close(theirs.eval()(features, lengths)[0][valid], want[valid], rtol=1e-4, atol=1e-3)


def test_quartznets(tmp_path):
    """Separable blocks survive the round trip. In NVIDIA's QuartzNet the convs of all blocks are named mconv."""
    blocks = [
        {"filters": 8, "kernel_size": [5], "stride": [2], "residual": False, "separable": True},
        {"filters": 8, "repeat": 2, "kernel_size": [3], "separable": True},
        {"filters": 12, "kernel_size": [1], "residual": False},
    ]
    given = full_config(jasper={"encoder": {"in_feats": 6, "blocks": blocks}, "decoder": {"in_feats": 12}})
    made = Jasper(given, backend="reference")
    state = odd(made.state_dict())
    average = {name: tensor + 1 for name, tensor in state.items()}
    checkpoint.save(tmp_path / "own.pt", own_document(made, state_dict=state, ema_state_dict=average))
    for to in TARGETS:
        convert(tmp_path / "own.pt", tmp_path / to, to)
        _, found = convert(tmp_path / to, tmp_path / "b", "safetensors", config=given, force=True)
        assert found.encoder == given.encoder and same(read_weights(tmp_path / "b").state_dict, state)
    theirs = torch.load(tmp_path / "nvidia", weights_only=True)
    convs = {name for name in theirs["state_dict"] if name.startswith("encoder.") and ".res." not in name}
    assert all(".mconv." in name for name in convs) and ".mconv." not in str(theirs["state_dict"].keys() - convs)
    assert theirs["state_dict"].keys() == theirs["ema_state_dict"].keys()
    assert same(read_weights(tmp_path / "nvidia", ema=True).state_dict, average)


# --- the report --------------------------------------------------------------------------------------------------


def test_the_report_is_exact(tmp_path, own):
    report, _ = convert(own, tmp_path / "a.nemo", "nemo")
    _, entries = nemo_files.read(tmp_path / "a.nemo")
    source = torch.load(own, weights_only=True)
    assert report.names.keys() == source["state_dict"].keys()
    assert {*report.names.values(), *report.made} == entries.keys()
    assert report.names["encoder.layers.1.res.0.0.weight"] == "encoder.encoder.1.res.0.0.conv.weight"
    assert report.elements == sum(t.numel() for t in source["state_dict"].values())
    left = source.keys() - {"format", "config", "labels", "state_dict"}
    assert {name.partition(" ")[0] for name in report.left_out} == left
    assert not report.settings_left_out and not report.warnings
    assert "--ema" in str(report) and f"{len(report.names)} entries" in str(report)
    again, _ = convert(tmp_path / "a.nemo", tmp_path / "b.pt", "nvidia")
    assert again.left_out == report.made and again.names == {new: old for old, new in report.names.items()}


def test_what_a_format_cannot_hold_is_a_warning(tmp_path, model):
    heard = {"n_filt": 6, "max_duration": 16.7}
    settings = {key: {"filterbank_features": heard} for key in ("input_val", "input_train")}
    checkpoint.save(tmp_path / "a.pt", own_document(model, config=full_config(**settings).to_dict()))
    report, _ = convert(tmp_path / "a.pt", tmp_path / "a.nemo", "nemo")
    assert report.settings_left_out == [f"{of}.filterbank_features.max_duration" for of in settings]
    (warning,) = report.warnings
    assert "NVIDIA's features" in warning
    assert read_weights(tmp_path / "a.nemo").config["input_val"]["filterbank_features"]["log_zero_guard_value"] == 1e-20
    report, _ = convert(tmp_path / "a.nemo", tmp_path / "b.pt", "nvidia")
    assert (
        len(report.warnings) == 2 and "--config-out" in report.warnings[0] and "NeMo's features" in report.warnings[1]
    )
    report, _ = convert(tmp_path / "b.pt", tmp_path / "c.pt", "jasper_fast", config=JasperConfig.from_dict(
        {k: v for k, v in config().to_dict().items() if k != "labels"}))  # fmt: skip
    assert len(report.warnings) == 2 and "labels are not known" in report.warnings[0]
    with pytest.raises(ValueError, match="give a configuration with labels"):
        convert(tmp_path / "c.pt", tmp_path / "d.nemo", "nemo")


@pytest.mark.parametrize("to", TARGETS)
def test_the_moving_average(tmp_path, own, to):
    live, average = read_weights(own), read_weights(own, ema=True)
    report, _ = convert(own, tmp_path / "a", to)
    back = read_weights(tmp_path / "a")
    assert same(back.state_dict, live.state_dict)
    if to in ("jasper_fast", "nvidia"):
        assert report.average and same(back.average, average.state_dict)
    else:
        assert back.average is None and any("--ema" in line for line in report.left_out)
    report, _ = convert(own, tmp_path / "b", to, ema=True)
    back = read_weights(tmp_path / "b")
    assert same(back.state_dict, average.state_dict) and back.average is None and not report.average
    assert "state_dict" in report.left_out
    with pytest.raises(CheckpointError, match="no moving average"):
        convert(tmp_path / "b", tmp_path / "c", to, ema=True)


# --- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TARGETS)
def test_a_writer_that_errs_leaves_the_old_file(tmp_path, own, monkeypatch, to):
    """The old file stays if the new one cannot be written, or differs when it is read back."""
    out = tmp_path / "out"
    out.write_bytes(b"old")
    write = conversion.WRITERS[to]

    def wrong(file, entries, *rest):
        return write(file, entries | {"decoder.layers.0.bias": entries["decoder.layers.0.bias"] + 1}, *rest)

    def lost(file, entries, *rest):
        return write(file, {name: tensor for name, tensor in entries.items() if "res.0.1" not in name}, *rest)

    for fault, said in (
        (wrong, "differs from what was written"),
        (lost, "other entries"),
        (raising(OSError(28, "No space left on device")), "No space left"),
    ):
        monkeypatch.setitem(conversion.WRITERS, to, fault)
        with pytest.raises(CheckpointError, match=said):
            convert(own, out, to, force=True)
        assert out.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["out", "own.pt"]


def test_names_that_nemo_would_not_know_are_noticed(tmp_path, own, monkeypatch):
    monkeypatch.setattr(nemo_file, "names", lambda entries, masked: {name: name[::-1] for name in entries})
    with pytest.raises(CheckpointError, match="has other entries than were written"):
        convert(own, tmp_path / "a.nemo", "nemo")
    assert os.listdir(tmp_path) == ["own.pt"]


@pytest.mark.parametrize("to", TARGETS)
def test_equal_inputs_give_equal_files(tmp_path, own, to):
    for name in ("a", "b"):
        convert(own, tmp_path / name / "out", to)
    assert (tmp_path / "a" / "out").read_bytes() == (tmp_path / "b" / "out").read_bytes()


def test_views_and_shared_memory_are_written_apart(tmp_path, model):
    """A slice of a large tensor takes up only its own bytes in the file."""
    state = model.state_dict()
    large = torch.full((100_000,), math.pi)
    state["encoder.layers.0.conv.1.bias"] = large[:8]
    state["encoder.layers.1.conv.1.bias"] = large[4:12]
    state["decoder.layers.0.weight"] = state["decoder.layers.0.weight"].transpose(0, 1).contiguous().transpose(0, 1)
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    for to in TARGETS:
        convert(tmp_path / "a.pt", tmp_path / to, to, config=full_config())
        assert same(read_weights(tmp_path / to).state_dict, state)
        assert (tmp_path / to).stat().st_size < 100_000
