"""Tries weights of a language model on saved log-probs, and finds those with the fewest word errors."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jasper_fast.lm.decoders import decoder, load_lm
from jasper_fast.lm.rescore import LISTED, Scorer, remembering, rescore
from jasper_fast.lm.saved import Saved
from jasper_fast.lm.search import check_weights
from jasper_fast.speech.decoding import greedy_decode
from jasper_fast.speech.metrics import Errors, word_errors


@dataclass(frozen=True)
class Trial:
    """Weights and the word errors with them. ``rescore``: the weight of a second pass, or 0 without a second pass."""

    alpha: float
    beta: float
    errors: Errors
    rescore: float = 0.0


def trials(
    saved: Saved,
    lm: str | os.PathLike | None,
    lexicon: str | os.PathLike | None,
    grid: Sequence[tuple[float, float]],
    beam: int,
    processes: int | None = None,
    second: tuple[Scorer, Sequence[float]] | None = None,
) -> Iterator[Trial]:
    """Decodes the utterances with each pair (alpha, beta) of ``grid`` and counts word errors. ``second``: a scorer and
    weights; the N-best lists are then rescored with each of these weights. Raises LanguageModelError and ValueError as
    the decoders do."""
    for weights in grid:
        check_weights(beam, *weights, 1)
    utterances = [*saved.batches()]
    references = [u["text"] for u in saved.utterances]
    loaded = load_lm(lm, saved.vocabulary, lexicon) if lm is not None else None
    search = decoder(saved.vocabulary, loaded, beam=beam, processes=processes, n_best=LISTED if second else 1)
    scorer, seconds = (remembering(second[0]), second[1]) if second else (None, (0.0,))
    try:
        for search.weights in grid:
            begun = [search.begin(*utterance, saved.frame_seconds) for utterance in utterances]
            lists = [transcript.hypotheses for heard in begun for transcript in heard()]
            for weight in seconds:
                again = rescore(lists, scorer, weight) if scorer else lists
                errors = word_errors(references, [hypotheses[0].text for hypotheses in again])
                yield Trial(*search.weights, errors, weight)
    finally:
        search.close()


def greedy(saved: Saved) -> Errors:
    """Returns the word errors of greedy decoding, without a language model."""
    return word_errors(
        [u["text"] for u in saved.utterances],
        [greedy_decode(*utterance, saved.vocabulary)[0] for utterance in saved.batches()],
    )


def best(found: Sequence[Trial]) -> Trial:
    """Returns the trial with the fewest errors. Ties go to the smallest weights."""
    return min(found, key=lambda t: (t.errors.total, t.alpha, abs(t.beta), abs(t.rescore)))
