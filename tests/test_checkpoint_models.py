"""Loading of models: checkpoints of this project, of NVIDIA's Jasper and of NeMo, and warm starts."""

import warnings

import nemo_files
import pytest
import torch
from conftest import assert_raises
from test_checkpoint import BLOCKS, LABELS, config, outputs, own_document, same, trained_model

from jasper_fast.inference.recognizer import Recognizer
from jasper_fast.nn import loading
from jasper_fast.nn.checkpoint import CheckpointError, save
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.formats import published_labels, read_weights
from jasper_fast.nn.loading import load_model, load_weights
from jasper_fast.nn.model import Jasper
from jasper_fast.speech.features import LogMelFeatures, mel_filterbank

# --- models ------------------------------------------------------------------------------------------------------


def test_own_checkpoints_carry_their_configuration(tmp_path):
    model = trained_model()
    average = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save(tmp_path / "a.pt", own_document(model, ema_state_dict=average))
    again = load_model(tmp_path / "a.pt", backend="reference")
    assert not again.training and again.config == model.config
    assert torch.equal(outputs(again), outputs(model))
    doubled = load_model(tmp_path / "a.pt", ema=True, backend="reference")
    assert torch.equal(doubled.decoder.layers[0].bias, 2 * model.decoder.layers[0].bias)
    save(tmp_path / "b.pt", own_document(model, ema_state_dict=None))
    with pytest.raises(CheckpointError, match="no moving average"):
        load_model(tmp_path / "b.pt", ema=True)


def v1_entries(state):
    """Returns the state dict as NVIDIA's Jasper saved it in 2019: other names, each entry twice, no batch counters, and
    a buffer of the module that computes features."""
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
        ("reference v2", lambda state: {f"_orig_mod.{k}": v for k, v in state.items()}),
        ("reference v2", lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()}),
        ("reference v2", lambda state: {k.replace("encoder.", "encoder._orig_mod.", 1): v for k, v in state.items()}),
    ],
    ids=["v2", "v2 of several GPUs", "bare", "v1", "compiled", "compiled, of several GPUs", "a compiled encoder"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_reference_checkpoints(tmp_path, kind, document, zipped):
    model, path = trained_model(), tmp_path / "a.pt"
    torch.save(document(model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    assert read_weights(path).kind == kind
    assert torch.equal(outputs(load_model(path, config=config(), backend="reference")), outputs(model))


def nemo_archive(path, model, *, masked=True, compression="", encoder=None, front=None, more=None):
    defaults = {"separable": False, "dilation": [1], "dropout": 0.2, "stride": [1]}
    jasper = [defaults | {k.removesuffix("_size"): v for k, v in b.items()} for b in BLOCKS]
    jasper[0]["dropout"] = "${model.model_defaults.dropout}"
    document = {
        "model_defaults": {"dropout": 0.25},
        "labels": LABELS,
        "preprocessor": {"sample_rate": 16000, "features": 6, "n_fft": 512, "pad_to": 16, "window": "hann"}
        | (front or {}),
        "encoder": {"feat_in": 6, "activation": "relu", "conv_mask": masked, "jasper": jasper} | (encoder or {}),
        "decoder": {"feat_in": 12, "num_classes": len(LABELS), "vocabulary": "${labels}"},
    } | (more or {})
    features = {"preprocessor.featurizer.fb": torch.ones(1, 6, 9)}
    nemo_files.write(path, document, features | nemo_files.entries(model, masked), compression)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("compression", ["", "gz"])
def test_nemo(tmp_path, masked, compression):
    model = trained_model()
    nemo_archive(tmp_path / "m.nemo", model, masked=masked, compression=compression)
    loaded = load_model(tmp_path / "m.nemo", backend="reference")
    assert same(loaded.state_dict(), model.state_dict())
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


CITRINET = [{"filters": 8, "repeat": 1, "kernel": [5], "separable": True, "se": True}]
FUTURE = [{"filters": 8, "repeat": 1, "kernel": [5], "future_context": 0}]


@pytest.mark.parametrize(
    ("how", "share", "message"),
    [
        ({"more": {"tokenizer": {"dir": "x", "type": "bpe"}}}, 1, r"m\.nemo: .*tokenizer"),
        ({"encoder": {"jasper": CITRINET}}, 1, r"block 0 .*se=True, so it is neither a Jasper nor a QuartzNet"),
        ({"encoder": {"residual_mode": "max"}}, 1, r"block 0 .*residual_mode=max, so it is neither"),
        ({"encoder": {"jasper": FUTURE}}, 1, r"block 0 .*future_context=0, so it is neither"),
        ({"more": {"labels": "${labels}"}}, 1, r"its model_config\.yaml does not describe a Jasper \(at maximum rec"),
        ({"compression": "gz"}, 2, r"m\.nemo is not a complete NeMo archive"),
    ],
    ids=["pieces of words", "Citrinet", "maximum of panes", "asymmetric padding", "a circle", "cut short"],
)
def test_nemo_archives_that_are_no_jasper(tmp_path, how, share, message):
    path = tmp_path / "m.nemo"
    nemo_archive(path, trained_model(), **how)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // share])
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_a_file_that_does_not_fit_lists_what_differs(tmp_path):
    torch.save({"state_dict": trained_model().state_dict()}, tmp_path / "a.pt")
    wide = config().to_dict()
    wide["jasper"]["encoder"]["blocks"][1]["filters"] = 10
    said = r"does not fit the model; \d+ entries differ: encoder\.layers\."
    assert_raises([
        (lambda: load_model(tmp_path / "a.pt", config=JasperConfig.from_dict(wide)), said + r"1\.conv\.0"),
        (lambda: load_model(tmp_path / "a.pt"), said),  # by default a Jasper 10x5
    ], CheckpointError)  # fmt: skip


@pytest.mark.parametrize("labels", [list(" abcdefghij"), list(" hijklmn")], ids=["more", "as many, but others"])
def test_warm_start_with_other_labels(tmp_path, labels):
    model = trained_model()
    save(tmp_path / "a.pt", own_document(model))
    with pytest.raises(CheckpointError, match="strict=False"):
        load_model(tmp_path / "a.pt", config=config(labels), backend="reference")
    with pytest.warns(UserWarning, match=r"anew for other labels, except that its rows for the blank and for \d+ of"):
        warm = load_model(tmp_path / "a.pt", config=config(labels), strict=False, backend="reference")
    assert warm.decoder.layers[0].weight.shape[0] == len(labels) + 1
    for name, tensor in warm.state_dict().items():
        assert name.startswith("decoder.") or torch.equal(tensor, model.state_dict()[name]), name
    head, old = warm.decoder.layers[0], model.decoder.layers[0]
    same_label = [[a == b for b in (*LABELS, "blank")] for a in (*labels, "blank")]  # the blank is the last row in both
    equal = (head.weight[:, None] == old.weight).flatten(2)
    assert equal.all(2).tolist() == equal.any(2).tolist() == same_label
    assert (head.bias[:, None] == old.bias).tolist() == same_label


@pytest.mark.parametrize("labels", [LABELS, list(" abcdefh")], ids=["the same labels", "other labels"])
def test_warm_start_of_a_decoder_with_another_width(tmp_path, labels):
    save(tmp_path / "a.pt", own_document(trained_model()))
    document = config(labels).to_dict()
    document["jasper"]["encoder"]["blocks"][-1]["filters"] = document["jasper"]["decoder"]["in_feats"] = 16
    with pytest.warns(
        UserWarning, match=r"the decoder is initialised anew \(\(8, 12, 1\) instead of|anew \(\(9, 12, 1"
    ):
        load_model(tmp_path / "a.pt", config=JasperConfig.from_dict(document), strict=False, backend="reference")


def test_labels_of_a_warm_start_that_start_from_others(tmp_path):
    model, labels = trained_model(), [*LABELS[:3], "ä", "="]
    save(tmp_path / "a.pt", own_document(model))
    weights, warm = read_weights(tmp_path / "a.pt"), Jasper(config(labels), backend="reference")

    def start(*pairs, decoder="auto"):
        load_weights(
            warm, weights, labels=labels, strict=False, decoder=decoder, like=dict(map(loading.label_pair, pairs))
        )

    with pytest.warns(UserWarning, match="for 5 of the 5 labels are copied"):
        start(f"ä={LABELS[1]}", f"=={LABELS[5]}")
    head, old = warm.decoder.layers[0], model.decoder.layers[0]
    for tensor, source in ((head.weight, old.weight), (head.bias, old.bias)):
        assert torch.equal(tensor, source[[0, 1, 2, 1, 5, len(LABELS)]])
    assert_raises([
        (lambda: start("a=é"), "no label 'é'"),
        (lambda: start("é=a"), "'é'.*not one of the model's"),
        (lambda: start("é"), "a new label and an old one"),
        (lambda: start("ä=a", decoder="keep"), "need the decoder 'auto', not 'keep'"),
        (lambda: start("ä=a", decoder="new"), "need the decoder 'auto', not 'new'"),
    ], CheckpointError)  # fmt: skip


@pytest.mark.parametrize("kind", ["NVIDIA's", "bare", "Lightning", "Lightning, labels unsaid"])
def test_warm_start_from_a_file_that_may_not_say_its_labels(tmp_path, kind):
    """The decoder gets no rows of other labels. Both alphabets have the same size, so the shapes do not show that they
    differ."""
    model, other = trained_model(), list(" hijklmn")
    state = model.state_dict()
    if kind.startswith("Lightning"):
        wrapped = {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}
        said = {} if "unsaid" in kind else {"cfg": {"decoder": {"vocabulary": LABELS}}}
        document = {"state_dict": wrapped, "pytorch-lightning_version": "2.5.0", "hyper_parameters": said}
    else:
        document = state if kind == "bare" else {"state_dict": state, "optimizer": {}}
    torch.save(document, tmp_path / "a.pt")
    # The space (row 0) is the only label in both alphabets. It and the blank are copied if the file names its labels.
    kept = (0, 8) if kind == "Lightning" else ()
    with pytest.warns(UserWarning, match="the decoder is initialised anew"):
        warm = load_model(tmp_path / "a.pt", config=config(other), strict=False, backend="reference")
    head, old = warm.decoder.layers[0], model.decoder.layers[0]
    assert (head.weight == old.weight).flatten(1).all(1).tolist() == [i in kept for i in range(9)]
    weights = read_weights(tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(warm, weights, labels=other, strict=False, decoder="keep")
        assert torch.equal(head.weight, old.weight)
    with pytest.warns(UserWarning, match="because of decoder='new'"):
        load_weights(warm, weights, labels=LABELS, strict=False, decoder="new")


def test_when_a_file_without_labels_is_assumed_to_have_the_published_ones(tmp_path):
    """For a file without labels the published ones are assumed if the model has them, or if `like` names old labels for
    new ones."""
    model, labels = Jasper(config(published_labels()), backend="reference"), [" ", "b", "ä"]
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="does not name its labels"):
        warm = load_model(tmp_path / "a.pt", config=model.config, strict=False, backend="reference")
    assert torch.equal(warm.decoder.layers[0].weight, model.decoder.layers[0].weight)
    warm = Jasper(config(labels), backend="reference")
    with pytest.warns(UserWarning, match="for 3 of the 3 labels are copied"):
        load_weights(warm, read_weights(tmp_path / "a.pt"), labels=labels, strict=False, like={"ä": "a"})
    assert torch.equal(warm.decoder.layers[0].weight, model.decoder.layers[0].weight[[0, 2, 1, 28]])


def test_the_two_files_of_nemo_0(tmp_path):
    model = trained_model()
    encoder, decoder = nemo_files.write_halves(tmp_path, model)
    for path in (encoder, decoder):
        assert torch.equal(outputs(load_model(path, config=config(), backend="reference")), outputs(model))
    decoder.write_bytes(encoder.read_bytes())
    with pytest.raises(CheckpointError, match="does not hold the JasperDecoderForCTC"):
        load_model(encoder, config=config())
    decoder.unlink()
    with pytest.raises(CheckpointError, match=r"the JasperEncoder; put the other, JasperDecoderForCTC-STEP-100\.pt"):
        load_model(encoder, config=config())


def test_a_warm_start_that_hears_other_features_says_so(tmp_path):
    nemo_archive(tmp_path / "m.nemo", trained_model())
    with pytest.warns(UserWarning, match="the convention 'nemo', but the model's configuration says 'reference'"):
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
    model(torch.randn(2, 6, 32), torch.tensor([32, 20]))[0].square().sum().backward()
    assert all((p.grad is None) == name.startswith("encoder.") for name, p in model.named_parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder.layers.0.weight", "decoder.layers.0.bias"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"state_dict": {"encoder.layers.0.other": torch.ones(2)}}, "none of its weights fits"),
        (own_document(trained_model(), config={"input_train": [1]}), r"a\.pt: its configuration is not a Jasper's"),
    ],
    ids=["another model", "another configuration"],
)
def test_warm_start_from_something_else_is_an_error(tmp_path, document, message):
    torch.save(document, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a.pt", config=config(), strict=False, backend="reference")
