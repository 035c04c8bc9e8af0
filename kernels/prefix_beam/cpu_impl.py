"""The CPU face of the search: C++ (csrc/cpu/prefix_beam.cpp), one thread per utterance.

For fp32 log_probs, its results equal those of reference.py in every bit.
"""

from math import inf

import torch
from torch import Tensor

from jasper_fast.kernels import native
from jasper_fast.kernels.prefix_beam.ngram import Ngram
from jasper_fast.kernels.prefix_beam.words import Words


def search(
    log_probs: Tensor,
    lengths: Tensor,
    beam: int,
    n_best: int,
    lm: Ngram | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    words: Words | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `reference.search` does. log_probs are converted to fp32 and need not be contiguous."""
    log_probs, lengths = log_probs.float().nan_to_num(-inf, inf, -inf).contiguous(), lengths.long().contiguous()
    count, frames, _ = log_probs.shape
    symbols = torch.zeros(count, n_best, frames, dtype=torch.int32)
    counts = torch.empty(count, n_best, dtype=torch.int32)
    scores = torch.empty(count, n_best, 2, dtype=torch.float64)
    arrays, start = (list(lm[:-1]), lm.start) if lm else ([], 0)
    spelt = [list(words[:7]), words.space, list(words.lm[:-1]), words.lm.start] if words else [[], 0, [], 0]
    native.cpu().prefix_beam(log_probs, lengths, beam, arrays, start, alpha, beta, *spelt, symbols, counts, scores)
    return symbols, counts, scores
