"""The definition: plain Python, one prefix after the other."""

from __future__ import annotations

from math import exp, inf, log1p

import torch
from torch import Tensor

from jasper_fast.kernels.prefix_beam.ngram import Ngram

Prefix = tuple[int, ...]


def search(
    log_probs: Tensor,
    lengths: Tensor,
    beam: int,
    n_best: int,
    lm: Ngram | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``n_best`` prefixes of each utterance: symbols (N, n_best, T) int32, how many of them (N, n_best) int32, and
    (N, n_best, 2) fp64, score and log(b + n). Where there are fewer prefixes, the count is -1 and the scores -inf."""
    count, frames, _ = log_probs.shape
    symbols = torch.zeros(count, n_best, frames, dtype=torch.int32)
    counts = torch.full((count, n_best), -1, dtype=torch.int32)
    scores = torch.full((count, n_best, 2), -inf, dtype=torch.float64)
    for i, (rows, length) in enumerate(zip(log_probs.tolist(), lengths.tolist(), strict=True)):
        for k, (prefix, score, acoustic) in enumerate(_search(rows[:length], beam, lm, alpha, beta)[:n_best]):
            symbols[i, k, : len(prefix)] = torch.tensor(prefix, dtype=torch.int32)
            counts[i, k] = len(prefix)
            scores[i, k] = torch.tensor([score, acoustic], dtype=torch.float64)
    return symbols, counts, scores


def _add(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    low, high = min(a, b), max(a, b)
    return high if low == -inf else high + log1p(exp(low - high))


def _arc(lm: Ngram, state: int, symbol: int) -> tuple[float, int]:
    """log10 p(symbol | state), and the state after the symbol."""
    for arc in range(int(lm.arc_begin[state]), int(lm.arc_begin[state + 1])):
        if int(lm.arc_symbol[arc]) == symbol:
            return float(lm.arc_log10[arc]), int(lm.arc_next[arc])
    probability, following = _arc(lm, int(lm.lower[state]), symbol)
    return float(lm.back_off[state]) + probability, following


def _search(
    rows: list[list[float]], beam: int, lm: Ngram | None, alpha: float, beta: float
) -> list[tuple[Prefix, float, float]]:
    """Prefixes with their scores and log(b + n), the best first."""
    kept: dict[Prefix, tuple[float, float]] = {(): (0.0, -inf)}  # the beam: log b and log n of each prefix
    bonus: dict[Prefix, float] = {(): 0.0}  # the sum over a prefix's symbols
    states: dict[Prefix, int] = {(): lm.start if lm else 0}

    def score(prefix: Prefix) -> float:
        return _add(*found[prefix]) + bonus[prefix]

    for row in rows:
        blank = len(row) - 1
        found = {}
        for prefix, (b, n) in kept.items():
            found[prefix] = (_add(b, n) + row[blank], n + row[prefix[-1]] if prefix else -inf)
        for prefix, (b, n) in kept.items():
            for symbol in range(blank):
                paths = b if prefix and symbol == prefix[-1] else _add(b, n)  # a symbol twice needs a blank between
                longer = (*prefix, symbol)
                b_before, n_before = found.get(longer, (-inf, -inf))
                found[longer] = (b_before, _add(n_before, paths + row[symbol]))
                if longer not in bonus:
                    gain, states[longer] = _arc(lm, states[prefix], symbol) if lm else (0.0, 0)
                    bonus[longer] = bonus[prefix] + (alpha * gain + beta)
        best = sorted((p for p in found if score(p) > -inf), key=score, reverse=True)[:beam]  # stable
        kept = {prefix: found[prefix] for prefix in best}
    ended = []
    for prefix, (b, n) in kept.items():
        end = alpha * _arc(lm, states[prefix], len(rows[0]) - 1 if rows else _blank(lm))[0] if lm else 0.0
        ended.append((prefix, _add(b, n) + bonus[prefix] + end, _add(b, n)))
    return sorted(ended, key=lambda item: item[1], reverse=True)


def _blank(lm: Ngram) -> int:
    return int(lm.arc_begin[1]) - 1  # state 0 has an arc for every class
