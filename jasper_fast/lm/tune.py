"""Which weights of a language model give the fewest errors on saved log-probs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from jasper_fast.lm.decoders import decoder, load_lm
from jasper_fast.lm.saved import Saved
from jasper_fast.lm.search import check_weights
from jasper_fast.speech.decoding import greedy_decode
from jasper_fast.speech.metrics import Errors, word_errors


@dataclass(frozen=True)
class Trial:
    """One pair of weights and the word errors that it gave."""

    alpha: float
    beta: float
    errors: Errors


def trials(
    saved: Saved,
    lm: str | os.PathLike,
    lexicon: str | os.PathLike | None,
    grid: Sequence[tuple[float, float]],
    beam: int,
    processes: int | None = None,
) -> Iterator[Trial]:
    """Decodes the utterances with each pair (alpha, beta) and counts word errors. Raises LanguageModelError and
    ValueError as the decoders do."""
    for weights in grid:
        check_weights(beam, *weights, 1)
    arrays = [torch.from_numpy(saved.log_probs(i)) for i in range(len(saved.utterances))]
    references = [u["text"] for u in saved.utterances]
    search = decoder(saved.vocabulary, load_lm(lm, saved.vocabulary, lexicon), beam=beam, processes=processes)
    try:
        for search.weights in grid:
            begun = [search.begin(a[None], torch.tensor([len(a)]), saved.frame_seconds) for a in arrays]
            texts = [transcript.text for heard in begun for transcript in heard()]
            yield Trial(*search.weights, word_errors(references, texts))
    finally:
        search.close()


def greedy(saved: Saved) -> Errors:
    """The word errors without a language model."""
    texts = []
    for i in range(len(saved.utterances)):
        log_probs = torch.from_numpy(saved.log_probs(i))
        texts += greedy_decode(log_probs[None], torch.tensor([len(log_probs)]), saved.vocabulary)
    return word_errors([u["text"] for u in saved.utterances], texts)


def best(found: Sequence[Trial]) -> Trial:
    """That with the fewest errors; of equal ones the smallest weights."""
    return min(found, key=lambda t: (t.errors.total, t.alpha, abs(t.beta)))
