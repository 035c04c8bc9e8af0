"""Checkpoints: atomic writes, reads that report what is wrong, and files of other Jaspers."""

from __future__ import annotations

import io
import os
import random
import re
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jasper_fast.inference.recognizer import Recognizer
from jasper_fast.nn import checkpoint, loading
from jasper_fast.nn.checkpoint import CheckpointError, load, save
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.formats import published_labels, read_weights
from jasper_fast.nn.loading import load_model, load_weights
from jasper_fast.nn.model import Jasper
from jasper_fast.speech.features import LogMelFeatures, mel_filterbank
from jasper_fast.training import randomness
from jasper_fast.training.folder import Folder

ROOT = Path(__file__).resolve().parents[1]
LABELS = list(" abcdefg")
BLOCKS = [
    {"filters": 8, "repeat": 1, "kernel_size": [5], "stride": [2], "residual": False},
    {"filters": 8, "repeat": 2, "kernel_size": [3], "residual": True, "residual_dense": True},
    {"filters": 8, "repeat": 2, "kernel_size": [3], "residual": True, "residual_dense": True},
    {"filters": 12, "repeat": 1, "kernel_size": [1], "residual": False},
]


def config(labels=LABELS):
    model = {
        "encoder": {"in_feats": 6, "blocks": BLOCKS},
        "decoder": {"in_feats": 12, "n_classes": len(labels) + 1},
    }
    return JasperConfig.from_dict({"labels": labels, "jasper": model})


def trained_model():
    """Returns a model in which every entry of the state dict differs from a fresh model's."""
    model = Jasper(config(), backend="reference")
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
        else:
            tensor.fill_(7)
    return model.eval()


def outputs(model):
    with torch.no_grad():
        features = torch.linspace(-1, 1, 2 * 6 * 32).view(2, 6, 32)
        return model(features, torch.tensor([32, 20]))[0]


def run_state(step, **more):
    return {"format": checkpoint.FORMAT, "step": step, "state_dict": {"w": torch.full((3,), float(step))}} | more


# --- writing -----------------------------------------------------------------------------------------------------


def test_round_trip_leaves_nothing_beside(tmp_path):
    save(tmp_path / "new" / "a.pt", {"x": torch.arange(3), "step": 4, "name": "b"})
    state = load(tmp_path / "new" / "a.pt")
    assert torch.equal(state["x"], torch.arange(3)) and state["step"] == 4 and state["name"] == "b"
    assert os.listdir(tmp_path / "new") == ["a.pt"]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(tmp_path):
    """Shows that a real write error, from the system's limit on file sizes, leaves the old file in place."""
    program = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from jasper_fast.nn.checkpoint import CheckpointError, save
path = {str(tmp_path / "a.pt")!r}
save(path, {{"x": torch.ones(10)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save(path, {{"x": torch.zeros(1_000_000)}})
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.search(r"cannot write .*a\.pt: .*too large.*untouched.*Free some space", done.stdout), done.stdout
    assert torch.equal(load(tmp_path / "a.pt")["x"], torch.ones(10))
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/a\.pt"):
        save(tmp_path / "file" / "a.pt", {})


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 10, 600, -1, None])
def test_a_file_cut_short_or_with_a_flipped_bit_is_named(tmp_path, keep):
    path = tmp_path / "a.pt"
    save(path, {"x": torch.randn(10_000)})
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= keep is None
    path.write_bytes(whole[:keep])
    said = r"a\.pt is damaged" if keep is None else r"a\.pt .*cut short.*earlier checkpoint"
    with pytest.raises(CheckpointError, match=said):
        load(path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.pt", lambda path: None, r"none\.pt: no such file"),
        ("text.pt", lambda path: path.write_text("hello"), r"text\.pt .*another\s+kind of file"),
        ("list.pt", lambda path: torch.save([1, 2], path), r"list\.pt holds a list"),
        ("nothing.pt", lambda path: torch.save({"epoch": 3}, path), "holds no model"),
    ],
)
def test_foreign_files_are_named(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / name)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"bomb\.pt holds Python objects \(.*mkdir\)"):
        load(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


# --- rotation ----------------------------------------------------------------------------------------------------


def test_the_last_few_the_best_and_the_milestones_are_kept(tmp_path):
    folder = Folder(tmp_path, keep=2)
    for step in range(1, 7):
        state = run_state(step)
        folder.save(state)
        if step == 3:
            folder.save(state | {"best_wer": 0.5}, "best")
        if step == 4:
            folder.save(state, "milestone_epoch_0002")
    assert sorted(os.listdir(tmp_path)) == [
        "best.pt", "milestone_epoch_0002.pt", "step_00000005.pt", "step_00000006.pt",
    ]  # fmt: skip
    assert load(tmp_path / "best.pt")["best_wer"] == 0.5
    assert folder.latest()[1]["step"] == 6
    with pytest.raises(ValueError, match="keep"):
        Folder(tmp_path, keep=0)


def test_a_broken_newest_is_reported_and_the_one_before_taken(tmp_path):
    folder = Folder(tmp_path, keep=3)
    assert folder.latest() is None
    for step in (1, 2, 3):
        folder.save(run_state(step))
    newest = tmp_path / "step_00000003.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    torch.save({"state_dict": {}}, tmp_path / "step_00000004.pt")  # somebody else's
    (tmp_path / ".step_00000005.pt.tmp").write_bytes(b"half")
    reports = []
    path, state = folder.latest(reports.append)
    assert (path.name, state["step"]) == ("step_00000002.pt", 2)
    assert len(reports) == 2 and "step_00000004.pt" in reports[0] and "step_00000003.pt" in reports[1]
    folder.clean()
    assert not list(tmp_path.glob(".*"))
    for path in folder.steps():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 4 checkpoints"):
        folder.latest(reports.append)


def test_random_generators_continue(tmp_path):
    random.gauss(0, 1), np.random.randn()  # each of these draws two normal numbers and keeps one for later
    save(tmp_path / "rng.pt", randomness.rng_state())
    draw = lambda: (torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist())  # noqa: E731
    expected = draw()
    draw()
    randomness.set_rng_state(load(tmp_path / "rng.pt"))
    assert draw() == expected


# --- models ------------------------------------------------------------------------------------------------------


def test_own_checkpoints_carry_their_configuration(tmp_path):
    model = trained_model()
    average = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state = {"format": checkpoint.FORMAT, "config": config().to_dict(), "labels": LABELS}
    save(tmp_path / "a.pt", state | {"state_dict": model.state_dict(), "ema_state_dict": average})
    again = load_model(tmp_path / "a.pt", backend="reference")
    assert not again.training and again.config == model.config
    assert torch.equal(outputs(again), outputs(model))
    doubled = load_model(tmp_path / "a.pt", ema=True, backend="reference")
    assert torch.equal(doubled.decoder.layers[0].bias, 2 * model.decoder.layers[0].bias)
    save(tmp_path / "b.pt", state | {"state_dict": model.state_dict(), "ema_state_dict": None})
    with pytest.raises(CheckpointError, match="no moving average"):
        load_model(tmp_path / "b.pt", ema=True)


def v1_entries(state):
    """Returns the entries under their names of 2019, with the extra copies and buffers that the reference then
    saved."""
    entries = {"audio_preprocessor.featurizer.window": torch.ones(320)}
    for name, tensor in state.items():
        old = name.replace("encoder.layers.", "jasper_encoder.encoder.")
        old = old.replace("decoder.layers.", "jasper_decoder.decoder_layers.")
        if not name.endswith("num_batches_tracked"):
            entries |= {old: tensor, f"acoustic_model.{old}": tensor}
    return entries


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        ("reference v2", lambda state: {"state_dict": state, "epoch": 1, "optimizer": {}, "scaler": {}}),
        ("reference v2", lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
        ("reference v2", lambda state: state),
        ("reference v1", lambda state: {"state_dict": v1_entries(state), "epoch": 1, "optimizer": {}}),
    ],
    ids=["v2", "v2 of several GPUs", "bare", "v1"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_reference_checkpoints(tmp_path, kind, document, zipped):
    model, path = trained_model(), tmp_path / "a.pt"
    torch.save(document(model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    assert read_weights(path).kind == kind
    assert torch.equal(outputs(load_model(path, config=config(), backend="reference")), outputs(model))


def nemo_archive(path, model, *, masked=True, mode="w", encoder=None, front=None, more=None):
    entries = {"preprocessor.featurizer.fb": torch.ones(1, 6, 9)}
    for name, tensor in model.state_dict().items():
        new = name.replace("decoder.layers", "decoder.decoder_layers").replace("encoder.layers", "encoder.encoder")
        new = new.replace(".conv.", ".mconv.")
        if masked and new.startswith("encoder.") and tensor.dim() == 3:
            new = new.removesuffix("weight") + "conv.weight"
        entries[new] = tensor
    jasper = [
        {"separable": False, "dilation": [1], "dropout": 0.2, "stride": [1], **b, "kernel": b["kernel_size"]}
        for b in BLOCKS
    ]
    for block in jasper:
        del block["kernel_size"]
    jasper[0]["dropout"] = "${model.model_defaults.dropout}"
    document = {
        "model_defaults": {"dropout": 0.25},
        "labels": LABELS,
        "preprocessor": {"sample_rate": 16000, "features": 6, "n_fft": 512, "pad_to": 16, "window": "hann"}
        | (front or {}),
        "encoder": {"feat_in": 6, "activation": "relu", "conv_mask": masked, "jasper": jasper} | (encoder or {}),
        "decoder": {"feat_in": 12, "num_classes": len(LABELS), "vocabulary": "${labels}"},
    } | (more or {})
    weights = io.BytesIO()
    torch.save(entries, weights)
    with tarfile.open(path, mode) as archive:
        for name, content in (
            ("./model_config.yaml", yaml.safe_dump(document).encode()),
            ("./model_weights.ckpt", weights.getvalue()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_nemo(tmp_path, masked, mode):
    model = trained_model()
    nemo_archive(tmp_path / "m.nemo", model, masked=masked, mode=mode)
    loaded = load_model(tmp_path / "m.nemo", backend="reference")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.labels == tuple(LABELS)
    assert loaded.config.encoder.use_conv_masks is masked
    assert loaded.config.encoder.blocks[0].dropout == 0.25
    if masked:
        assert torch.equal(outputs(loaded), outputs(model))


def test_nemo_features_are_those_of_the_file(tmp_path):
    fixed = {"fixed_mean": [0.5] * 6, "fixed_std": [2.0] * 6}
    front = {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", "preemph": 0.9,
             "lowfreq": 100, "highfreq": 7000, "log_zero_guard_type": "clamp", "log_zero_guard_value": "tiny",
             "mag_power": 1.0, "pad_to": 8, "dither": 0.5, "stft_conv": False}  # fmt: skip
    for normalize in ("all_features", fixed, None):
        nemo_archive(tmp_path / "m.nemo", trained_model(), front=front | {"normalize": normalize})
        loaded = load_model(tmp_path / "m.nemo", backend="reference").config.input_val["filterbank_features"]
        heard = LogMelFeatures.from_config(loaded)
        assert (heard.convention, heard.log_guard, heard.log_guard_type) == ("nemo", torch.finfo().tiny, "clamp")
        assert (heard.mag_power, heard.preemphasis, heard.normalize, heard.pad_to_multiple) == (1.0, 0.9, normalize, 8)
        assert torch.equal(heard.mel, mel_filterbank(n_mels=6, f_min=100, f_max=7000))
    nemo_archive(tmp_path / "m.nemo", trained_model())
    heard = Recognizer(load_model(tmp_path / "m.nemo", backend="reference")).features
    assert (heard.convention, heard.log_guard, heard.log_guard_type) == ("nemo", 2**-24, "add")


@pytest.mark.parametrize(
    "front",
    [{"normalize": "per_utterance"}, {"log_zero_guard_type": "max"}, {"log_zero_guard_value": "small"},
     {"exact_pad": True}, {"pad_to": "max"}, {"pad_value": -1.0}, {"mel_norm": None}, {"frame_splicing": 3},
     {"_target_": "nemo.collections.asr.modules.AudioToMFCCPreprocessor"}, {"use_deltas": True}],
    ids=lambda front: next(iter(front)),
)  # fmt: skip
def test_nemo_features_that_cannot_be_made_are_named(tmp_path, front):
    nemo_archive(tmp_path / "m.nemo", trained_model(), front=front)
    with pytest.raises(CheckpointError, match=rf"m\.nemo: preprocessor\.{next(iter(front))}=.* is not supported"):
        load_model(tmp_path / "m.nemo")


def test_a_nemo_model_of_pieces_of_words_is_refused(tmp_path):
    nemo_archive(tmp_path / "m.nemo", trained_model(), more={"tokenizer": {"dir": "x", "type": "bpe"}})
    with pytest.raises(CheckpointError, match=r"m\.nemo: .*tokenizer"):
        load_model(tmp_path / "m.nemo")


def test_nemo_archives_that_are_no_jasper(tmp_path):
    model = trained_model()
    citrinet = [{"filters": 8, "repeat": 1, "kernel": [5], "separable": True, "se": True}]
    nemo_archive(tmp_path / "q.nemo", model, masked=True, mode="w", encoder={"jasper": citrinet})
    with pytest.raises(CheckpointError, match=r"block 0 .*se=True, so it is neither a Jasper nor a QuartzNet"):
        load_model(tmp_path / "q.nemo")
    nemo_archive(tmp_path / "m.nemo", model, masked=True, mode="w:gz")
    whole = (tmp_path / "m.nemo").read_bytes()
    (tmp_path / "m.nemo").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"m\.nemo is not a complete NeMo archive"):
        load_model(tmp_path / "m.nemo")


def test_a_file_that_does_not_fit_lists_what_differs(tmp_path):
    model = trained_model()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")
    wide = config().to_dict()
    wide["jasper"]["encoder"]["blocks"][1]["filters"] = 10
    with pytest.raises(
        CheckpointError, match=r"does not fit the model; \d+ entries differ: encoder\.layers\.1\.conv\.0"
    ):
        load_model(tmp_path / "a.pt", config=JasperConfig.from_dict(wide))
    with pytest.raises(CheckpointError, match="does not fit the model"):  # default: Jasper 10x5
        load_model(tmp_path / "a.pt")


@pytest.mark.parametrize("labels", [list(" abcdefghij"), list(" hijklmn")], ids=["more", "as many, but others"])
def test_warm_start_with_other_labels(tmp_path, labels):
    model = trained_model()
    state = {"format": checkpoint.FORMAT, "config": config().to_dict(), "labels": LABELS}
    save(tmp_path / "a.pt", state | {"state_dict": model.state_dict()})
    with pytest.raises(CheckpointError, match="strict=False"):
        load_model(tmp_path / "a.pt", config=config(labels), backend="reference")
    with pytest.warns(UserWarning, match=r"anew for other labels, but its rows for the blank and for \d+ of"):
        warm = load_model(tmp_path / "a.pt", config=config(labels), strict=False, backend="reference")
    assert warm.decoder.layers[0].weight.shape[0] == len(labels) + 1
    for name, tensor in warm.state_dict().items():
        assert name.startswith("decoder.") or torch.equal(tensor, model.state_dict()[name]), name
    head, old = warm.decoder.layers[0], model.decoder.layers[0]
    for i, label in enumerate([*labels, "blank"]):  # the blank is the last row in both
        known = [*LABELS, "blank"].index(label) if label in [*LABELS, "blank"] else None
        if known is None:
            assert not (head.weight[i] == old.weight).any()
        else:
            assert torch.equal(head.weight[i], old.weight[known]) and head.bias[i] == old.bias[known]


def test_labels_of_a_warm_start_that_start_from_others(tmp_path):
    model, labels = trained_model(), [*LABELS[:3], "ä", "="]
    state = {"format": checkpoint.FORMAT, "config": config().to_dict(), "labels": LABELS}
    save(tmp_path / "a.pt", state | {"state_dict": model.state_dict()})
    weights, warm = read_weights(tmp_path / "a.pt"), Jasper(config(labels), backend="reference")
    like = dict(map(loading.label_pair, (f"ä={LABELS[1]}", f"=={LABELS[5]}")))
    with pytest.warns(UserWarning, match="for 5 of the 5 labels are copied"):
        load_weights(warm, weights, labels=labels, strict=False, like=like)
    head, old = warm.decoder.layers[0], model.decoder.layers[0]
    for tensor, source in ((head.weight, old.weight), (head.bias, old.bias)):
        assert torch.equal(tensor, source[[0, 1, 2, 1, 5, len(LABELS)]])
    wrong = {"a=é": "no label 'é'", "é=a": "'é'.*not one of the model's", "é": "a new label and an old one"}
    for pair, said in wrong.items():
        with pytest.raises(CheckpointError, match=said):
            load_weights(warm, weights, labels=labels, strict=False, like=dict([loading.label_pair(pair)]))


def test_a_file_without_labels_has_the_published_ones_where_labels_start_from_them(tmp_path):
    model, labels = Jasper(config(published_labels()), backend="reference"), [" ", "b", "ä"]
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")
    warm = Jasper(config(labels), backend="reference")
    with pytest.warns(UserWarning, match="for 3 of the 3 labels are copied"):
        load_weights(warm, read_weights(tmp_path / "a.pt"), labels=labels, strict=False, like={"ä": "a"})
    assert torch.equal(warm.decoder.layers[0].weight, model.decoder.layers[0].weight[[0, 2, 1, 28]])


@pytest.mark.parametrize("kind", ["NVIDIA's", "bare", "Lightning", "Lightning, labels unsaid"])
def test_warm_start_from_a_file_that_may_not_say_its_labels(tmp_path, kind):
    """Shows that a model with the same number of other labels keeps no wrong row of the decoder. The shapes fit, so
    only the alphabets show the difference."""
    model, other = trained_model(), list(" hijklmn")
    state = model.state_dict()
    if kind.startswith("Lightning"):
        wrapped = {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}
        said = {} if "unsaid" in kind else {"cfg": {"decoder": {"vocabulary": LABELS}}}
        document = {"state_dict": wrapped, "pytorch-lightning_version": "2.5.0", "hyper_parameters": said}
    else:
        document = state if kind == "bare" else {"state_dict": state, "optimizer": {}}
    torch.save(document, tmp_path / "a.pt")
    row = 0 if kind == "Lightning" else None  # the row of the label that both have, if the file names its labels
    with pytest.warns(UserWarning, match="the decoder is initialised anew"):
        warm = load_model(tmp_path / "a.pt", config=config(other), strict=False, backend="reference")
    head, old = warm.decoder.layers[0], model.decoder.layers[0]
    same = (head.weight == old.weight).flatten(1).all(1).tolist()
    assert same == [i in (row, 8) and row is not None for i in range(9)]
    weights = read_weights(tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(warm, weights, labels=other, strict=False, decoder="keep")
        assert torch.equal(head.weight, old.weight)
    with pytest.warns(UserWarning, match="as asked"):
        load_weights(warm, weights, labels=LABELS, strict=False, decoder="new")


def test_the_published_alphabet_keeps_its_decoder(tmp_path):
    """Shows that a file without labels is taken to have NVIDIA's published alphabet, which all of NVIDIA's files
    have."""
    model = Jasper(config(published_labels()), backend="reference")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="does not name its labels"):
        warm = load_model(tmp_path / "a.pt", config=model.config, strict=False, backend="reference")
    assert torch.equal(warm.decoder.layers[0].weight, model.decoder.layers[0].weight)


@pytest.mark.parametrize("wrap", [lambda n: f"_orig_mod.{n}", lambda n: f"module._orig_mod.{n}",
                                  lambda n: n.replace("encoder.", "encoder._orig_mod.", 1)])  # fmt: skip
def test_weights_of_compiled_models(tmp_path, wrap):
    model = trained_model()
    torch.save({wrap(name): tensor for name, tensor in model.state_dict().items()}, tmp_path / "a.pt")
    assert torch.equal(outputs(load_model(tmp_path / "a.pt", config=config(), backend="reference")), outputs(model))


def test_the_two_files_of_nemo_0(tmp_path):
    model = trained_model()
    encoder, decoder = tmp_path / "JasperEncoder-STEP-100.pt", tmp_path / "JasperDecoderForCTC-STEP-100.pt"
    entries = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder."):
            name = name.replace("encoder.layers", "encoder").replace(".conv.", ".mconv.")
            entries[name.removesuffix("weight") + "conv.weight" if tensor.dim() == 3 else name] = tensor
    torch.save(entries, encoder)
    with pytest.raises(CheckpointError, match=r"the JasperEncoder; put the other, JasperDecoderForCTC-STEP-100\.pt"):
        load_model(encoder, config=config(), backend="reference")
    head = model.decoder.layers[0]
    torch.save({"decoder_layers.0.weight": head.weight, "decoder_layers.0.bias": head.bias}, decoder)
    for path in (encoder, decoder):
        assert torch.equal(outputs(load_model(path, config=config(), backend="reference")), outputs(model))
    torch.save(entries, decoder)
    with pytest.raises(CheckpointError, match="does not hold the JasperDecoderForCTC"):
        load_model(encoder, config=config())


def test_a_warm_start_that_hears_other_features_says_so(tmp_path):
    nemo_archive(tmp_path / "m.nemo", trained_model())
    with pytest.warns(UserWarning, match="the convention 'nemo', but the configuration's follow 'reference'"):
        load_model(tmp_path / "m.nemo", config=config(), strict=False, backend="reference")
    same = JasperConfig.from_dict(config().to_dict() | {"input_train": {"filterbank_features": {"convention": "nemo"}}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path / "m.nemo", config=same, strict=False, backend="reference")


def test_a_frozen_encoder_stays_as_it_is():
    model = trained_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.freeze_encoder()
    model.train()
    features, lengths = torch.randn(2, 6, 32), torch.tensor([32, 20])
    model(features, lengths)[0].square().sum().backward()
    assert all((p.grad is None) == name.startswith("encoder.") for name, p in model.named_parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder.layers.0.weight", "decoder.layers.0.bias"}


def test_warm_start_from_something_else_is_an_error(tmp_path):
    torch.save({"state_dict": {"encoder.layers.0.other": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="none of its weights fits"):
        load_model(tmp_path / "a.pt", config=config(), strict=False)
