"""Beam search over a model's symbols: no lexicon, no dependency."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from jasper_fast.lm import faces
from jasper_fast.lm.spelt import SpeltLM, hot_words_alone
from jasper_fast.lm.symbols import SymbolLM
from jasper_fast.speech.decoding import Hypothesis, NotFinite
from jasper_fast.speech.text import Vocabulary

_MOST = 1 << 20  # a wider beam is a mistake


def check(log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary) -> None:
    """Raises ValueError where shapes, classes or lengths do not fit, NotFinite where a valid frame holds NaN or no
    possible class."""
    if log_probs.dim() != 3 or lengths.shape != log_probs.shape[:1]:
        raise ValueError(
            f"log_probs must be (N, T, V) and lengths (N,), got {tuple(log_probs.shape)} and {tuple(lengths.shape)}"
        )
    if log_probs.shape[2] != vocabulary.n_classes:
        raise ValueError(
            f"log_probs have {log_probs.shape[2]} classes, the vocabulary {vocabulary.n_classes} with its blank; "
            "decode with the labels that the model was trained on"
        )
    frames = log_probs.shape[1]
    if bool(((lengths < 0) | (lengths > frames)).any()):
        raise ValueError(f"lengths must be in 0..{frames}, got {lengths.tolist()}")
    best = log_probs.detach().amax(-1)  # NaN where a frame holds one
    within = torch.arange(frames, device=best.device) < lengths.to(best.device)[:, None]
    broken = (within & ~torch.isfinite(best)).any(1).nonzero().flatten().tolist()
    if broken:
        raise NotFinite(f"log_probs hold NaN, or no possible class, in valid frames of batch items {broken}")


def check_weights(beam: int, alpha: float, beta: float, n_best: int) -> None:
    """Raises ValueError for a beam, weights or a number of hypotheses that no search can use."""
    if not (0 < beam <= _MOST and 0 < n_best <= _MOST):
        raise ValueError(f"beam {beam} and n_best {n_best} must be from 1 to {_MOST}")
    if not (math.isfinite(alpha) and math.isfinite(beta) and alpha >= 0):
        raise ValueError(f"alpha {alpha} and beta {beta} must be finite, and alpha not negative")


def beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    vocabulary: Vocabulary,
    *,
    beam: int = 128,
    lm: SymbolLM | SpeltLM | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    n_best: int = 1,
    hot_words: Mapping[str, float] | None = None,
    backend: str = "auto",
) -> list[list[Hypothesis]]:
    """The ``n_best`` texts of each utterance, the best first, by CTC prefix search: probabilities of paths are summed.

    log_probs (N, T, V) of any float dtype, natural logarithms, the blank last; lengths (N,) in frames. ``score`` is
    log p_CTC(text) + sum over its symbols of (alpha * log10 p_LM + beta) + alpha * log10 p_LM(end): alpha is in the
    scale of the Jasper paper, 2.3 where both probabilities weigh the same. Without ``lm`` alpha has no effect. With a
    SpeltLM the sum is over words, and ``lm.unknown`` is added for each that it does not list. ``hot_words`` maps
    a word to what is added each time it is said, a natural logarithm: 5 makes it 148 times as likely.
    ``backend``: "cpu" (C++, a thread an utterance), "triton" (on a GPU, to beam 128 and 32 classes, no words),
    "reference" (plain Python, the definition), or "auto": "triton" for log-probs on a GPU where it can search and is
    found to be right, else "cpu" where it is built; they are copied to the host for it. Raises ValueError for wrong
    shapes or settings, and NotFinite for NaN in a valid frame. Equivalent, at beam 1 without lm and where one path has
    nearly all probability: ``greedy_decode``.
    """
    check(log_probs, lengths, vocabulary)
    check_weights(beam, alpha, beta, n_best)
    if lm is not None and lm.vocabulary != vocabulary:
        raise ValueError(f"{lm.path} was read for another vocabulary")
    n_best = min(n_best, beam)
    log_probs = log_probs.detach().float()
    words = ngram = None
    if isinstance(lm, SpeltLM):
        words, beta = lm.words(alpha, beta, hot_words), 0.0
    else:
        ngram = lm.ngram if lm and alpha else None
        words = hot_words_alone(hot_words, vocabulary) if hot_words else None
    face = faces.choose(backend, log_probs, beam, ngram, words)
    if face.__name__.rpartition(".")[2] != "triton_impl":
        log_probs, lengths = log_probs.cpu(), lengths.cpu()
    found = face.search(log_probs, lengths, beam, n_best, ngram, float(alpha), float(beta), words)
    found = [tensor.cpu() for tensor in found]
    return [_hypotheses(*item, vocabulary) for item in zip(*found, strict=True)]


def _hypotheses(symbols: Tensor, counts: Tensor, scores: Tensor, vocabulary: Vocabulary) -> list[Hypothesis]:
    made = [
        Hypothesis(vocabulary.decode(row[:count].tolist()), score, acoustic, tuple(row[:count].tolist()))
        for row, count, (score, acoustic) in zip(symbols, counts.tolist(), scores.tolist(), strict=True)
        if count >= 0
    ]
    return made or [Hypothesis("", -math.inf, -math.inf, ())]
