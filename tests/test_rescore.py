"""Tests the rescoring of N-best lists by a function from texts to log-probabilities."""

import math

import pytest
import torch
from conftest import assert_raises

from jasper_fast.lm.decoders import decoder
from jasper_fast.lm.rescore import Rescoring, remembering, rescore
from jasper_fast.speech.decoding import Hypothesis
from jasper_fast.speech.text import Vocabulary


def hypothesis(text: str, score: float) -> Hypothesis:
    return Hypothesis(text, score, score, ())


LISTS = [[hypothesis("a", -1.0), hypothesis("b", -2.0), hypothesis("c", -3.0)], [hypothesis("b", -1.0)], []]
LOG_P = {"a": -5.0, "b": -1.0, "c": -math.inf}


def test_scores_add_up_and_the_best_come_first():
    asked = []

    def scorer(texts):
        asked.append(list(texts))
        return [LOG_P[t] for t in texts]

    found = rescore(LISTS, scorer, weight=0.5, batch_size=2)
    assert [[(h.text, h.score) for h in hypotheses] for hypotheses in found] == [
        [("b", -2.5), ("a", -3.5), ("c", -math.inf)],
        [("b", -1.5)],
        [],
    ]
    assert asked == [["a", "b"], ["c"]], "each text once, in batches"
    assert found[0][0].log_prob == -2.0
    assert rescore(LISTS, scorer, weight=0.0) == LISTS
    assert [h.text for h in rescore(LISTS, scorer, weight=-0.5)[0]] == ["a", "b", "c"], "the impossible text is last"
    assert rescore([[hypothesis("a", -1.0), hypothesis("d", -1.0)]], lambda t: [0.0] * len(t))[0][0].text == "a"


@pytest.mark.parametrize(
    ("scorer", "settings", "message"),
    [
        (lambda texts: [0.0], {}, "returned 1 values for 3 texts"),
        (lambda texts: [0.0, math.nan, 0.0], {}, "returned nan for 'b'"),
        (lambda texts: [math.inf] * 3, {}, "returned inf for 'a'"),
        (lambda texts: [0.0] * 3, {"weight": math.nan}, "weight nan"),
        (lambda texts: [0.0] * 3, {"batch_size": 0}, "batch_size 0"),
    ],
)
def test_what_is_no_scorer_is_named(scorer, settings, message):
    with pytest.raises(ValueError, match=message):
        rescore(LISTS, scorer, **settings)


def test_a_rescoring_refuses_settings_out_of_range():
    assert_raises((
        (lambda: Rescoring(None, len, Vocabulary(), weight=math.inf), "weight inf"),
        (lambda: Rescoring(None, len, Vocabulary(), n_best=0), "n_best 0"),
    ))  # fmt: skip


def test_texts_are_remembered():
    asked = []
    scorer = remembering(lambda texts: asked.append(list(texts)) or [LOG_P[t] for t in texts])
    assert scorer(["a", "b", "a"]) == [-5.0, -1.0, -5.0] and scorer(["b", "c"]) == [-1.0, -math.inf]
    assert asked == [["a", "b"], ["c"]]


def test_a_decoder_gives_the_text_and_the_times_of_the_rescored_best():
    v = Vocabulary([" ", "a", "b"])
    # "a b" is a little likelier than "b b", and both are several times likelier than any other.
    frames = [[0.01, 0.5, 0.4, 0.09], [0.97, 0.01, 0.01, 0.01], [0.01, 0.01, 0.01, 0.97], [0.01, 0.01, 0.97, 0.01]]
    log_probs = torch.tensor([frames, frames]).log()
    lengths = torch.tensor([4, 0])
    known = {"a b": -3.0, "b b": -1.0}
    plain = decoder(v, beam=64, n_best=64)
    second = Rescoring(plain, lambda texts: [known.get(t, -50.0) for t in texts], v, weight=0.5, n_best=2)
    before, after = (d.begin(log_probs, lengths, 0.02)() for d in (plain, second))
    assert (before[0].text, after[0].text) == ("a b", "b b") and after[1].text == ""
    assert [w.text for w in after[0].words] == ["b", "b"] and after[0].words[1].start == pytest.approx(0.06)
    assert after[0].words[0].confidence == pytest.approx(0.4)
    by_text = {h.text: h for h in before[0].hypotheses}
    assert [h.text for h in after[0].hypotheses] == ["b b", "a b"]
    assert [h.score for h in after[0].hypotheses] == pytest.approx(
        [by_text["b b"].score - 0.5, by_text["a b"].score - 1.5], abs=1e-6
    )
    second.weight = 0.0
    (again, _) = second.begin(log_probs, lengths, 0.02)()
    assert again.text == "a b" and again.words == before[0].words
    second.close()
