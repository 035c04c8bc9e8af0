"""Tests the training of a neural language model: what the model learns, resuming, skipped steps, and errors."""

import contextlib
import functools
import itertools
import json
import math
import random
import signal

import pytest
import torch
from conftest import assert_raises, raising
from language_models import assert_refused, printed, random_neural
from standins import wrap

from jasper_fast.cli import command
from jasper_fast.lm.arpa import LanguageModelError
from jasper_fast.lm.neural import scoring, training
from jasper_fast.lm.neural.config import LMConfig
from jasper_fast.nn.checkpoint import load
from jasper_fast.training.runs import read_log
from jasper_fast.training.step import BufferGuard

SMALL = ("--layers", 1, "--width", 16, "--heads", 2, "--inner", 24, "--memory", 8, "--segment", 8, "--batch-size", 4)
SMALL += ("--device", "cpu", "-q", "--log-every", 1, "--warmup-steps", 5)
HUGE = torch.zeros(1).expand(1 << 40)
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def run(*argv):
    return command.main(["lm", *map(str, argv)])


def grammar(rng):
    """Returns a random sentence: "a" and one to three words of c, d, e, or "b" and one to three words of f, g, h."""
    begin = rng.choice("ab")
    return " ".join([begin, *(rng.choice({"a": "cde", "b": "fgh"}[begin]) for _ in range(rng.randint(1, 3)))])


def entropy(text):
    """Returns the entropy of a text of the grammar, in nats per token. The end of a line is a token."""
    lines = text.read_text().split("\n")[:-1]
    # two beginnings; three lengths; three choices of each word
    nats = sum(math.log(2) + len(line.split()) * math.log(3) for line in lines)
    return nats / sum(len(line.split()) + 1 for line in lines)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, count in (("train", 600), ("dev", 200)):
        (folder / name).write_text("".join(grammar(rng) + "\n" for _ in range(count)))
    return folder / "train"


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """Trains for about four epochs, with validation and averages."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    options = ("--val", text.with_name("dev"), "--ema", 0.9, "--ema-warmup", "--steps", 300, "--save-every", 100)
    assert run("train-neural", text, "--out", out, *SMALL, *options, "--lr", 0.02) == 0
    return out


@pytest.mark.slow
def test_it_learns_a_grammar(trained, text, capsys):
    found = json.loads(printed(run, capsys, "perplexity", trained, text.with_name("dev"), "--json"))
    assert found["perplexity"] < 1.06 * math.exp(entropy(text.with_name("dev")))
    assert (found["unknown"], found["sentences"]) == (0, 200)
    best = min(r["perplexity"] for r in read_log(trained / "log.jsonl") if r["kind"] == "val_ema")
    assert best == pytest.approx(found["perplexity"], rel=1e-5)
    about = json.loads(printed(run, capsys, "info", trained, "--json"))
    assert (about["of"], about["vocabulary"], about["layers"], about["best_perplexity"]) == ("words", 8, 1, best)
    assert "8; " in printed(run, capsys, "info", trained)
    assert {p.suffix for p in trained.iterdir()} == {".pt", ".jsonl", ""}  # no temporary files
    lm = scoring.load(trained, "cpu")
    assert lm(["a c d"])[0] > lm(["a c f"])[0] + 2


def train_losses(out):
    return [r["loss"] for r in read_log(out / "log.jsonl") if r["kind"] == "train"]


@pytest.mark.parametrize("optimizer", ["adamw", "novograd"])
def test_a_resumed_run_ends_bit_equal(optimizer, text, tmp_path, monkeypatch):
    options = (*SMALL, "--steps", 14, "--save-every", 5, "--ema", 0.9, "--optimizer", optimizer, "--segment", 60)
    assert run("train-neural", text, "--out", tmp_path / "whole", *options) == 0
    stops = {7: signal.SIGTERM, 11: signal.SIGINT}

    def watch(state):
        if number := stops.pop(state.step, None):
            signal.raise_signal(number)

    monkeypatch.setattr(training, "main", functools.partial(training.main, watch=watch))
    for _ in range(3):
        assert run("train-neural", text, "--out", tmp_path / "parts", *options, "--resume") == 0
    assert not stops
    whole, parts = (load(tmp_path / name / "step_00000014.pt") for name in ("whole", "parts"))
    assert whole["names"] == parts["names"]
    for key in ("state_dict", "ema_state_dict", "optimizer", "memory", "step", "epoch", "position"):
        assert_equal(parts[key], whole[key])
    ended = load(tmp_path / "whole" / "step_00000010.pt")
    assert (ended["epoch"], ended["position"]) == (1, 0) and ended["memory"]["lines"].eq(-1).all(), "a new epoch"
    losses = train_losses(tmp_path / "whole")
    assert losses == train_losses(tmp_path / "parts") and len(losses) == 14


def test_steps_go_on_from_the_segment_before():
    config = LMConfig(12, layers=2, width=16, heads=2, inner=24, dropout=0.0, memory=20)
    model, held = training.TransformerXL(config), training.Held(config, 3)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler("cpu", enabled=False)
    state = training.LMState(model, optimizer, scaler, training.Meter(), memory=held)
    tokens = torch.randint(1, 12, (3, 17))
    guard = BufferGuard(held)
    steps = [training.train_step(state, tokens[:, i : i + 9], ["a", "b", "c"], guard) for i in (0, 8)]
    hidden, memory = model(tokens[:, :-1])
    whole = -model.log_probs(hidden, tokens[:, 1:])
    torch.testing.assert_close([step.losses[0] for step in steps], [whole[:, :8].mean(1), whole[:, 8:].mean(1)])
    torch.testing.assert_close(held.memory.hidden[:, :, 4:], memory.hidden)
    assert not memory.hidden.requires_grad
    assert held.lines[:, :4].eq(-1).all() and held.lines[:, 4:].eq(0).all()


def test_a_bad_step_changes_nothing_and_is_named(text, tmp_path, monkeypatch, capfd):
    factors = itertools.chain([1.0, 1.0], itertools.repeat(math.nan))
    wrap(monkeypatch, training.TransformerXL, "log_probs", lambda right, *args: right(*args) * next(factors))
    options = ("--steps", 9, "--save-every", 2, "--max-bad-steps", 4, "--keep", 9)
    assert run("train-neural", text, "--out", tmp_path / "out", *SMALL, *options) == 2
    error = capfd.readouterr().err
    assert "4 steps in a row were skipped; the last: tokens " in error and "Lower the learning rate" in error
    good, bad = (load(tmp_path / "out" / f"step_0000000{i}.pt") for i in (2, 6))
    assert_equal([bad["state_dict"], bad["memory"]], [good["state_dict"], good["memory"]])


@pytest.mark.parametrize("options", [("--characters",), ("--amp", "bf16", "--join-lines"), ("--optimizer", "novograd")])
def test_other_kinds_learn(options, text, tmp_path):
    assert run("train-neural", text, "--out", tmp_path / "out", *SMALL, "--steps", 30, "--lr", 0.01, *options) == 0
    losses = train_losses(tmp_path / "out")
    assert sum(losses[-5:]) / 5 < 0.92 * losses[0]
    assert math.isfinite(scoring.load(tmp_path / "out", "cpu")(["a c"])[0])


def test_a_signal_ends_the_reading_of_texts(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jasper_fast.lm.neural.tokens._OFTEN", 10)

    @contextlib.contextmanager
    def bar(right, *args):
        with right(*args) as show:
            yield lambda *told: (show(*told), signal.raise_signal(signal.SIGTERM))

    wrap(monkeypatch, training, "training_bar", bar)
    before = signal.getsignal(signal.SIGTERM)
    assert run("train-neural", text, "--out", tmp_path / "out", *SMALL) == 2
    assert "stopped by SIGTERM while the texts were read" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before and not list(tmp_path.glob("out/*.pt"))


def test_many_words_take_the_adaptive_softmax(tmp_path, capsys):
    rng = random.Random(0)
    (tmp_path / "text").write_text("\n".join(f"w{rng.randrange(5000)} w{i}" for i in range(5000)))
    out = tmp_path / "out"
    assert run("train-neural", tmp_path / "text", "--out", out, *SMALL, "--steps", 1, "--vocabulary", 4500) == 0
    about = json.loads(printed(run, capsys, "info", out, "--json"))
    assert (about["cutoffs"], about["vocabulary"]) == ([2000], 4500)
    assert -40 < scoring.load(out, "cpu")(["w3 zebra"])[0] < -15


@pytest.mark.slow
def test_errors_are_one_line(text, trained, tmp_path, capsys, monkeypatch):
    texts = {"empty": b"\n \n", "short": b"a b\n", "latin": b"caf\xe9\n", "endless": b"a " * 99}
    for name, content in (texts | {"special": b"a <unk> b\n" * 99}).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("jasper_fast.lm.texts._LONGEST", 150)
    for folder in ("acoustic", "bare"):
        (tmp_path / folder).mkdir()
    torch.save({"state_dict": {}}, tmp_path / "acoustic" / "best.pt")
    out = ("--out", tmp_path / "out", *SMALL)
    go_on = ("train-neural", text, "--out", trained, *SMALL, "--steps", 301, "--ema", 0.9)
    assert_refused(run, capsys, "lm", (
        (("train-neural", tmp_path / "gone", *out), "gone: no such text"),
        (("train-neural", text, "--val", tmp_path / "gone", *out), "gone: no such text"),
        (("train-neural", tmp_path / "empty", *out), "empty: has no words"),
        (("train-neural", text, "--val", tmp_path / "empty", *out), "empty: has no words"),
        (("train-neural", tmp_path / "short", *out), "short: 3 tokens in all, too few for a step of --batch-size 4 x"),
        (("train-neural", tmp_path / "latin", *out), "latin, line 1: not UTF-8"),
        (("train-neural", tmp_path / "endless", *out), "endless, line 1: longer than"),
        (("train-neural", tmp_path / "special", *out), "special: contains <unk>"),
        (("train-neural", text, *out, "--width", 15), "width 15 must be an even multiple of the number of heads, 2"),
        (("train-neural", text, *out, "--steps", 0), "--steps must be at least 1"),
        (("train-neural", text, *out, "--threads", -1), "--threads must be at least 1"),
        (("train-neural", text, *out, "--device", "gpu"), "--device 'gpu' is not a device"),
        (("train-neural", text, "--out", text, *SMALL), "train: is no folder; choose another name"),
        (("train-neural", text, *out, "--lr", -1), "--lr must be at least 0, not -1"),
        (("train-neural", text, *out, "--lr-by-clock"), "--lr-by-clock needs --max-minutes"),
        (go_on, "holds checkpoints of an earlier run"),
        (("train-neural", text, "--out", tmp_path / "acoustic", *SMALL), "holds checkpoints of an earlier run"),
        ((*go_on, "--resume", "--seed", 3), "--seed was 42: use that value again"),
        ((*go_on, "--resume", "--vocabulary", 4), "--vocabulary was 200000: use that value again"),
        (("train-neural", tmp_path / "empty", *go_on[2:], "--resume"), "empty: 0 tokens in all"),
        ((*go_on, "--resume", "--layers", 2), "has a model that differs from what the options describe"),
        (("train-neural", text.with_name("dev"), *go_on[2:], "--resume"), "was trained on another text"),
        (("perplexity", tmp_path / "acoustic", text), "best.pt: holds no neural language model"),
        (("info", tmp_path / "bare"), "bare: the folder holds no language model"),
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("best.pt does not fit into memory"), "error: best.pt does not fit into memory\n"),
        (RuntimeError("DefaultCPUAllocator: not enough"), "error: out of memory; lower --batch-size or --segment (Def"),
        (torch.OutOfMemoryError("no memory"), "error: out of memory; lower --batch-size or --segment (no memory)\n"),
    ],
)
def test_too_little_memory_is_one_line(error, said, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "main", raising(error))
    assert run("train-neural", text, "--out", tmp_path / "out", *SMALL) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(language_model={"layers": 1}), "settings are not those"),
        (lambda state: state.update(names=["a"]), "not a list of words"),
        (lambda state: state.update(names=["</s>", "<unk>", "a"]), "3 words instead of 10"),
        (lambda state: state["language_model"].update(width=1 << 16), "size mismatch"),
        (lambda state: state["language_model"].update(layers=64), "Missing key"),
        (lambda state: state["language_model"].update(heads=3), "must be an even multiple"),
        (lambda state: state["language_model"].update(inner=1 << 40), "inner"),
        (lambda state: state.update(ema_state_dict={"bias": 3}), "is_floating_point"),
        (lambda state: state.update(ema_state_dict=[3]), "list"),
        (lambda state: state["state_dict"]["norm.weight"][3].fill_(math.nan), "norm.weight is not a dense"),
        (lambda state: state["state_dict"].update({"norm.weight": HUGE}), "norm.weight is not a dense"),
    ],
)
def test_hostile_checkpoints_are_one_line(change, message, tmp_path):
    file = random_neural(tmp_path / "lm.pt", [*"abcdefgh"])
    state = load(file)
    change(state)
    torch.save(state, file)
    assert_raises([(lambda: scoring.load(file, "cpu"), rf"lm\.pt.*{message}")], LanguageModelError)
