"""Greedy CTC decoding. The best class of each frame and its log-prob are found on the device of the log-probs, and
copied to the host once per batch.

Shapes: N utterances, T frames, V classes; the blank is the last class.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from jasper_fast.speech.text import Hypothesis, Vocabulary


class NotFinite(ValueError):
    """The log-probs of an utterance contain NaN."""


@dataclass(frozen=True)
class Word:
    """A word or symbol of a transcript: text, start and end in seconds, and confidence (0 to 1)."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Transcript:
    """A text with the times of its symbols and words. ``confidence`` is the mean over the symbols, or 1 if there are
    none."""

    text: str
    symbols: list[Word]
    words: list[Word]
    confidence: float
    hypotheses: tuple[Hypothesis, ...] = ()  # results of a beam search, best first

    def shifted(self, seconds: float) -> Self:
        """Returns the transcript with all times ``seconds`` later."""
        symbols, words = (
            [replace(w, start=w.start + seconds, end=w.end + seconds) for w in pieces]
            for pieces in (self.symbols, self.words)
        )
        return replace(self, symbols=symbols, words=words)


def check_shapes(log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary) -> None:
    """Raises ValueError unless log_probs are (N, T, V) and lengths (N,), with V the vocabulary's number of classes."""
    if log_probs.dim() != 3 or lengths.shape != log_probs.shape[:1]:
        raise ValueError(
            f"log_probs must be (N, T, V) and lengths (N,), got {tuple(log_probs.shape)} and {tuple(lengths.shape)}"
        )
    if log_probs.shape[2] != vocabulary.n_classes:
        raise ValueError(
            f"log_probs have {log_probs.shape[2]} classes, but the vocabulary has {vocabulary.n_classes}, "
            "blank included; decode with the labels that the model was trained on"
        )


def _best_path(log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most probable class of each frame (-1 at t >= length) and its probability, both (N, T), on the
    host."""
    check_shapes(log_probs, lengths, vocabulary)
    best, ids = log_probs.detach().max(-1)
    beyond = torch.arange(ids.shape[1], device=ids.device) >= lengths.to(ids.device)[:, None]
    # fp32 represents class numbers exactly, so both arrays can be copied in one transfer.
    packed = torch.stack((ids.masked_fill(beyond, -1).float(), best.float().masked_fill(beyond, 0))).cpu().numpy()
    if broken := np.isnan(packed[1]).any(1).nonzero()[0].tolist():
        raise NotFinite(f"log_probs contain NaN in valid frames of batch items {broken}")
    return packed[0].astype(np.int64), np.exp(packed[1])


def _emitted(ids: np.ndarray, blank: int) -> np.ndarray:
    """Returns (T,) bool: whether a frame of the path ``ids`` (T,) begins a symbol. It does if it is valid, not blank,
    and differs from the frame before."""
    return (ids >= 0) & (ids != blank) & (np.diff(ids, prepend=-1) != 0)


def greedy_decode(log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary) -> list[str]:
    """Returns the texts of the best paths: the argmax of each frame, with repeats collapsed and blanks dropped.

    log_probs (N, T, V) of any float dtype, lengths (N,) in frames; frames at t >= length are ignored. Synchronises with
    the device once. Raises ValueError for wrong shapes or a wrong number of classes, and NotFinite, which names the
    batch items, for NaN in a valid frame.

    Equivalent, for one utterance::

        path = log_probs[:length].argmax(-1).tolist()
        text = vocabulary.decode(c for c, _ in itertools.groupby(path))  # decode drops the blanks
    """
    ids, _ = _best_path(log_probs, lengths, vocabulary)
    return [vocabulary.decode(row[_emitted(row, vocabulary.blank)].tolist()) for row in ids]


def greedy_transcripts(
    log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary, frame_seconds: float = 0.02
) -> list[Transcript]:
    """Decodes like ``greedy_decode``, and also returns the times and confidences of symbols and words.

    ``frame_seconds``: the duration of an output frame. A symbol lasts from its first frame to the end of its repeats,
    which may be shorter than its sound, because CTC needs to emit it in only one frame. Its confidence is the highest
    probability among these frames. The confidence of a word is the product over its symbols.
    """
    ids, probs = _best_path(log_probs, lengths, vocabulary)
    return [path_transcript(i, p, vocabulary, frame_seconds) for i, p in zip(ids, probs, strict=True)]


def path_transcript(ids: np.ndarray, probs: np.ndarray, vocabulary: Vocabulary, frame_seconds: float) -> Transcript:
    """Returns the transcript of one path. ``ids``: the class of each frame (T,), -1 beyond the end; ``probs``: the
    probabilities of these classes."""
    symbols = []
    emitted = _emitted(ids, vocabulary.blank)
    change = np.append(np.flatnonzero(np.diff(ids)) + 1, len(ids))
    for first in np.flatnonzero(emitted):
        end = change[np.searchsorted(change, first, side="right")]
        times = float(first * frame_seconds), float(end * frame_seconds)
        symbols.append(Word(vocabulary.labels[ids[first]], *times, float(probs[first:end].max())))
    text = vocabulary.decode(ids[emitted].tolist())
    mean = sum(s.confidence for s in symbols) / len(symbols) if symbols else 1.0
    if vocabulary.of_words:
        return Transcript(text, symbols, symbols, mean)
    words = []
    for space, group in itertools.groupby(symbols, lambda s: s.text == " "):
        if not space:
            letters = list(group)
            confidence = math.prod(s.confidence for s in letters)
            words.append(Word("".join(s.text for s in letters), letters[0].start, letters[-1].end, confidence))
    return Transcript(text, symbols, words, mean)
