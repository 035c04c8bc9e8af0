"""A second pass over N-best lists by any language model: a function from texts to log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from jasper_fast.speech.decoding import Hypothesis

Scorer = Callable[[Sequence[str]], Sequence[float]]


def rescore(
    n_best: Sequence[Sequence[Hypothesis]], scorer: Scorer, weight: float = 1.0, batch_size: int = 256
) -> list[list[Hypothesis]]:
    """The N-best lists of utterances with ``score + weight * log p(text)`` as score, the best first; of equal ones the
    order stays.

    ``scorer`` takes at most ``batch_size`` texts at a time, each different text once, and gives their natural
    logarithms; those of impossible texts may be -inf. Raises ValueError for a weight that is not finite, and where the
    scorer gives another number of values than it got texts, or NaN or +inf.
    """
    if not math.isfinite(weight) or batch_size < 1:
        raise ValueError(f"weight {weight} must be finite and batch_size {batch_size} positive")
    texts = list(dict.fromkeys(h.text for hypotheses in n_best for h in hypotheses))
    values: list[float] = []
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        values += map(float, scorer(batch))
        if len(values) != first + len(batch):
            raise ValueError(f"the scorer gave {len(values) - first} values for {len(batch)} texts")
    log_p = dict(zip(texts, values, strict=True))
    for text, value in log_p.items():
        if not value < math.inf:
            raise ValueError(f"the scorer gave {value} for {text!r}, which is no log-probability")

    def scored(hypothesis: Hypothesis) -> Hypothesis:
        return replace(hypothesis, score=hypothesis.score + (weight * log_p[hypothesis.text] if weight else 0.0))

    return [sorted(map(scored, hypotheses), key=lambda h: -h.score) for hypotheses in n_best]
