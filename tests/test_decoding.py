"""Tests greedy decoding: repeats, blanks, lengths, times, confidences."""

import itertools

import pytest
import torch
from conftest import assert_raises

from jasper_fast.speech.decoding import greedy_decode, greedy_transcripts
from jasper_fast.speech.text import Vocabulary

V = Vocabulary(" ab")


def paths(*rows, p=0.9):
    """Returns log-probs (N, T, V) and lengths. The best path of utterance n is ``rows[n]``, where "_" is the blank."""
    probs = torch.full((len(rows), max(map(len, rows)), V.n_classes), (1 - p) / (V.n_classes - 1))
    for n, row in enumerate(rows):
        for t, c in enumerate(row):
            probs[n, t, V.blank if c == "_" else V.labels.index(c)] = p
    return probs.log(), torch.tensor([len(row) for row in rows])


def test_collapses_and_drops_blanks():
    log_probs, lengths = paths("aab__ba", "a_a", "____", "aa  bb")
    for form in (log_probs, log_probs.bfloat16(), log_probs.transpose(1, 2).contiguous().transpose(1, 2)):
        assert greedy_decode(form, lengths, V) == ["abba", "aa", "", "a b"]


def test_respects_lengths():
    log_probs, _ = paths("abab", "abab", "abab")
    log_probs[2, 2:] = float("nan")
    assert greedy_decode(log_probs, torch.tensor([4, 0, 2]), V) == ["abab", "", "ab"]


def test_against_the_definition():
    log_probs, lengths = torch.randn(20, 50, 29).log_softmax(-1), torch.randint(0, 51, (20,))
    vocabulary = Vocabulary()
    expected = [
        vocabulary.decode(c for c, _ in itertools.groupby(row[:n].argmax(-1).tolist()))
        for row, n in zip(log_probs, lengths.tolist(), strict=True)
    ]
    assert greedy_decode(log_probs, lengths, vocabulary) == expected
    assert [t.text for t in greedy_transcripts(log_probs, lengths, vocabulary)] == expected


def test_wrong_sizes_and_items_with_nan_are_named():
    log_probs, lengths = paths("ab", "ab")
    log_probs[1, 0, 2] = float("nan")
    assert_raises((
        (lambda: greedy_decode(log_probs, lengths, V), r"items \[1\]"),
        (lambda: greedy_decode(log_probs, lengths, Vocabulary()), "4 classes, but the vocabulary has 29"),
        (lambda: greedy_decode(log_probs[0], lengths, V), r"\(N, T, V\)"),
    ))  # fmt: skip


def test_times_and_confidences():
    (t,) = greedy_transcripts(*paths("_aab_ _b", p=0.8), V, frame_seconds=0.5)
    assert t.text == "ab b"
    assert [(w.text, w.start, w.end) for w in t.words] == [("ab", 0.5, 2.0), ("b", 3.5, 4.0)]
    assert [(s.text, s.start, s.end) for s in t.symbols][:2] == [("a", 0.5, 1.5), ("b", 1.5, 2.0)]
    assert t.words[0].confidence == pytest.approx(0.64) and t.confidence == pytest.approx(0.8)
    (empty,) = greedy_transcripts(*paths("__"), V)
    assert empty.words == [] and empty.confidence == 1.0
    (spaces,) = greedy_transcripts(*paths(" a _ b "), V)
    assert [w.text for w in spaces.words] == ["a", "b"]


def test_a_vocabulary_of_words():
    v = Vocabulary(["one", "two"])
    probs = torch.full((1, 5, 3), 0.05)
    probs[0, torch.arange(5), torch.tensor([1, 1, 2, 0, 1])] = 0.9
    log_probs, lengths = probs.log(), torch.tensor([5])
    assert greedy_decode(log_probs, lengths, v) == ["two one two"]
    (transcript,) = greedy_transcripts(log_probs, lengths, v)
    assert transcript.text == "two one two"
    assert [(w.text, round(w.start, 2)) for w in transcript.words] == [("two", 0.0), ("one", 0.06), ("two", 0.08)]
