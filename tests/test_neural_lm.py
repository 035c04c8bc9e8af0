"""Tests the neural language model: attention, memory, causality, probabilities, and scores in batches."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import assert_raises

from jasper_fast.lm.neural.config import LMConfig
from jasper_fast.lm.neural.model import BOUNDARY, TransformerXL
from jasper_fast.lm.neural.scoring import NeuralLM
from jasper_fast.lm.neural.stream import Held, Stream
from jasper_fast.lm.neural.tokens import Tokens
from jasper_fast.lm.texts import TextFile

SMALL = {"layers": 2, "width": 16, "heads": 2, "inner": 24, "dropout": 0.1, "memory": 64}


@torch.no_grad()
def model(**settings):
    """Returns a small model in fp64 with large random weights."""
    torch.manual_seed(0)
    made = TransformerXL(LMConfig(**({"vocabulary": 12, **SMALL} | settings))).double().eval()
    for p in made.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return made


def log_probs(made, tokens, memory=None):
    """Returns the log-probs of every token but the first, and the memory after them."""
    hidden, memory = made(tokens[:, :-1], memory)
    return made.log_probs(hidden, tokens[:, 1:]), memory


def lines(n, length, seed=1):
    """Returns random rows of tokens. Some of the tokens are boundaries between lines."""
    tokens = torch.randint(0, 12, (n, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = BOUNDARY
    return tokens


@torch.no_grad()
def test_attention_equals_its_formula():
    attention = model().layers[0].attention
    x, keys, distances = torch.randn(2, 3, 16).double(), torch.randn(2, 5, 16).double(), torch.randn(5, 16).double()
    found = attention(x, keys, distances, torch.ones(3, 5, dtype=torch.bool).tril(2).expand(2, 1, 3, 5))
    q, r = attention.query(x), attention.position(distances)
    k, v = attention.key_value(keys).chunk(2, -1)
    for n in range(2):
        for i in range(3):
            parts = []
            for h in range(2):
                s = slice(8 * h, 8 * h + 8)
                scores = [
                    ((q[n, i, s] + attention.content_bias[h, 0]) @ k[n, j, s]
                     + (q[n, i, s] + attention.position_bias[h, 0]) @ r[4 - (2 + i - j), s]) / math.sqrt(8)
                    for j in range(3 + i)
                ]  # fmt: skip
                parts.append(torch.stack(scores).softmax(0) @ v[n, : 3 + i, s])
            torch.testing.assert_close(found[n, i], attention.out(torch.cat(parts)))


@pytest.mark.parametrize("joined", [False, True])
@torch.no_grad()
def test_segments_with_memory_equal_the_whole(joined):
    made, tokens = model(joined=joined), lines(3, 41)
    whole, _ = log_probs(made, tokens)
    found, memory = [], None
    for first, last in itertools.pairwise((0, 7, 8, 21, 33, 40)):  # segments of several lengths
        part, memory = log_probs(made, tokens[:, first : last + 1], memory)
        found.append(part)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-10, atol=1e-10)
    assert memory.hidden.shape == (2, 3, 40, 16)
    short = model(joined=joined, memory=4)  # a memory of only four tokens
    part, memory = log_probs(short, tokens[:, :21])
    assert memory.hidden.shape == (2, 3, 4, 16) and memory.lines.shape == (3, 4)
    rest, _ = log_probs(short, tokens[:, 20:], memory)
    torch.testing.assert_close(part, whole[:, :20])
    assert not torch.allclose(rest, whole[:, 20:])


@pytest.mark.parametrize("joined", [False, True])
@torch.no_grad()
def test_an_empty_memory_changes_nothing(joined):
    made, tokens = model(joined=joined), lines(3, 20)
    tokens[0, 0] = 5  # starts in the middle of a line
    empty = Held(made.config, 3).double().memory
    torch.testing.assert_close(log_probs(made, tokens, empty)[0], log_probs(made, tokens)[0])


@pytest.mark.parametrize("cutoffs", [(), (3, 7)])
@torch.no_grad()
def test_a_change_reaches_nothing_before_it_and_no_other_line(cutoffs):
    made, tokens = model(cutoffs=cutoffs), lines(2, 30)
    tokens[:, 12] = BOUNDARY
    before, _ = log_probs(made, tokens)
    for t in (29, 17, 3):
        changed = tokens.clone()
        changed[0, t] = tokens[0, t] % 11 + 1  # another token, but no boundary
        after, _ = log_probs(made, changed)
        assert torch.equal(after[0, : t - 1], before[0, : t - 1]) and torch.equal(after[1], before[1])
        assert after[0, t - 1] != before[0, t - 1]  # the changed token's own probability
    assert torch.equal(after[0, 12:], before[0, 12:]), "a change at 3 reached the next line"
    joined = model(cutoffs=cutoffs, joined=True)
    assert not torch.allclose(log_probs(joined, changed)[0][0, 12:], log_probs(joined, tokens)[0][0, 12:])


@pytest.mark.parametrize("cutoffs", [(), (3, 7)])
@torch.no_grad()
def test_probabilities_sum_to_one_and_are_those_of_targets(cutoffs):
    made, tokens = model(cutoffs=cutoffs), lines(3, 9)
    hidden, _ = made(tokens[:, :-1])
    every = torch.stack([made.log_probs(hidden, torch.full((3, 8), token)) for token in range(12)], -1)
    torch.testing.assert_close(every.exp().sum(-1), torch.ones(3, 8).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(made.log_probs(hidden, tokens[:, 1:]), every.gather(-1, tokens[:, 1:, None])[..., 0])


def test_settings_that_cannot_be_are_named():
    saved = vars(LMConfig(12, cutoffs=(3,)))
    assert LMConfig.of(saved) == LMConfig(12, cutoffs=(3,))
    assert_raises((
        (lambda: LMConfig(12, width=20, heads=3), "must be an even multiple of the number of heads, 3"),
        (lambda: LMConfig(12, layers=0), "layers 0"),
        (lambda: LMConfig(12, dropout=1.0), r"dropout 1\.0"),
        (lambda: LMConfig(12, cutoffs=(7, 3)), r"cutoffs \(7, 3\)"),
        (lambda: LMConfig(12, memory=-1), "memory -1"),
        (lambda: LMConfig(1 << 40), "vocabulary 1099511627776"),
        (lambda: LMConfig.of({}), "not those of a language model"),
        (lambda: LMConfig.of([]), "not those of a language model"),
        (lambda: LMConfig.of(saved | {"width": 2.0}), r"width is 2\.0"),
        (lambda: LMConfig.of(saved | {"cutoffs": ("3",)}), r"cutoffs is \('3',\)"),
    ))  # fmt: skip


TOKENS = Tokens(["</s>", "<unk>", *"abcdefghij"], characters=False, lower_case=True)
TEXTS = ["a b c", "", "j", "a zebra c", " ".join("abcdefghij" * 9), "C  A", " ".join("jihg" * 20)]


def by_hand(made, text):
    """Returns log p of a text, which the model reads as one row."""
    numbers = {name: i for i, name in enumerate(TOKENS.names)}
    row = [0, *(numbers.get(w, 1) for w in text.lower().split()), 0]
    return float(log_probs(made, torch.tensor([row]))[0].sum())


@torch.no_grad()
def test_scores_in_batches_are_those_one_by_one(monkeypatch):
    made = model(memory=200)
    lm = NeuralLM(made, TOKENS)
    want = [by_hand(made, text) for text in TEXTS]
    assert lm(TEXTS) == pytest.approx(want, abs=1e-9) and lm([]) == []
    assert [lm([text])[0] for text in TEXTS] == pytest.approx(want, abs=1e-9)
    lm.segment = 7  # several segments, with memory from one to the next
    assert lm(TEXTS) == pytest.approx(want, abs=1e-9)
    monkeypatch.setattr("jasper_fast.lm.neural.scoring._TOKENS", 20)  # several batches
    monkeypatch.setattr("jasper_fast.lm.neural.scoring._LOGITS", 60)  # a softmax over five tokens at a time
    assert lm(TEXTS) == pytest.approx(want, abs=1e-9)
    assert lm(["b c"])[0] == pytest.approx(lm(["B  C"])[0]) and not made.training


@torch.no_grad()
def test_perplexity_counts_ends_and_unknown_words(tmp_path):
    made = model()
    (tmp_path / "text").write_text("a b c\n\nA zebra c\n")
    found = NeuralLM(made, TOKENS).perplexity(tmp_path / "text")
    want = (by_hand(made, "a b c") + by_hand(made, "a zebra c")) / math.log(10)
    assert (found.sentences, found.words, found.unknown) == (2, 6, 1) and found.log10 == pytest.approx(want)
    assert found.value == pytest.approx(10 ** (-want / 8)) and found.known != found.value
    joined = model(joined=True)
    want = float(log_probs(joined, torch.tensor([[0, 2, 3, 4, 0, 2, 1, 4, 0]]))[0].sum()) / math.log(10)
    assert NeuralLM(joined, TOKENS).perplexity(tmp_path / "text").log10 == pytest.approx(want)


def test_a_training_reads_each_token_once_an_epoch():
    stream = Stream(np.arange(64, dtype=np.int32), 4, 5, seed=1)
    assert stream.steps == 3
    seen = [stream.segment(2, position) for position in range(3)]
    assert all(part.shape == (4, 6) for part in seen)
    for before, after in itertools.pairwise(seen):
        assert torch.equal(before[:, -1], after[:, 0]), "a row does not continue where its last segment ended"
    assert len(torch.cat(seen)[:, :-1].unique()) == 60
    assert not torch.equal(stream.segment(1, 0), stream.segment(2, 0))
    assert stream.names(2, 0)[0] == f"tokens {int(seen[0][0, 0])} to {int(seen[0][0, 0]) + 5}"


def test_a_vocabulary_is_of_the_most_frequent(tmp_path):
    (tmp_path / "text").write_text("b a\nC a c\n")
    found = Tokens.count([TextFile(tmp_path / "text", lower_case=True)], 2)
    assert found.names == ["</s>", "<unk>", "a", "c"] and list(found.encode(["c", "b", "a"])) == [3, 1, 2]
    letters = Tokens.count([TextFile(tmp_path / "text", True)], 10)
    assert letters.names[2:4] == [" ", "a"] and letters.pieces(" a  b ") == ["a", " ", "b"]
    assert_raises((
        (lambda: Tokens(["a"], False, False), "not a list of words"),
        (lambda: Tokens(["</s>", "<unk>", 3], False, False), "not a list of words"),
        (lambda: Tokens(["</s>", "<unk>", "a", "a"], False, False), "a word is listed twice"),
    ))  # fmt: skip
