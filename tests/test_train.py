"""The parts of the training loop, and train.py itself on a corpus of beeps."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speech import CONFIG, corpus_of_beeps, one_thread, train_arguments  # noqa: F401
from speech import run_train as run
from standins import spied
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast import ops
from jasper_fast.data.batches import BatchSampler, collate, load_batches
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.nn import checkpoint, loading
from jasper_fast.nn.architecture import out_lengths
from jasper_fast.nn.config import ConfigError, JasperConfig
from jasper_fast.nn.eager import EagerJasper
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.speech.text import Vocabulary
from jasper_fast.training.ema import EMA
from jasper_fast.training.meter import Meter
from jasper_fast.training.optim import NovoGrad
from jasper_fast.training.randomness import own_randomness
from jasper_fast.training.runs import Ranks, RunError, RunLog, StopRequest, read_log
from jasper_fast.training.state import TrainingState
from jasper_fast.training.step import BufferGuard, Frontend, StepResult, batch_loss, ctc_loss, train_step
from jasper_fast.training.validate import validate

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class Model(EagerJasper):
    """The eager Jasper, so that these tests depend on the training code alone."""

    def __init__(self):
        super().__init__(JasperConfig.from_dict(CONFIG))

    def out_lengths(self, lengths):
        return out_lengths(self.config, lengths)


@pytest.fixture
def dataset(paths):
    return SpeechDataset.from_manifests([paths["train"]], Vocabulary(CONFIG["labels"]))


def a_batch(dataset, items=range(4)):
    return collate([dataset[i] for i in items])


def front():
    return Frontend(LogMelFeatures.from_config(CONFIG["input_val"]["filterbank_features"]))


def rig(optimizer="novograd", amp="off"):
    model = Model()
    if optimizer == "novograd":
        chosen = NovoGrad(model.parameters(), lr=0.01, weight_decay=1e-3)
    else:
        chosen = torch.optim.AdamW(model.parameters(), lr=0.003, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=amp == "fp16")
    return model, chosen, scaler, BufferGuard(model)


# --- loss --------------------------------------------------------------------------------------------------------


def test_ctc_loss_is_the_negative_log_likelihood_of_each_utterance():
    log_probs = torch.randn(2, 3, 3).log_softmax(-1)
    losses = ctc_loss(log_probs, torch.tensor([3, 2]), torch.tensor([[0, 1], [1, 0]]), torch.tensor([2, 1]))
    p = log_probs.exp()
    # all alignments of the labels 0, 1 with three frames
    paths_01 = [(0, 0, 1), (0, 1, 1), (2, 0, 1), (0, 2, 1), (0, 1, 2)]
    first = sum(p[0, 0, a] * p[0, 1, b] * p[0, 2, c] for a, b, c in paths_01)
    # all alignments of the label 1 with two frames
    second = sum(p[1, 0, a] * p[1, 1, b] for a, b in [(1, 1), (1, 2), (2, 1)])
    torch.testing.assert_close(losses, -torch.stack([first, second]).log())
    low = ctc_loss(log_probs.bfloat16(), torch.tensor([3, 2]), torch.tensor([[0, 1], [1, 0]]), torch.tensor([2, 1]))
    assert low.dtype == torch.float32


def test_one_bad_utterance_makes_the_whole_gradient_nan():
    log_probs = torch.randn(2, 4, 3, requires_grad=True)
    targets, short = torch.tensor([[0, 0, 0], [0, 1, 0]]), torch.tensor([4, 4])  # 0 0 0 needs five frames
    losses = ctc_loss(log_probs.log_softmax(-1), short, targets, torch.tensor([3, 3]))
    assert losses[0] == math.inf and torch.isfinite(losses[1])
    batch_loss(losses).backward()
    assert torch.isnan(log_probs.grad).all()
    good = torch.tensor([1.0, 2.0])
    assert batch_loss(good) == 1.5


# --- one step ----------------------------------------------------------------------------------------------------


def everything(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return [t.clone() for t in model.state_dict().values()], [
        v if isinstance(v, torch.Tensor) else torch.tensor(v) for s in state.values() for v in s.values()
    ]


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("optimizer", ["novograd", "adamw"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_batch_changes_nothing_and_is_named(dataset, optimizer, amp, poison):
    model, chosen, scaler, guard = rig(optimizer, amp)
    step = lambda batches: train_step(model, front(), batches, chosen, scaler, guard, device=CPU)  # noqa: E731
    meter = Meter(max_bad=3)
    meter.add(step([a_batch(dataset)]))
    before = everything(model, chosen)
    bad = a_batch(dataset)
    bad.audio[2, 100] = poison
    meter.add(step([a_batch(dataset), bad]))
    after = everything(model, chosen)
    for ours, theirs in zip(before, after, strict=True):
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert meter.read() == [f"{bad.names[2]}: its features are not finite"]
    assert (meter.bad_losses, meter.overflows, meter.bad_in_a_row) == (1, 0, 1)
    assert math.isfinite(meter.figures()["loss"])
    silent = a_batch(dataset)
    silent.audio_lengths.zero_()  # all losses are infinite, with gradients of 0
    assert math.isnan(step([silent]).grad_norm)
    for ours, theirs in zip(before, everything(model, chosen), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    meter.add(step([a_batch(dataset)]))
    assert meter.read() == [] and meter.bad_in_a_row == 0
    assert not any(torch.equal(a, b) for a, b in zip(before[0][:1], everything(model, chosen)[0][:1], strict=True))


class NeverWait(TorchDispatchMode):
    """Fails on any op that reads a value of a tensor, because on a GPU the host would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_step_never_waits_for_the_device(dataset, amp):
    model, chosen, scaler, guard = rig("novograd", amp)
    ema, features, batch = EMA(model), front(), a_batch(dataset)
    with pytest.raises(AssertionError, match="read from the device"), NeverWait():
        batch.audio.sum().item()
    with NeverWait():
        for _ in range(2):
            train_step(model, features, [batch, batch], chosen, scaler, guard, device=CPU, clip_norm=1.0)
            ema.update(model)


def test_accumulated_gradients_are_the_mean_over_micro_batches(dataset):
    model, _, scaler, _ = rig()
    model.eval()  # frozen statistics, because otherwise the result depends on the split into batches
    gradients = []
    for batches in ([a_batch(dataset)], [a_batch(dataset, [0, 1]), a_batch(dataset, [2, 3])]):
        twin = copy.deepcopy(model)
        optimizer = NovoGrad(twin.parameters(), lr=0.0)
        features = front().eval()
        result = train_step(twin, features, batches, optimizer, scaler, BufferGuard(twin), device=CPU)
        gradients.append([p.grad for p in twin.parameters()])
        total = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
        torch.testing.assert_close(result.grad_norm, total)
        assert result.names == a_batch(dataset).names
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_the_gradient_norm_is_clipped(dataset):
    model, chosen, scaler, guard = rig("adamw")
    result = train_step(model, front(), [a_batch(dataset)], chosen, scaler, guard, device=CPU, clip_norm=0.5)
    assert result.grad_norm > 0.5  # the reported norm is the one before clipping
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", ["novograd", "adamw"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_model_learns_one_batch(dataset, optimizer, amp):
    model, chosen, scaler, guard = rig(optimizer)
    for group in chosen.param_groups:
        group["lr"] = 0.02 if optimizer == "novograd" else 0.005
    losses = []
    batch, features = a_batch(dataset, range(2)), front()
    for _ in range(15):
        r = train_step(model, features, [batch], chosen, scaler, guard, device=CPU, amp_dtype=amp)
        losses.append(r.losses[0].mean().item())
    assert losses[-1] < 0.5 * losses[0], losses


# --- figures, validation -----------------------------------------------------------------------------------------


def step_result(losses, norm=1.0):
    names = [f"u{i}" for i in range(len(losses))]
    nothing = torch.zeros(0)
    return StepResult(
        [torch.tensor(losses)], [torch.tensor([True] * len(losses))], names, torch.tensor(norm), nothing, nothing, []
    )


def test_meter_counts_names_and_gives_up():
    meter = Meter(max_bad=2)
    meter.add(step_result([1.0, 3.0]))
    meter.add(step_result([math.nan, 3.0], math.nan))
    assert meter.read() == ["u0: its loss is nan"]
    meter.add(step_result([5.0, 7.0]))
    meter.add(step_result([5.0], math.inf))
    assert meter.read() == []
    figures = meter.figures()
    assert figures["loss"] == 4.0
    assert (figures["bad_losses"], figures["overflows"]) == (1, 1)
    meter.add(step_result([math.inf, 1.0], math.nan))
    with pytest.raises(RunError, match=r"2 steps in a row .*u0: its loss is inf.*lower the learning rate"):
        meter.read()


def test_validation_gives_error_rates_and_names_bad_utterances(dataset):
    model, features = Model(), front()
    plan = BatchSampler(dataset.durations, batch_size=4, shuffle=False)
    before = [t.clone() for t in model.state_dict().values()]

    def run(batches):
        return validate(model, features, batches, dataset.vocabulary, device=CPU)

    result = run(load_batches(dataset, plan))
    assert result.utterances == len(dataset) and not result.bad
    assert model.training and features.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    model.eval()
    expected = []
    for batch in load_batches(dataset, plan):
        f, lengths = features.eval().features(batch.audio, batch.audio_lengths)
        log_probs, lengths = model(f, lengths)
        expected.append(ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths))
    assert result.loss == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)
    batches = list(load_batches(dataset, plan))
    batches[0].audio[1, 50] = math.nan
    poisoned = run(batches)
    assert poisoned.bad == [f"{batches[0].names[1]}: its loss is nan"]
    assert math.isfinite(poisoned.loss)
    with pytest.raises(RunError, match="no usable utterance"):
        run([])


def test_ema_weights_are_what_validation_sees(dataset):
    model = Model()
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.decoder.layers[0].bias[-1] = 1e4  # with the live weights all output is blank
    plan = BatchSampler(dataset.durations, batch_size=4, shuffle=False)
    live = validate(model, front(), load_batches(dataset, plan), dataset.vocabulary, device=CPU)
    with ema.applied_to(model):
        average = validate(model, front(), load_batches(dataset, plan), dataset.vocabulary, device=CPU)
    assert live.loss > 1e4 > average.loss


def test_own_randomness_leaves_no_trace():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    draws = []
    for _ in range(2):
        with own_randomness(7):
            draws.append(torch.rand(2))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(torch.rand(4), expected)


# --- runs --------------------------------------------------------------------------------------------------------


def test_log_continues_at_a_step(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, "train", loss=float(step) if step < 3 else math.nan)
    log.close()
    assert read_log(tmp_path / "log.jsonl")[-1] == {"step": 3, "kind": "train", "loss": None}
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "ki')  # as a kill leaves it
    log = RunLog(tmp_path, step=2)
    log.write(3, "train", loss=0.5)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path / "log.jsonl")] == [(1, 1.0), (2, 2.0), (3, 0.5)]
    assert list((tmp_path / "tensorboard").iterdir())
    (tmp_path / "log.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(RunError, match="line 1 is not JSON"):
        read_log(tmp_path / "log.jsonl")


def test_a_second_signal_stops_at_once():
    # Python ignores SIGINT if a shell runs the tests in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(RunError, match="--device cpu"):
        Ranks.start("cuda")


# --- train.py ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_train(capsys):
    """Returns a function that runs train.py in this process and returns what it prints to stderr."""
    return lambda arguments: run(arguments) or capsys.readouterr().err


NOTHING = dict.fromkeys(("config", "train", "val"), Path("none.yaml"))


@pytest.mark.parametrize("asked", [True, None])
def test_cudnn_chooses_by_the_clock_where_it_is_asked_to(asked, run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not asked)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        run_train(train_arguments(NOTHING, tmp_path, cudnn_benchmark=asked))
    assert torch.backends.cudnn.benchmark == bool(asked)


def test_the_clock_and_bit_equal_repeats_do_not_go_together(run_train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_train(train_arguments(NOTHING, tmp_path, cudnn_benchmark=True, deterministic=True))
    assert "drop one of them" in capsys.readouterr().err


def test_training_from_manifest_to_checkpoint(run_train, paths, tmp_path):
    said = run_train(
        train_arguments(paths, tmp_path, epochs=6, ema=0.5, batch_size=None, batch_seconds=4, milestones=2)
    )
    assert "training: 16 utterances" in said and "done: step" in said
    records = read_log(tmp_path / "log.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"]
    assert {"loss", "wer", "lr", "grad_norm", "utterances_per_s", "epoch"} <= train[-1].keys()
    best = checkpoint.load(tmp_path / "best.pt")
    assert best["best_wer"] == min(r["wer"] for r in records if r["kind"] == "val_ema")
    at_best = next(r for r in records if r["kind"] == "val_ema" and r["step"] == best["step"])
    assert at_best["wer"] == best["best_wer"], "the best checkpoint must carry its own WER"
    assert (tmp_path / "milestone_epoch_0002.pt").exists()
    assert len(list(tmp_path.glob("step_*.pt"))) == 2
    assert list((tmp_path / "tensorboard").iterdir())
    model = loading.load_model(tmp_path / "best.pt", ema=True)
    assert model.config.labels == tuple(CONFIG["labels"])
    with pytest.raises(RunError, match="add --resume or choose another"):
        run_train(train_arguments(paths, tmp_path, epochs=6))
    assert "done: step" in run_train([*train_arguments(paths, tmp_path, epochs=6, ema=0.5), "--resume"])


def test_files_that_cannot_be_read_are_reported_and_left_out(run_train, paths, tmp_path):
    lines = [json.loads(line) for line in paths["train"].read_text().splitlines()]
    lines[3]["audio_filepath"] = "gone.wav"
    lines[5]["duration"] = 100.0
    lines[6]["text"] = "?!"
    strict = paths["config"].with_name("strict.yaml")
    strict.write_text(
        paths["config"].read_text().replace("sample_rate: 16000", "sample_rate: 16000\n    max_duration: 16.7")
    )
    manifest = paths["train"].with_name("flawed.jsonl")
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = run_train(
        train_arguments({**paths, "train": manifest, "config": strict}, tmp_path, steps=4, val_manifests=None)
    )
    assert "training: 14 utterances" in said and "1 empty_text" in said and "1 too_long" in said
    assert "1 unreadable" in said and "gone.wav: no such file" in said
    assert "done: step 4" in said


def test_a_nan_loss_is_named_and_training_goes_on(run_train, paths, tmp_path, monkeypatch):
    def with_nan(items):
        batch = collate(items)
        for i, name in enumerate(batch.names):
            if name.endswith("train7.wav"):
                batch.audio[i] = math.nan
        return batch

    monkeypatch.setattr("jasper_fast.data.batches.collate", with_nan)
    said = run_train(train_arguments(paths, tmp_path, epochs=2, val_manifests=None))
    assert "step skipped: " in said and "train7.wav: its features are not finite" in said
    records = read_log(tmp_path / "log.jsonl")
    skipped = [r for r in records if r["kind"] == "skipped"]
    assert len(skipped) == 2 and all("train7.wav" in name for r in skipped for name in r["names"])
    assert next(r for r in reversed(records) if r["kind"] == "train")["bad_losses"] == 2
    state = checkpoint.load(next(tmp_path.glob("step_*8.pt")))
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values())


def test_fine_tuning_with_other_labels(run_train, paths, tmp_path):
    run_train(train_arguments(paths, tmp_path / "a", steps=1, val_manifests=None))
    text = paths["config"].read_text().replace("- d\n", "- d\n- e\n")
    other = paths["config"].with_name("other.yaml")
    other.write_text(text)
    source = next((tmp_path / "a").glob("step_*.pt"))
    with pytest.warns(UserWarning, match="the decoder is initialised anew"):
        run_train(
            train_arguments({**paths, "config": other}, tmp_path / "b", steps=1, val_manifests=None, init_from=source)
        )
    assert len(checkpoint.load(next((tmp_path / "b").glob("step_*.pt")))["labels"]) == 5


def test_a_frozen_encoder_is_that_of_the_file(run_train, paths, tmp_path):
    run_train(train_arguments(paths, tmp_path / "a", steps=1, val_manifests=None))
    source = next((tmp_path / "a").glob("step_*.pt"))
    more = {"init_from": source, "freeze_encoder": True, "init_decoder": "keep"}
    run_train(train_arguments(paths, tmp_path / "b", steps=2, val_manifests=None, **more))
    before, after = (checkpoint.load(p)["state_dict"] for p in (source, max((tmp_path / "b").glob("step_*.pt"))))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("encoder.")}


def test_the_form_of_the_panes_reaches_the_model_and_is_recorded(run_train, paths, tmp_path, monkeypatch):
    """Shows that --panes reaches the model and is recorded, and that resuming with the other form gives a note."""
    calls = spied(monkeypatch, ops, "gram")
    run_train(train_arguments(paths, tmp_path, steps=1, val_manifests=None, panes="gram"))
    assert calls
    assert read_log(tmp_path / "log.jsonl")[0]["arguments"]["panes"] == "gram"
    calls.clear()
    said = run_train(train_arguments(paths, tmp_path, steps=2, val_manifests=None, panes="plain", resume=True))
    assert "note: --panes was gram, now it is plain" in said and "done: step 2" in said
    assert not calls
    assert checkpoint.load(tmp_path / "step_00000002.pt")["arguments"]["panes"] == "plain"


def test_cuda_graphs_without_a_gpu_are_plain_steps(run_train, paths, tmp_path):
    logs = []
    for name, asked in (("with", True), ("without", None)):
        said = run_train(train_arguments(paths, tmp_path / name, steps=2, val_manifests=None, cuda_graphs=asked))
        assert ("no CUDA graphs: CUDA graphs need a GPU, but the model is on cpu" in said) == bool(asked)
        logs.append([r["loss"] for r in read_log(tmp_path / name / "log.jsonl") if r["kind"] == "train"])
    assert len(logs[0]) == 2 and logs[0] == logs[1]


@pytest.mark.slow
def test_two_processes_train_the_same_weights_and_resume(paths, tmp_path):
    """Shows that under torchrun both processes share the batches, write one log and resume exactly."""
    settings = {"grad_accumulation": 2, "batch_size": 2, "ema": 0.9, "val_every": 4}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(folder, **more):
        arguments = train_arguments(paths, folder, **settings, **more)
        done = subprocess.run([*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [r for r in read_log(folder / "log.jsonl") if r["kind"] in ("train", "val_live", "val_ema")]

    whole = run(tmp_path / "whole", steps=4, save_every=2)
    assert [r["step"] for r in whole] == [1, 2, 3, 4, 4, 4]
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole" / "step_00000002.pt", tmp_path / "part")
    part = run(tmp_path / "part", steps=4, save_every=2, resume=True)
    assert [r["loss"] for r in part] == [r["loss"] for r in whole if r["step"] > 2]
    assert len(checkpoint.load(tmp_path / "whole" / "step_00000004.pt")["rng"]) == 2


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(run_train, paths, tmp_path, amp):
    run_train(train_arguments(paths, tmp_path, steps=12, val_manifests=None, amp=amp))
    last = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"][-1]
    assert last["loss"] > 0 and last["bad_losses"] == 0
    scaler = checkpoint.load(tmp_path / "step_00000012.pt")["scaler"]
    if amp == "fp16":  # the scale starts high, and every overflow halves it
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
def test_settings_that_cannot_be_used_are_named(run_train, paths, tmp_path, change, message):
    config = paths["config"].with_name("wrong.yaml")
    config.write_text(paths["config"].read_text().replace(*change))
    with pytest.raises(RunError, match=message):
        run_train(train_arguments({**paths, "config": config}, tmp_path))


def test_help_explains_every_option(run_train, capsys):
    with pytest.raises(SystemExit):
        run_train(["--help"])
    said = capsys.readouterr().out
    missing = {
        word for word in ("--train-manifests", "--lr-by-clock", "--resume", "torchrun", "SIGKILL") if word not in said
    }
    assert not missing


def test_the_schedule_can_follow_the_clock(run_train, paths, tmp_path, monkeypatch):
    """Shows that if half of the time is over at the first step, half of the schedule is over too."""
    monkeypatch.setattr(TrainingState, "minutes", property(lambda state: 0.5 + state.step / 100))
    schedule = {"lr_policy": "polynomial", "lr_power": 1, "warmup_steps": 0, "lr": 0.1, "steps": 20}
    arguments = train_arguments(paths, tmp_path, max_minutes=1, lr_by_clock=True, val_manifests=None, **schedule)
    run_train(arguments)
    rates = [r["lr"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    assert rates[0] == pytest.approx(0.05) and rates == sorted(rates, reverse=True) and len(rates) == 20


@pytest.mark.slow
def test_command_line_errors_are_one_line(paths, tmp_path):
    arguments = train_arguments({**paths, "train": tmp_path / "none.jsonl"}, tmp_path)
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: .*none\.jsonl: cannot read the manifest", done.stderr)
