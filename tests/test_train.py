"""The parts of a training run: loss, step, figures, validation, log, signals."""

import copy
import math
import os
import signal

import pytest
import torch
from speech import CONFIG, corpus_of_beeps, one_thread, train_arguments  # noqa: F401
from standins import NeverWait

from jasper_fast.data.batches import BatchSampler, collate, load_batches
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.nn.architecture import out_lengths
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.eager import EagerJasper
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.speech.text import Vocabulary
from jasper_fast.training.optim import EMA, NovoGrad
from jasper_fast.training.randomness import own_randomness
from jasper_fast.training.runs import Ranks, RunError, RunLog, StopRequest, read_log
from jasper_fast.training.state import Meter, TrainingState
from jasper_fast.training.step import BufferGuard, Frontend, StepResult, batch_loss, ctc_loss, train_step
from jasper_fast.training.validate import validate, validate_state

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


class Model(EagerJasper):
    """The plain PyTorch model, so that these tests depend only on the training code."""

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
    """Returns a model, an optimiser, a loss scaler and a guard."""
    model = Model()
    if optimizer == "novograd":
        chosen = NovoGrad(model.parameters(), lr=0.01, weight_decay=1e-3)
    else:
        chosen = torch.optim.AdamW(model.parameters(), lr=0.003, fused=True)
    return model, chosen, torch.amp.GradScaler("cpu", enabled=amp == "fp16"), BufferGuard(model)


# --- loss --------------------------------------------------------------------------------------------------------


def test_ctc_loss_is_the_negative_log_likelihood_of_each_utterance():
    log_probs = torch.randn(2, 3, 3).log_softmax(-1)
    lengths, targets, target_lengths = torch.tensor([3, 2]), torch.tensor([[0, 1], [1, 0]]), torch.tensor([2, 1])
    p = log_probs.exp()
    # all alignments of the labels 0, 1 with three frames
    first = sum(
        p[0, 0, a] * p[0, 1, b] * p[0, 2, c] for a, b, c in [(0, 0, 1), (0, 1, 1), (2, 0, 1), (0, 2, 1), (0, 1, 2)]
    )
    # all alignments of the label 1 with two frames
    second = sum(p[1, 0, a] * p[1, 1, b] for a, b in [(1, 1), (1, 2), (2, 1)])
    torch.testing.assert_close(
        ctc_loss(log_probs, lengths, targets, target_lengths), -torch.stack([first, second]).log()
    )
    assert ctc_loss(log_probs.bfloat16(), lengths, targets, target_lengths).dtype == torch.float32


@pytest.mark.parametrize("target", [-1, 2, 3])
def test_targets_of_another_vocabulary_are_refused(target):
    log_probs, lengths, targets = torch.randn(2, 4, 3), torch.tensor([4, 4]), torch.tensor([[0, 1], [target, target]])
    assert len(ctc_loss(log_probs, lengths, targets, torch.tensor([2, 0]))) == 2, "beyond the length, any number may be"
    for given in (targets, targets.flatten()):
        with pytest.raises(ValueError, match=f"target {target} is not one of the model's 2 labels"):
            ctc_loss(log_probs, lengths, given, torch.tensor([2, 2]))


def test_one_bad_utterance_makes_the_whole_gradient_nan():
    log_probs = torch.randn(2, 4, 3, requires_grad=True)
    targets = torch.tensor([[0, 0, 0], [0, 1, 0]])  # the labels 0 0 0 need five frames
    losses = ctc_loss(log_probs.log_softmax(-1), torch.tensor([4, 4]), targets, torch.tensor([3, 3]))
    assert losses[0] == math.inf and torch.isfinite(losses[1])
    batch_loss(losses).backward()
    assert torch.isnan(log_probs.grad).all()
    assert batch_loss(torch.tensor([1.0, 2.0])) == 1.5


# --- one step ----------------------------------------------------------------------------------------------------


def everything(model, optimizer):
    moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return [torch.as_tensor(x).clone() for x in (*model.state_dict().values(), *moments)]


@pytest.mark.parametrize(
    ("optimizer", "amp", "poison"),
    [("novograd", "off", math.nan), ("novograd", "fp16", math.inf), ("adamw", "off", math.inf),
     ("adamw", "fp16", math.nan)],
)  # fmt: skip
def test_a_bad_batch_changes_nothing_and_is_named(dataset, optimizer, amp, poison):
    model, chosen, scaler, guard = rig(optimizer, amp)
    step = lambda batches: train_step(model, front(), batches, chosen, scaler, guard, device=CPU)  # noqa: E731
    meter = Meter(max_bad=3)
    meter.add(step([a_batch(dataset)]))
    before = everything(model, chosen)
    bad = a_batch(dataset)
    bad.audio[2, 100] = poison
    meter.add(step([a_batch(dataset), bad]))
    assert all(map(torch.equal, before, after := everything(model, chosen))) and len(before) == len(after)
    assert meter.read() == [f"{bad.names[2]}: its features are not finite"]
    assert (meter.bad_losses, meter.overflows, meter.bad_in_a_row) == (1, 0, 1)
    assert math.isfinite(meter.figures()["loss"])
    silent = a_batch(dataset)
    silent.audio_lengths.zero_()  # all losses are infinite, with gradients of 0
    assert math.isnan(step([silent]).grad_norm)
    assert all(map(torch.equal, before, everything(model, chosen)))
    meter.add(step([a_batch(dataset)]))
    assert meter.read() == [] and meter.bad_in_a_row == 0
    assert not torch.equal(before[0], everything(model, chosen)[0])


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_step_never_waits_for_the_device(dataset, amp):
    model, chosen, scaler, guard = rig("novograd", amp)
    ema, features, batch = EMA(model), front(), a_batch(dataset)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NeverWait():
        batch.audio.sum().item()
    with NeverWait():
        for _ in range(2):
            train_step(model, features, [batch, batch], chosen, scaler, guard, device=CPU, clip_norm=1.0)
            ema.update(model)


def test_accumulated_gradients_are_the_mean_over_micro_batches(dataset):
    model, _, scaler, _ = rig()
    model.eval()  # fixes the statistics, which otherwise depend on how utterances are split into batches
    gradients = []
    for batches in ([a_batch(dataset)], [a_batch(dataset, [0, 1]), a_batch(dataset, [2, 3])]):
        twin = copy.deepcopy(model)
        optimizer = NovoGrad(twin.parameters(), lr=0.0)
        result = train_step(twin, front().eval(), batches, optimizer, scaler, BufferGuard(twin), device=CPU)
        gradients.append([p.grad for p in twin.parameters()])
        torch.testing.assert_close(result.grad_norm, torch.nn.utils.get_total_norm(gradients[-1]))
        assert result.names == a_batch(dataset).names
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_the_gradient_norm_is_clipped(dataset):
    model, chosen, scaler, guard = rig("adamw")
    result = train_step(model, front(), [a_batch(dataset)], chosen, scaler, guard, device=CPU, clip_norm=0.5)
    assert result.grad_norm > 0.5  # the norm before clipping
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(("optimizer", "lr", "amp"), [("novograd", 0.02, torch.bfloat16), ("adamw", 0.005, None)])
def test_a_model_learns_one_batch(dataset, optimizer, lr, amp):
    model, chosen, *rest = rig(optimizer)
    chosen.param_groups[0]["lr"] = lr
    batch, features, losses = a_batch(dataset, range(2)), front(), []
    for _ in range(15):
        losses.append(
            train_step(model, features, [batch], chosen, *rest, device=CPU, amp_dtype=amp).losses[0].mean().item()
        )
    assert losses[-1] < 0.5 * losses[0], losses


# --- figures, validation -----------------------------------------------------------------------------------------


def step_result(losses, norm=1.0):
    heard, names = torch.ones(len(losses), dtype=torch.bool), [f"u{i}" for i in range(len(losses))]
    return StepResult([torch.tensor(losses)], [heard], names, torch.tensor(norm), heard, heard, [])


def test_meter_counts_names_and_gives_up():
    meter = Meter(max_bad=2)
    meter.add(step_result([1.0, 3.0]))
    meter.add(step_result([math.nan, 3.0], math.nan))
    assert meter.read() == ["u0: its loss is nan"]
    meter.add(step_result([5.0, 7.0]))
    meter.add(step_result([5.0], math.inf))
    assert meter.read() == []
    figures = meter.figures()
    assert (figures["loss"], figures["bad_losses"], figures["overflows"]) == (4.0, 1, 1)
    meter.add(step_result([math.inf, 1.0], math.nan))
    with pytest.raises(RunError, match=r"2 steps in a row .*u0: its loss is inf.*lower the learning rate"):
        meter.read()


def test_validation_gives_error_rates_and_names_bad_utterances(dataset):
    model, features = Model(), front()
    plan = BatchSampler(dataset.durations, batch_size=4, shuffle=False)
    before = [t.clone() for t in model.state_dict().values()]

    def run(batches):
        return validate(model, features, batches, dataset.vocabulary, ALONE)

    result = run(load_batches(dataset, plan))
    assert not result.bad and len(result.examples) == 2
    assert model.training and features.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    model.eval()
    batches, expected = list(load_batches(dataset, plan)), []
    for batch in batches:
        log_probs, lengths = model(*features.eval().features(batch.audio, batch.audio_lengths))
        expected.append(ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths))
    assert result.loss == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)
    batches[0].audio[1, 50] = math.nan
    poisoned = run(batches)
    assert poisoned.bad == [f"{batches[0].names[1]}: its loss is nan"]
    assert math.isfinite(poisoned.loss)
    with pytest.raises(RunError, match="no usable utterance"):
        run([])


def test_ema_weights_are_what_validation_sees(dataset):
    model = Model()
    state = TrainingState(model, None, None, None, EMA(model, 0.5))
    with torch.no_grad():
        model.decoder.layers[0].bias[-1] = 1e4  # only in the current weights: all output is blank
    load = lambda: load_batches(dataset, BatchSampler(dataset.durations, 4, shuffle=False))  # noqa: E731
    found = validate_state(state, ALONE, front(), load, dataset.vocabulary)
    assert found["live"].loss > 1e4 > found["ema"].loss


def test_own_randomness_leaves_no_trace():
    before, draws = torch.get_rng_state(), []
    for _ in range(2):
        with own_randomness(7):
            draws.append(torch.rand(2))
    assert torch.equal(*draws) and torch.equal(torch.get_rng_state(), before)


# --- runs --------------------------------------------------------------------------------------------------------


def test_log_continues_at_a_step(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, "train", loss=float(step) if step < 3 else math.nan)
    log.close()
    assert read_log(tmp_path / "log.jsonl")[-1] == {"step": 3, "kind": "train", "loss": None}
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "ki')  # as if the run was killed while it wrote this line
    log = RunLog(tmp_path, step=2)
    log.write(3, "train", loss=0.5)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path / "log.jsonl")] == [(1, 1.0), (2, 2.0), (3, 0.5)]
    assert list((tmp_path / "tensorboard").iterdir())
    (tmp_path / "log.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(RunError, match="line 1 is not JSON"):
        read_log(tmp_path / "log.jsonl")


def test_a_second_signal_stops_at_once():
    # if a shell runs the tests in the background, Python ignores SIGINT: set its usual handler
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
@pytest.mark.parametrize(
    ("device", "said"), [("cuda", "--device cpu"), ("cuda:1", "--device cpu"), ("gpu", "'gpu' is")]
)
def test_a_device_that_is_not_there_is_an_error(device, said):
    with pytest.raises(RunError, match=said):
        Ranks.start(device)
