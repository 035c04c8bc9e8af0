"""Beam search for a recogniser. The search of one batch runs while the model computes the next batch.

``begin`` of a decoder starts a search, and returns a function that waits for the transcripts and returns them. Until
that function returns, the caller must not change the log-probs and lengths. ``weights`` are the alpha and beta of the
next search.
"""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.lm.align import best_path
from jasper_fast.lm.arpa import Arpa, LanguageModelError
from jasper_fast.lm.neural.files import is_neural
from jasper_fast.lm.pool import Pool
from jasper_fast.lm.search import NOTHING, beam_search, check, check_weights
from jasper_fast.lm.spelt import SpeltLM, hot_words_alone
from jasper_fast.lm.symbols import SymbolLM, foreign
from jasper_fast.lm.words import WordLM, has_wheels, is_binary, word_lm
from jasper_fast.speech.decoding import Hypothesis, Transcript, path_transcript
from jasper_fast.speech.text import Vocabulary

PAPER = (2.0, -0.2)  # the default alpha and beta with a model of words, from the Jasper paper
SYMBOLS = (1.0, 0.0)  # the default alpha and beta with a model of symbols, or without a model


def load_lm(
    path: str | os.PathLike,
    vocabulary: Vocabulary,
    lexicon: str | os.PathLike | None = None,
    unknown: float | None = None,
) -> SymbolLM | WordLM | SpeltLM:
    """Loads a language model: one of symbols if there is no lexicon and all words of the ARPA file are labels,
    otherwise one of words.

    With ``unknown``, a model of words also accepts words outside the lexicon (by default the words of the file);
    ``unknown`` is added to the score for each of them. Raises LanguageModelError for a file that cannot be read or does
    not fit.
    """
    if is_neural(path):
        raise LanguageModelError(f"{path}: a neural language model only rescores; name it with --rescore")
    if lexicon is None and not is_binary(path) and not foreign(Arpa(path), vocabulary):
        if unknown is not None:
            raise LanguageModelError(f"{path}: is a model of symbols, which is always open; remove --open-vocabulary")
        return SymbolLM(path, vocabulary)
    known = word_lm(path, vocabulary, lexicon)
    return known if unknown is None else SpeltLM(known, vocabulary, unknown=unknown)


class SymbolDecoder:
    """Runs ``beam_search`` in a thread while the model computes the next batch."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        lm: SymbolLM | SpeltLM | None,
        beam: int,
        alpha: float,
        beta: float,
        n_best: int,
        hot_words: Mapping[str, float] | None = None,
    ) -> None:
        self.weights = alpha, beta
        self._vocabulary = vocabulary
        self._settings: dict[str, Any] = {"lm": lm, "beam": beam, "n_best": n_best, "hot_words": hot_words}
        if isinstance(lm, SpeltLM):  # an unusable hot word raises here, before any audio is read
            lm.words(alpha, beta, hot_words)
        elif hot_words:
            hot_words_alone(hot_words, vocabulary)
        self._thread = ThreadPoolExecutor(1)

    def begin(self, log_probs: Tensor, lengths: Tensor, frame_seconds: float) -> Callable[[], list[Transcript]]:
        check(log_probs, lengths, self._vocabulary)
        stream = torch.cuda.current_stream(log_probs.device) if log_probs.is_cuda else None
        return self._thread.submit(self._find, log_probs.detach(), lengths, frame_seconds, *self.weights, stream).result

    def _find(
        self,
        log_probs: Tensor,
        lengths: Tensor,
        frame_seconds: float,
        alpha: float,
        beta: float,
        stream: torch.cuda.Stream | None,
    ) -> list[Transcript]:
        with torch.cuda.stream(stream):  # the model's stream; on a CPU None, which has no effect
            found = beam_search(log_probs, lengths, self._vocabulary, alpha=alpha, beta=beta, **self._settings)
            items = valid_rows(log_probs, lengths)
        return [transcript_of(item, h, best_path(item, h[0].symbols), self._vocabulary, frame_seconds)
                for item, h in zip(items, found, strict=True)]  # fmt: skip

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class WordDecoder:
    """Runs flashlight's search in separate processes."""

    def __init__(
        self, vocabulary: Vocabulary, lm: WordLM, beam: int, alpha: float, beta: float, n_best: int, processes: int
    ) -> None:
        self.weights = alpha, beta
        self._vocabulary = vocabulary
        self._pool = Pool(lm, processes, beam=beam, alpha=alpha, beta=beta, n_best=n_best)

    def begin(self, log_probs: Tensor, lengths: Tensor, frame_seconds: float) -> Callable[[], list[Transcript]]:
        check(log_probs, lengths, self._vocabulary)
        items = valid_rows(log_probs, lengths)
        answers = self._pool.submit(items, self.weights)

        def finish() -> list[Transcript]:
            return [
                transcript_of(item, found or [NOTHING], path, self._vocabulary, frame_seconds)
                for item, (found, path) in zip(items, answers(), strict=True)
            ]

        return finish

    def close(self) -> None:
        self._pool.close()


def decoder(
    vocabulary: Vocabulary,
    lm: SymbolLM | WordLM | SpeltLM | None = None,
    *,
    beam: int = 128,
    alpha: float | None = None,
    beta: float | None = None,
    n_best: int = 1,
    processes: int | None = None,
    hot_words: Mapping[str, float] | None = None,
) -> SymbolDecoder | WordDecoder:
    """Returns the decoder for an acoustic model's vocabulary and a language model.

    With a word model, flashlight searches in separate processes; ``processes`` is their number (default: one per core).
    Without a word model, with hot words or an open vocabulary, or on a Python without flashlight wheels,
    ``beam_search`` runs in a thread. ``alpha`` and ``beta`` default to the paper's 2.0 and -0.2 with a word model, and
    to 1.0 and 0.0 otherwise. Raises ValueError for settings that no search can use, LanguageModelError if the model
    cannot be loaded, and MissingExtra if flashlight is to search and the extra `lm` is missing.
    """
    default = PAPER if isinstance(lm, (WordLM, SpeltLM)) else SYMBOLS
    if isinstance(lm, WordLM) and (hot_words or not has_wheels()):
        lm = SpeltLM(lm, vocabulary, unknown=-math.inf)
    alpha, beta = default[0] if alpha is None else alpha, default[1] if beta is None else beta
    check_weights(beam, alpha, beta, n_best)
    if isinstance(lm, WordLM):
        return WordDecoder(vocabulary, lm, beam, alpha, beta, n_best, processes or os.cpu_count() or 1)
    return SymbolDecoder(vocabulary, lm, beam, alpha, beta, n_best, hot_words)


def valid_rows(log_probs: Tensor, lengths: Tensor) -> list[np.ndarray]:
    """Returns the log-probs of each utterance without its padding, (T', V) fp32 each, in the host's memory."""
    rows = log_probs.float().cpu().numpy()
    return [np.ascontiguousarray(row[:length]) for row, length in zip(rows, lengths.tolist(), strict=True)]


def transcript_of(
    log_probs: np.ndarray,
    hypotheses: list[Hypothesis],
    path: np.ndarray | None,
    vocabulary: Vocabulary,
    frame_seconds: float,
) -> Transcript:
    """Returns the transcript of the first hypothesis. Times and confidences of words come from ``path``, the best CTC
    path of that hypothesis."""
    if path is None:  # nothing was found, so the text is empty
        path = np.full(len(log_probs), vocabulary.blank)
    transcript = path_transcript(path, np.exp(log_probs[np.arange(len(path)), path]), vocabulary, frame_seconds)
    return replace(transcript, text=hypotheses[0].text, hypotheses=tuple(hypotheses))
