"""Whole runs of train.py on a corpus of beeps."""

import re
import shutil
from pathlib import Path
from unittest import mock

import corpora
import pytest
import torch
import worlds
from speech import CONFIG, corpus_of_beeps, one_thread, records, train_arguments, training_in_this_process  # noqa: F401
from standins import spied

from jasper_fast import ops, train
from jasper_fast.data import batches
from jasper_fast.nn import checkpoint, loading
from jasper_fast.nn.config import ConfigError
from jasper_fast.training.runs import Ranks, RunError
from jasper_fast.training.state import TrainingState


def changed(config: Path, old: str, new: str) -> Path:
    """Copies a configuration with `old` replaced by `new`, and returns the copy's path."""
    made = config.with_name("changed.yaml")
    made.write_text(config.read_text().replace(old, new))
    return made


NOTHING = dict.fromkeys(("config", "train", "val"), Path("none.yaml"))


@pytest.mark.parametrize("asked", [True, None])
def test_cudnn_chooses_by_the_clock_where_it_is_asked_to(asked, train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not asked)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        train_here(NOTHING, tmp_path, cudnn_benchmark=asked)
    assert torch.backends.cudnn.benchmark == bool(asked)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cudnn_benchmark": True, "deterministic": True}, "drop one of them"),
        ({"compile": True, "cuda_graphs": True}, "--compile and --cuda-graphs cannot be combined"),
        ({"val_manifests": None, "reload_best": True}, "--reload-best needs --val-manifests"),
        ({"reload_best": -1}, "--reload-best must be at least 0, not -1"),
        ({"lr": "nan"}, "--lr must be at least 0, not nan"),
        ({"clip_norm": -1}, "--clip-norm must be at least 0"),
        ({"max_bad_steps": 0}, "--max-bad-steps must be at least 1"),
        ({"max_minutes": 0}, "--max-minutes must be above 0"),
        ({"ema": 1}, "--ema must be at least 0 and below 1"),
        ({"lr_gamma": 0}, "--lr-gamma must be above 0"),
        ({"betas": "0.9 1"}, "--betas must be at least 0 and below 1"),
        ({"init_ema": True}, "--init-ema, --init-map and --init-decoder need --init-from"),
        ({"lr_by_clock": True}, "--lr-by-clock needs --max-minutes"),
        ({"grad_accumulation": 0}, "--grad-accumulation must be at least 1"),
        ({"seed": 2**64}, f"--seed must be below 2**63, not {2**64}"),
        ({"warmup_steps": None, "warmup_epochs": "inf"}, "--warmup-epochs must be below 2**63, not inf"),
        ({"hold_epochs": "nan"}, "--hold-epochs must be at least 0, not nan"),
    ],
)
def test_options_that_do_not_go_together(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.arguments(" ".join(train_arguments(NOTHING, tmp_path, **options)).split())
    assert said in capsys.readouterr().err


def test_training_from_manifest_to_checkpoint(train_here, paths, tmp_path):
    said = train_here(paths, tmp_path, epochs=6, ema=0.5, batch_size=None, batch_seconds=4, milestones=2)
    assert "training: 16 utterances" in said and "done: step" in said
    (first, *_, last), judged = records(tmp_path, "train"), records(tmp_path, "val_ema")
    assert last["loss"] < first["loss"]
    assert {"loss", "wer", "lr", "grad_norm", "utterances_per_s", "epoch"} <= last.keys()
    best = checkpoint.load(tmp_path / "best.pt")
    at_best = next(r for r in judged if r["step"] == best["step"])
    assert at_best["wer"] == best["best_wer"] == min(r["wer"] for r in judged), "best.pt must have its own WER"
    assert (tmp_path / "milestone_epoch_0002.pt").exists()
    assert len(list(tmp_path.glob("step_*.pt"))) == 2
    assert list((tmp_path / "tensorboard").iterdir())
    assert loading.load_model(tmp_path / "best.pt", ema=True).config.labels == tuple(CONFIG["labels"])
    with pytest.raises(RunError, match="add --resume or choose another"):
        train_here(paths, tmp_path, epochs=6)
    assert "done: step" in train_here(paths, tmp_path, epochs=6, ema=0.5, resume=True)


def test_files_that_cannot_be_read_are_reported_and_left_out(train_here, paths, tmp_path):
    lines = corpora.read_lines(paths["train"])
    lines[3]["audio_filepath"], lines[5]["duration"], lines[6]["text"] = "gone.wav", 100.0, "?!"
    strict = changed(paths["config"], "sample_rate: 16000", "sample_rate: 16000\n    max_duration: 16.7")
    manifest = corpora.write_lines(paths["train"].with_name("flawed.jsonl"), lines)
    said = train_here({**paths, "train": manifest, "config": strict}, tmp_path, steps=4, val_manifests=None)
    assert "training: 14 utterances" in said and "1 empty_text" in said and "1 too_long" in said
    assert "1 unreadable" in said and "gone.wav: no such file" in said
    assert "done: step 4" in said


def test_a_nan_loss_is_named_and_training_goes_on(train_here, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "collate", batches.collate)  # so that what `nan_in` does is undone
    worlds.nan_in(None, 0, "train7.wav")
    said = train_here(paths, tmp_path, epochs=2, val_manifests=None)
    assert "step skipped: " in said and "train7.wav: its features are not finite" in said
    skipped = records(tmp_path, "skipped")
    assert len(skipped) == 2 and all("train7.wav" in name for r in skipped for name in r["names"])
    assert records(tmp_path, "train")[-1]["bad_losses"] == 2
    state = checkpoint.load(next(tmp_path.glob("step_*8.pt")))
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values())


@pytest.fixture
def source(train_here, paths, tmp_path):
    """Returns the checkpoint of a run of one step."""
    train_here(paths, tmp_path / "a", steps=1, val_manifests=None)
    return tmp_path / "a" / "step_00000001.pt"


def test_fine_tuning_with_other_labels(train_here, paths, source, tmp_path):
    other = changed(paths["config"], "- d\n", "- d\n- e\n")
    with pytest.warns(UserWarning, match="the decoder is initialised anew"):
        train_here({**paths, "config": other}, tmp_path / "b", steps=1, val_manifests=None, init_from=source)
    assert len(checkpoint.load(next((tmp_path / "b").glob("step_*.pt")))["labels"]) == 5


def test_a_frozen_encoder_is_that_of_the_file(train_here, paths, source, tmp_path):
    train_here(
        paths, tmp_path / "b", steps=2, val_manifests=None, init_from=source, freeze_encoder=True, init_decoder="keep"
    )
    before, after = (checkpoint.load(p)["state_dict"] for p in (source, max((tmp_path / "b").glob("step_*.pt"))))
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("encoder."), name


def test_the_form_of_the_panes_reaches_the_model_and_is_recorded(train_here, paths, tmp_path, monkeypatch):
    calls = spied(monkeypatch, ops, "gram")
    train_here(paths, tmp_path, steps=1, val_manifests=None, panes="gram")
    assert calls and records(tmp_path, "start")[0]["arguments"]["panes"] == "gram"
    calls.clear()
    said = train_here(paths, tmp_path, steps=2, val_manifests=None, panes="plain", resume=True)
    assert "note: --panes was gram, now it is plain" in said and "done: step 2" in said and not calls
    assert checkpoint.load(tmp_path / "step_00000002.pt")["arguments"]["panes"] == "plain"


def test_cuda_graphs_without_a_gpu_are_plain_steps(train_here, paths, tmp_path):
    said = train_here(paths, tmp_path, steps=2, val_manifests=None, cuda_graphs=True)
    assert "no CUDA graphs: CUDA graphs need a GPU, but the model is on cpu" in said and "done: step 2" in said


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_with_the_same_losses_and_weights(paths, tmp_path):
    """torchrun starts the whole run, and `worlds.world` the resumed one. The two processes of a run write one log."""
    settings = {"grad_accumulation": 2, "batch_size": 2, "ema": 0.9, "val_every": 4, "steps": 4, "save_every": 2}
    worlds.torchrun(corpora.ROOT / "train.py", train_arguments(paths, tmp_path / "whole", **settings))
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole" / "step_00000002.pt", tmp_path / "part")
    worlds.world(2, train_arguments(paths, tmp_path / "part", **settings, resume=True), tmp_path / "w")
    whole, part = (records(tmp_path / name, "train", "val_live", "val_ema") for name in ("whole", "part"))
    assert [r["step"] for r in whole] == [1, 2, 3, 4, 4, 4]
    assert [r["loss"] for r in part] == [r["loss"] for r in whole if r["step"] > 2]
    ends = [checkpoint.load(tmp_path / name / "step_00000004.pt") for name in ("whole", "part")]
    assert len(ends[0]["rng"]) == 2
    torch.testing.assert_close(ends[0]["state_dict"], ends[1]["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(train_here, paths, tmp_path, amp):
    train_here(paths, tmp_path, steps=12, val_manifests=None, amp=amp)
    last = records(tmp_path, "train")[-1]
    assert last["loss"] > 0 and last["bad_losses"] == 0
    scaler = checkpoint.load(tmp_path / "step_00000012.pt")["scaler"]
    if amp == "fp16":  # the scale starts at 2**16, and every overflow halves it
        assert scaler["scale"] == 2.0 ** (16 - last["overflows"])
    else:
        assert scaler == {} and last["overflows"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("n_filt: 32", "n_filt: 40"), "input_train makes 40 features, but the encoder takes 32"),
        (("n_filt: 32", "n_filter: 32"), "n_filter is unknown"),
        (("freq_masks", "frequency_masks"), "frequency_masks"),
        (("sample_rate: 16000", "sample_rate: 16000\n    max_duration: 0.2"), "training data: none of the"),
    ],
)
def test_settings_that_cannot_be_used_are_named(train_here, paths, tmp_path, change, message):
    with pytest.raises(RunError, match=message):
        train_here({**paths, "config": changed(paths["config"], *change)}, tmp_path)


def test_the_schedule_can_follow_the_clock(train_here, paths, tmp_path, monkeypatch):
    """Halfway through --max-minutes, the learning rate is that of the schedule's middle."""
    monkeypatch.setattr(TrainingState, "minutes", property(lambda state: 0.5 + state.step / 100))
    schedule = {"lr_policy": "polynomial", "lr_power": 1, "warmup_steps": 0, "lr": 0.1, "steps": 20}
    train_here(paths, tmp_path, max_minutes=1, lr_by_clock=True, val_manifests=None, **schedule)
    rates = [r["lr"] for r in records(tmp_path, "train")]
    assert rates[0] == pytest.approx(0.05) and rates == sorted(rates, reverse=True) and len(rates) == 20


def test_command_line_errors_are_one_line(paths, tmp_path, capsys):
    assert train.command(train_arguments({**paths, "train": tmp_path / "none.jsonl"}, tmp_path)) == 1
    assert re.fullmatch(r"error: .*none\.jsonl: cannot read the manifest.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("last.pt does not fit into memory"), r"error: last.pt does not fit into memory\n"),
        (
            RuntimeError("DefaultCPUAllocator: no memory"),
            r"error: DefaultCPUAllocator: no memory\nLower --batch-size .*",
        ),
        (torch.OutOfMemoryError("no memory"), r"error: no memory\nLower --batch-size .*"),
    ],
)
def test_a_lack_of_memory_is_no_traceback(error, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "main", mock.Mock(side_effect=error))
    assert train.command(train_arguments(NOTHING, tmp_path)) == 1
    assert re.fullmatch(said, capsys.readouterr().err, re.DOTALL)


def test_a_run_whose_batches_do_not_fit_leaves_no_checkpoint(train_here, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "on_gpu", True)
    monkeypatch.setattr(train, "scan_memory", mock.Mock(side_effect=RunError("does not fit")))
    with pytest.raises(RunError, match="does not fit"):
        train_here(paths, tmp_path / "run", steps=2)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_scans_whole_batches(train_here, paths, tmp_path, monkeypatch):
    """Four utterances are left in the first epoch, but the next epoch has batches of eight."""
    train_here(paths, tmp_path, steps=3, val_manifests=None)
    scan = mock.Mock(side_effect=RunError("does not fit"))
    monkeypatch.setattr(Ranks, "on_gpu", True)
    monkeypatch.setattr(train, "scan_memory", scan)
    with pytest.raises(RunError, match="does not fit"):
        train_here(paths, tmp_path, steps=5, batch_size=8, resume=True)
    shapes = scan.call_args.args[2]
    assert shapes[0][0] == 8
