"""Rescoring of N-best lists by a function from texts to log-probabilities."""

import math

import pytest

from jasper_fast.lm.rescore import rescore
from jasper_fast.speech.decoding import Hypothesis


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
    assert rescore([[hypothesis("a", -1.0), hypothesis("d", -1.0)]], lambda t: [0.0] * len(t))[0][0].text == "a"


@pytest.mark.parametrize(
    ("scorer", "settings", "message"),
    [
        (lambda texts: [0.0], {}, "gave 1 values for 3 texts"),
        (lambda texts: [0.0, math.nan, 0.0], {}, "gave nan for 'b'"),
        (lambda texts: [math.inf] * 3, {}, "gave inf for 'a'"),
        (lambda texts: [0.0] * 3, {"weight": math.nan}, "weight nan"),
        (lambda texts: [0.0] * 3, {"batch_size": 0}, "batch_size 0"),
    ],
)
def test_what_is_no_scorer_is_named(scorer, settings, message):
    with pytest.raises(ValueError, match=message):
        rescore(LISTS, scorer, **settings)
