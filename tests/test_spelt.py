"""Tests word n-grams and hot words in the search over symbols: faces, scores, open and closed vocabularies, errors."""

import math
import random

import pytest
import torch
from conftest import assert_raises
from language_models import hear, needs_native, random_arpa

from jasper_fast import beam_search
from jasper_fast.kernels.prefix_beam import cpu_impl, reference
from jasper_fast.lm import decoders
from jasper_fast.lm.decoders import decoder, load_lm
from jasper_fast.lm.spelt import SpeltLM, hot_words_alone
from jasper_fast.lm.symbols import SymbolLM, tokens
from jasper_fast.lm.words import word_lm
from jasper_fast.speech.text import Vocabulary

V = Vocabulary(" abcd")
WORDS = ["a", "ab", "abc", "bad", "cab", "dad", "d"]


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    return random_arpa(tmp_path_factory.mktemp("spelt") / "lm.arpa", [*WORDS, "öl"], 3, random.Random(0))


@pytest.fixture(scope="module")
def symbols(tmp_path_factory):
    return SymbolLM(random_arpa(tmp_path_factory.mktemp("spelt") / "symbols.arpa", tokens(V), 3, random.Random(1)), V)


def transcript(log_probs: torch.Tensor, lm, **settings):
    """Returns the transcript that the decoder with these settings gives."""
    made = decoder(V, lm, **settings)
    (found,) = made.begin(log_probs, torch.tensor([log_probs.shape[1]]), 0.02)()
    made.close()
    return found


def heard_as(text: str, sharp: float = 4.0, seed: int = 0) -> torch.Tensor:
    return hear(V, text, sharp, seed)[None]


def best(log_probs: torch.Tensor, **settings):
    return beam_search(log_probs, torch.tensor([log_probs.shape[1]]), V, **settings)[0]


@needs_native
@pytest.mark.slow
def test_the_cpu_face_equals_the_definition(arpa, symbols):
    rng = random.Random(0)
    lms = [SpeltLM(arpa, V), SpeltLM(arpa, V, unknown=-math.inf), SpeltLM(arpa, V, unknown=0.0)]
    for case in range(160):
        log_probs = (torch.randn(2, rng.choice((1, 4, 9, 12)), 6) * rng.choice((0.3, 2.0, 5.0))).log_softmax(-1)
        lengths = torch.tensor([log_probs.shape[1], rng.randint(0, log_probs.shape[1])])
        alpha, beta = rng.choice((0.0, 0.7, 2.0)), rng.choice((-0.5, 0.0, 1.0))
        hot = {"bad": rng.choice((2.0, -3.0)), "dada": 1.5} if case % 2 else {}
        beam = rng.choice((1, 3, 8, 40))
        if kind := case % 4:
            settings = None, alpha, 0.0, lms[kind - 1].words(alpha, beta, hot)
        else:
            settings = (symbols.ngram if case % 8 else None), alpha, beta, hot_words_alone({"bad": 3.0, "a": 1.0}, V)
        given = log_probs, lengths, beam, min(beam, 3), *settings
        assert all(map(torch.equal, reference.search(*given), cpu_impl.search(*given))), case


@needs_native
def test_states_whose_rows_take_much_memory_are_computed_again(arpa):
    """For each state of the language model that a search needs, the C++ face keeps a row with three numbers (20 bytes)
    for each symbol. It deletes all rows when they take more than 64 MiB. With 60,000 more symbols that is after about
    50 states. The added symbols are impossible, so they change no result."""
    log_probs, impossible = torch.randn(1, 40, 6).log_softmax(-1), torch.full((1, 40, 60_000), -math.inf)
    many = Vocabulary([*V.labels, *map(chr, range(0xF0000, 0xF0000 + 60_000))])
    wide = torch.cat([log_probs[..., :5], impossible, log_probs[..., 5:]], -1)
    found = beam_search(wide, torch.tensor([40]), many, lm=SpeltLM(arpa, many), alpha=1.0, beam=64, n_best=64)
    assert found[0] == best(log_probs, lm=SpeltLM(arpa, V), alpha=1.0, beam=64, n_best=64)


@pytest.mark.parametrize("alpha, beta, unknown", [(0.0, 0.0, -1.0), (2.0, -0.2, -3.0), (1.0, 0.5, -math.inf)])
def test_a_score_is_what_the_docstring_says(arpa, alpha, beta, unknown):
    kenlm = pytest.importorskip("kenlm", reason="ufal-kenlm is not installed")
    model, lm, hot = kenlm.Model(str(arpa)), SpeltLM(arpa, V, unknown=unknown), {"bad": 2.5, "DADA": -1.25, "dac": 3.0}
    found = best(heard_as("bad dada dac a", 1.0), lm=lm, alpha=alpha, beta=beta, beam=60, n_best=60, hot_words=hot)
    seen = set()
    for h in found:
        words = h.text.split()
        listed = [w in WORDS or w in ("dada", "dac") for w in words]
        added = beta * len(words) + sum({"bad": 2.5, "dada": -1.25, "dac": 3.0}.get(w, 0.0) for w in words)
        added += unknown * listed.count(False) if False in listed else 0.0
        assert h.score == pytest.approx(h.log_prob + alpha * model.score(h.text.strip()) + added, abs=1e-4)
        seen |= {*listed, *(w for w in words if w in hot)}
    assert "bad" in seen and (False in seen) == (unknown > -math.inf) and found[0].score >= found[-1].score


def test_open_and_closed_vocabularies(arpa):
    heard = heard_as("bad cacab", 8.0)
    assert best(heard, lm=SpeltLM(arpa, V), alpha=0.5)[0].text == "bad cacab"
    closed = SpeltLM(arpa, V, unknown=-math.inf)
    assert {w for h in best(heard, lm=closed, alpha=0.5, n_best=20) for w in h.text.split()} <= set(WORDS)
    assert best(heard[:, :0], lm=closed)[0].text == ""


def test_a_closed_search_finds_what_flashlight_finds(arpa):
    pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text is not installed")
    from jasper_fast.lm.words import WordSearch

    search, lm = WordSearch(word_lm(arpa, V), 256, 1.5, 0.3), SpeltLM(arpa, V, unknown=-math.inf)
    for seed, text in enumerate(("bad cab a", "dad abc d ab", "a", "cab d d cab bad")):
        heard = heard_as(text, 5.0, seed)
        ours, theirs = best(heard, lm=lm, alpha=1.5, beta=0.3, beam=256)[0], search(heard[0].numpy())[0]
        assert ours.text.split() == theirs.text.split()
        # flashlight also counts the paths of texts with doubled spaces
        assert ours.score == pytest.approx(theirs.score, abs=0.7)


@pytest.mark.parametrize("kind", ["none", "symbols", "words", "open"])
def test_a_boost_turns_a_near_tie(kind, arpa, symbols):
    """The word "bad" is a little likelier than "dad", unless "dad" gets a positive boost."""
    heard = heard_as("bad", 9.0)
    heard[0, 0, V.encode("d")[0]] = heard[0, 0, V.encode("b")[0]] - 0.3
    heard = heard.log_softmax(-1)
    lm = {"none": None, "symbols": symbols, "words": load_lm(arpa, V), "open": load_lm(arpa, V, unknown=-9.0)}[kind]
    for boost, text in ((0.0, "bad"), (3.0, "dad"), (-3.0, "bad")):
        assert transcript(heard, lm, alpha=0.0, beta=0.0, hot_words={"dad": boost}).text == text


def test_what_cannot_be_searched_is_one_line(arpa, symbols, tmp_path):
    closed = random_arpa(tmp_path / "closed.arpa", WORDS, 2, random.Random(0), unknown=False)
    binary = tmp_path / "lm.bin"
    binary.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\x00")
    (tmp_path / "lexicon.txt").write_text("bad\n")
    heard = heard_as("bad")
    assert_raises((
        (lambda: SpeltLM(closed, V), "has no <unk>"),
        (lambda: SpeltLM(binary, V, tmp_path / "lexicon.txt"), "needs the ARPA file"),
        (lambda: SpeltLM(arpa, V, unknown=math.nan), "unknown nan"),
        (lambda: load_lm(symbols.path, V, unknown=-1.0), "is a model of symbols, which is always open"),
        (lambda: SpeltLM(closed, V, unknown=-math.inf).words(1.0, 0.0, {"ddd": 1.0}), "'ddd' is not in"),
        (lambda: best(heard, hot_words={"bad dad": 1.0}), "is not one word"),
        (lambda: best(heard, hot_words={"böd": 1.0}), "cannot be spelt"),
        (lambda: best(heard, hot_words={"bad": math.inf}), "must be finite"),
        (lambda: decoder(V, None, hot_words={"": 1.0}), "is not one word"),
        (lambda: hot_words_alone({"one": 1.0}, Vocabulary(["one", "two"])), "labels that are characters"),
        (lambda: best(heard, lm=SpeltLM(arpa, Vocabulary(" abc"))), "another vocabulary"),
    ))  # fmt: skip


def test_a_python_without_flashlight_searches_words_itself(arpa, monkeypatch):
    monkeypatch.setattr(decoders, "has_wheels", lambda: False)
    found = transcript(heard_as("bad cacab", 8.0), load_lm(arpa, V), n_best=5)
    assert {w for h in found.hypotheses for w in h.text.split()} <= set(WORDS) and len(found.hypotheses) == 5
    assert [w.text for w in found.words] == found.text.split()
