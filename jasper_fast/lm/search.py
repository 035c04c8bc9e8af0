"""Beam search over a model's symbols. It needs no lexicon and no extra package."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from jasper_fast.lm import faces
from jasper_fast.lm.spelt import SpeltLM, hot_words_alone
from jasper_fast.lm.symbols import SymbolLM
from jasper_fast.speech.decoding import Hypothesis, NotFinite, check_shapes
from jasper_fast.speech.text import Vocabulary

_MOST = 1 << 20  # the largest beam and n_best; a larger number is taken for a mistake
NOTHING = Hypothesis("", -math.inf, -math.inf, ())  # the result if every text is impossible


def check(log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary) -> None:
    """Raises ValueError if shapes, classes or lengths do not fit, and NotFinite if a valid frame has NaN or no possible
    class."""
    check_shapes(log_probs, lengths, vocabulary)
    frames = log_probs.shape[1]
    if bool(((lengths < 0) | (lengths > frames)).any()):
        raise ValueError(f"lengths must be in 0..{frames}, got {lengths.tolist()}")
    best = log_probs.detach().amax(-1)  # NaN if the frame has a NaN
    within = torch.arange(frames, device=best.device) < lengths.to(best.device)[:, None]
    if broken := (within & ~torch.isfinite(best)).any(1).nonzero().flatten().tolist():
        raise NotFinite(f"log_probs have NaN or no possible class in valid frames of batch items {broken}")


def check_weights(beam: int, alpha: float, beta: float, n_best: int) -> None:
    """Raises ValueError for a beam, weights or a number of hypotheses that no search can use."""
    if not (0 < beam <= _MOST and 0 < n_best <= _MOST):
        raise ValueError(f"beam {beam} and n_best {n_best} must be from 1 to {_MOST}")
    if not (math.isfinite(alpha) and math.isfinite(beta) and alpha >= 0):
        raise ValueError(f"alpha {alpha} and beta {beta} must be finite, and alpha at least 0")


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
    """Returns the ``n_best`` texts of each utterance, the best first, by CTC prefix search, which sums over CTC paths.

    log_probs (N, T, V): natural logarithms in any float dtype, with the blank last; lengths (N,): in frames. ``score``
    is log p_CTC(text) + sum over its symbols of (alpha * log10 p_LM + beta) + alpha * log10 p_LM(end). As in the Jasper
    paper, alpha multiplies a log10, so 2.3 gives both probabilities the same weight. Without ``lm`` alpha has no
    effect. With a SpeltLM the sum is over words, and each word outside its lexicon adds ``lm.unknown``, unless it is a
    hot word. ``hot_words`` maps a word to a natural logarithm that is added each time the word occurs: 5 makes it 148
    times as likely.

    ``backend``: "cpu" (C++, one thread per utterance), "triton" (on a GPU, up to beam 128 and 32 classes, an n-gram
    table of up to 4 GiB, no words), "reference" (plain Python, the definition) or "auto". For log-probs on a GPU,
    "auto" takes "triton" if that can do the search and gives the right results on this GPU. In all other cases it takes
    "cpu", or "reference" if the C++ library is not built, and copies log-probs to the host for it.

    Raises ValueError for wrong shapes or settings, and NotFinite if a valid frame has NaN or no possible class.
    Equivalent to ``greedy_decode`` at beam 1 without ``lm``, if one path has nearly all the probability.
    """
    check(log_probs, lengths, vocabulary)
    check_weights(beam, alpha, beta, n_best)
    if lm is not None and lm.vocabulary != vocabulary:
        raise ValueError(f"{lm.path} was loaded for another vocabulary; load it with this one")
    n_best = min(n_best, beam)
    log_probs = log_probs.detach().float()
    ngram = lm.ngram if isinstance(lm, SymbolLM) and alpha else None
    if isinstance(lm, SpeltLM):
        words, beta = lm.words(alpha, beta, hot_words), 0.0
    else:
        words = hot_words_alone(hot_words, vocabulary) if hot_words else None
    face = faces.choose(backend, log_probs, beam, ngram, words)
    if face.__name__.rpartition(".")[2] != "triton_impl":
        log_probs, lengths = log_probs.cpu(), lengths.cpu()
    found = face.search(log_probs, lengths, beam, n_best, ngram, float(alpha), float(beta), words)
    return [_hypotheses(*item, vocabulary) for item in zip(*(x.cpu() for x in found), strict=True)]


def _hypotheses(symbols: Tensor, counts: Tensor, scores: Tensor, vocabulary: Vocabulary) -> list[Hypothesis]:
    return [
        Hypothesis(vocabulary.decode(row[:count].tolist()), score, acoustic, tuple(row[:count].tolist()))
        for row, count, (score, acoustic) in zip(symbols, counts.tolist(), scores.tolist(), strict=True)
        if count >= 0
    ] or [NOTHING]
