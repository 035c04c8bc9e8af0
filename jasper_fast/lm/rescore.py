"""Rescores N-best lists with any language model, given as a function from texts to log-probabilities."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from jasper_fast.lm.align import best_path
from jasper_fast.lm.decoders import SymbolDecoder, WordDecoder, transcript_of, valid_rows
from jasper_fast.speech.decoding import Hypothesis, Transcript
from jasper_fast.speech.text import Vocabulary

LISTED = 64  # hypotheses per utterance that are rescored by default
Scorer = Callable[[Sequence[str]], Sequence[float]]


def rescore(
    n_best: Sequence[Sequence[Hypothesis]], scorer: Scorer, weight: float = 1.0, batch_size: int = 256
) -> list[list[Hypothesis]]:
    """Adds ``weight * log p(text)`` to each score and sorts each N-best list, the best first. Ties keep their order.

    ``scorer`` gets at most ``batch_size`` texts per call, and each distinct text only once. It returns their natural
    log-probabilities; -inf marks an impossible text, which comes last unless the weight is 0. Raises ValueError if the
    weight is not finite, if ``batch_size`` is below 1, or if the scorer returns NaN, +inf, or another number of values
    than texts.
    """
    if not math.isfinite(weight) or batch_size < 1:
        raise ValueError(f"weight {weight} must be finite and batch_size {batch_size} positive")
    texts = list(dict.fromkeys(h.text for hypotheses in n_best for h in hypotheses))
    values: list[float] = []
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        values += map(float, scorer(batch))
        if len(values) != first + len(batch):
            raise ValueError(f"the scorer returned {len(values) - first} values for {len(batch)} texts")
    gain: dict[str, float] = {}  # what is added to the score of each text
    for text, value in zip(texts, values, strict=True):
        if not value < math.inf:
            raise ValueError(f"the scorer returned {value} for {text!r}, which is no log-probability")
        gain[text] = weight * value if value > -math.inf else -math.inf if weight else 0.0
    return [
        sorted((replace(h, score=h.score + gain[h.text]) for h in hypotheses), key=lambda h: -h.score)
        for hypotheses in n_best
    ]


def remembering(scorer: Scorer) -> Scorer:
    """Returns ``scorer`` with a cache, so that each text is scored only once."""
    known: dict[str, float] = {}

    def scored(texts: Sequence[str]) -> list[float]:
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, scorer(new), strict=True))
        return [known[text] for text in texts]

    return scored


class Rescoring:
    """A decoder for a recogniser: it rescores the N-best lists of the decoder ``first`` with ``scorer``.

    Transcripts have the text, times and confidences of the best hypothesis, and the ``n_best`` best hypotheses with
    scores ``score + weight * log p(text)``. Raises ValueError if the weight is not finite or ``n_best`` is below 1, and
    later as ``rescore`` does.
    """

    def __init__(
        self,
        first: SymbolDecoder | WordDecoder,
        scorer: Scorer,
        vocabulary: Vocabulary,
        weight: float = 1.0,
        n_best: int = 1,
    ) -> None:
        if not math.isfinite(weight) or n_best < 1:
            raise ValueError(f"weight {weight} must be finite and n_best {n_best} at least 1")
        self.first, self.scorer, self.vocabulary, self.weight, self.n_best = first, scorer, vocabulary, weight, n_best

    def begin(self, log_probs: Tensor, lengths: Tensor, frame_seconds: float) -> Callable[[], list[Transcript]]:
        heard = self.first.begin(log_probs, lengths, frame_seconds)
        items = valid_rows(log_probs, lengths)

        def finish() -> list[Transcript]:
            found = heard()
            lists = rescore([t.hypotheses for t in found], self.scorer, self.weight)
            return [self._best(*each, frame_seconds) for each in zip(found, lists, items, strict=True)]

        return finish

    def _best(self, first: Transcript, listed: list[Hypothesis], log_probs: np.ndarray, seconds: float) -> Transcript:
        kept = listed[: self.n_best]
        if kept[0].text == first.text:
            return replace(first, hypotheses=tuple(kept))
        return transcript_of(log_probs, kept, best_path(log_probs, kept[0].symbols), self.vocabulary, seconds)

    def close(self) -> None:
        self.first.close()
