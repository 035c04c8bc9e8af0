"""Tests the commands of `jasper-fast lm`: their output, the weights that `lm tune` finds, and errors."""

import functools
import json
import math
import random
import re
from types import SimpleNamespace

import pytest
from kneser_ney import KneserNey
from language_models import assert_refused, hear, needs_kenlm, needs_native, printed

from jasper_fast.cli import command
from jasper_fast.lm import tuned
from jasper_fast.lm.saved import Saved
from jasper_fast.speech.text import Vocabulary

pytestmark = needs_native
V = Vocabulary()
SENTENCES = ["the cat sat on the mat", "the dog sat", "a cat ran to the dog", "the mat ran", "a dog sat on a cat"]


def run(*argv):
    return command.main([str(a) for a in argv])


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text("\n".join(SENTENCES) + "\n")
    return tmp_path / "text"


@needs_kenlm
def test_train_info_and_perplexity(text, tmp_path, capsys):
    lm = tmp_path / "lm.arpa"
    show = functools.partial(printed, run, capsys, "lm")
    assert "5 sentences, 24 words, vocabulary 12" in show("train", text, "--order", 3, "--out", lm)
    found = json.loads(show("info", lm, "--json"))
    assert (found["order"], found["of"], found["vocabulary"], found["open"]) == (3, "words", 9, True)
    assert "1-grams 12\n" in show("info", lm)
    (tmp_path / "capitals.arpa").write_text(lm.read_text().replace("<unk>", "<UNK>"))
    assert json.loads(show("info", tmp_path / "capitals.arpa", "--json"))["open"]
    (tmp_path / "dev").write_text("the cat ran\n\nA zebra sat\n")
    measured = json.loads(show("perplexity", lm, tmp_path / "dev", "--json", "--lower-case"))
    want, log10 = KneserNey([s.split() for s in SENTENCES], 3), []
    for line in (["<s>", "the", "cat", "ran", "</s>"], ["<s>", "a", "<unk>", "sat", "</s>"]):
        log10 += [math.log10(want.p(tuple(line[max(0, i - 2) : i + 1]))) for i in range(1, len(line))]
    assert measured["log10"] == pytest.approx(sum(log10), abs=1e-4) and measured["unknown"] == 1
    assert measured["perplexity"] == pytest.approx(10 ** (-sum(log10) / 8), rel=1e-4)
    assert measured["perplexity_known"] == pytest.approx(10 ** (-(sum(log10) - log10[5]) / 7), rel=1e-4)
    assert show("perplexity", lm, tmp_path / "dev").startswith("perplexity ")


@needs_kenlm
def test_models_of_characters_are_asked_for_characters(text, tmp_path, capsys):
    lm = tmp_path / "lm.arpa"
    show = functools.partial(printed, run, capsys, "lm")
    count = sum(map(len, SENTENCES))
    options = ("--order", 5, "--out", lm, "--characters", "--prune", 0, 0, 1)
    assert f"{count} characters" in show("train", text, *options)
    measured = json.loads(show("perplexity", lm, text, "--json"))
    assert (measured["words"], measured["unknown"]) == (count, 0) and 1 < measured["perplexity"] < 10
    assert "of characters" in show("info", lm)


@pytest.fixture
def saved(tmp_path):
    """Saves log-probs of SENTENCES with about four wrong symbols in each. Returns the folder."""
    rng = random.Random(0)
    folder = Saved.begin(tmp_path / "saved", SimpleNamespace(vocabulary=V, frame_seconds=0.02))
    for i, sentence in enumerate(SENTENCES):
        log_probs = hear(V, sentence, 6.0, seed=i, noise=0.5)
        for t in rng.sample(range(0, len(log_probs), 2), 4):
            log_probs[t, rng.randrange(1, 27)] += 7.0
        folder.keep(i, log_probs.log_softmax(-1))
    folder.finish([f"{i}.wav" for i in range(len(SENTENCES))], SENTENCES)
    return tmp_path / "saved"


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_tune_finds_weights_that_help(kind, text, saved, tmp_path, capsys):
    if kind == "words":
        pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text is not installed")
    lm, out = tmp_path / "lm.arpa", tmp_path / "best.yaml"
    options = ["--characters", "--order", 5] if kind == "characters" else ["--order", 3]
    assert run("lm", "train", text, "--out", lm, *options) == 0
    tune = ("lm", "tune", "--log-probs", saved, "--lm", lm, "--out", out, "--report", tmp_path / "tune.html",
            "--alpha", "0,1,2", "--beta", "0,0.5", "--beam", 32, "--processes", 1)  # fmt: skip
    greedy, best = (float(x) for x in re.findall(r"([\d.]+) %", printed(run, capsys, *tune)))
    found = tuned.read(out)
    assert best < greedy / 2 and found["lm"] == str(lm) and found["beam"] == 32
    assert found["alpha"] > 0 or kind == "words"  # for words, the lexicon suffices to correct the errors
    page = (tmp_path / "tune.html").read_text()
    assert page.count('class="cell') == 6 and page.count('class="cell best"') == 1 and f"{best:.2f}" in page
    assert run(*tune, "--random", 3, "--seed", 1) == 0
    assert (tmp_path / "tune.html").read_text().count('class="cell') == 3


def test_tune_finds_the_weight_of_a_second_pass(text, saved, tmp_path, capsys):
    training = ("--characters", "--layers", 1, "--width", 16, "--heads", 2, "--memory", 16, "--segment", 16,
                "--batch-size", 4, "--steps", 80, "--lr", 0.02, "--device", "cpu", "-q")  # fmt: skip
    assert run("lm", "train-neural", text, "--out", tmp_path / "neural", *training) == 0
    tuning = ("--rescore", tmp_path / "neural", "--rescore-weight", "0,0.5,1", "--beta", "0,0.5", "--beam", 64,
              "--out", tmp_path / "best.yaml", "--report", tmp_path / "tune.html", "--device", "cpu")  # fmt: skip
    told = printed(run, capsys, "lm", "tune", "--log-probs", saved, *tuning)
    found = tuned.read(tmp_path / "best.yaml")
    greedy, best = (float(x) for x in re.findall(r"([\d.]+) %", told))
    assert best < greedy and found["rescore_weight"] > 0 and f"rescoring weight {found['rescore_weight']:g}" in told
    assert found["rescore"] == str(tmp_path / "neural") and "lm" not in found and "alpha" not in found
    page = (tmp_path / "tune.html").read_text()
    assert page.count('class="cell') == 2 and f"rescoring {found['rescore_weight']:g}" in page


@needs_kenlm
def test_errors_are_one_line(text, saved, tmp_path, capsys):
    assert run("lm", "train", text, "--order", 1, "--out", tmp_path / "unigrams.arpa") == 0
    empty = tmp_path / "empty"
    Saved.begin(empty, SimpleNamespace(vocabulary=V, frame_seconds=0.02)).finish([], [])
    capsys.readouterr()
    assert_refused(functools.partial(run, "lm"), capsys, "lm", (
        (("train", tmp_path / "gone", "--order", 2, "--out", tmp_path / "x"), "gone: no such text"),
        (("train", text, "--order", 9, "--out", tmp_path / "x"), "--order 9"),
        (("train", text, "--order", 2, "--out", tmp_path / "no" / "x"), "does not exist"),
        (("train", text, "--order", 2, "--out", tmp_path), "is a folder; choose another name"),
        (("info", tmp_path / "gone"), "gone: no such language model"),
        (("info", text), "this is no ARPA file"),
        (("perplexity", tmp_path / "gone", text), "gone: no such language model"),
        (("perplexity", text, text), "this is no ARPA file"),
        (("perplexity", tmp_path / "unigrams.arpa", text), "unigrams.arpa: KenLM cannot read it"),
        (("tune", "--log-probs", tmp_path, "--lm", text, "--out", tmp_path / "x.yaml"), "not an index of log-probs"),
        (("tune", "--log-probs", saved, "--out", tmp_path / "x.yaml"), "no language model to tune; name one with --lm"),
        (("tune", "--log-probs", saved, "--lm", text, "--out", tmp_path / "x.yaml"), "this is no ARPA file"),
        (("tune", "--log-probs", empty, "--lm", text, "--out", tmp_path / "x.yaml"), "no utterances"),
        (("tune", "--log-probs", saved, "--lm", tmp_path, "--out", tmp_path / "x.yaml"), "neural language model only"),
        (("tune", "--log-probs", saved, "--lm", text, "--out", tmp_path / "x.yaml", "--report", tmp_path / "no" / "x"),
         "does not exist"),
        (("tune", "--log-probs", saved, "--lm", text, "--out", tmp_path / "x"), "must end in .yaml"),
        (("tune", "--log-probs", saved, "--lm", text, "--out", tmp_path / "x.yaml", "--alpha", "-1"), "alpha -1"),
    ))  # fmt: skip
