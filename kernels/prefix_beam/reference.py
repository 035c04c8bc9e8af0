"""The definition of the search, in plain Python, one prefix after the other."""

from math import exp, inf, log1p

import torch
from torch import Tensor

from jasper_fast.kernels.prefix_beam.ngram import Ngram
from jasper_fast.kernels.prefix_beam.words import Words

Prefix = tuple[int, ...]
# what language models and beta add to the score of a prefix, and the states of the n-gram and of the words after it
Weighed = tuple[float, int, tuple[int, int]]


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
    """Returns the ``n_best`` best prefixes of each utterance: their symbols, lengths and scores.

    symbols (N, n_best, T) int32, lengths (N, n_best) int32, scores (N, n_best, 2) fp64: the score and log(b + n). For
    missing prefixes, if there are fewer than n_best, the length is -1 and the scores are -inf. A NaN in
    log_probs counts as -inf.
    """
    count, frames, _ = log_probs.shape
    symbols = torch.zeros(count, n_best, frames, dtype=torch.int32)
    counts = torch.full((count, n_best), -1, dtype=torch.int32)
    scores = torch.full((count, n_best, 2), -inf, dtype=torch.float64)
    utterances = zip(log_probs.nan_to_num(-inf, inf, -inf).tolist(), lengths.tolist(), strict=True)
    for i, (rows, length) in enumerate(utterances):
        for k, (prefix, score, acoustic) in enumerate(_search(rows[:length], beam, lm, alpha, beta, words)[:n_best]):
            symbols[i, k, : len(prefix)] = torch.tensor(prefix, dtype=torch.int32)
            counts[i, k] = len(prefix)
            scores[i, k] = torch.tensor([score, acoustic], dtype=torch.float64)
    return symbols, counts, scores


def _add(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    low, high = min(a, b), max(a, b)
    return high if low == -inf else high + log1p(exp(low - high))


def _arc(lm: Ngram, state: int, symbol: int) -> tuple[float, int]:
    """Returns log10 p(symbol | state), and the state after the symbol."""
    for arc in range(int(lm.arc_begin[state]), int(lm.arc_begin[state + 1])):
        if int(lm.arc_symbol[arc]) == symbol:
            return float(lm.arc_log10[arc]), int(lm.arc_next[arc])
    probability, following = _arc(lm, int(lm.lower[state]), symbol)
    return float(lm.back_off[state]) + probability, following


def _child(words: Words, node: int, symbol: int) -> int:
    """Returns the node after `symbol`, or M, the number of nodes, if no word begins that way."""
    outside = len(words.word)
    for child in range(*words.child_begin[node : node + 2].tolist()) if node < outside else ():
        if int(words.child_symbol[child]) == symbol:
            return int(words.child_next[child])
    return outside


def _word(words: Words, state: tuple[int, int], alpha: float) -> tuple[float, int]:
    """Returns what the word that ends in `state` adds to the score, and the n-gram's state after it."""
    context, node = state
    if node == 0:  # no word ends: no letter since the last space or the start of the text
        return 0.0, context
    word = int(words.word[node]) if node < len(words.word) else -1
    log10, context = _arc(words.lm, context, int(words.classes[word]))
    return alpha * log10 + float(words.extra[word]) - float(words.ahead[node]), context


def _spell(words: Words, state: tuple[int, int], symbol: int, alpha: float) -> tuple[float, tuple[int, int]]:
    """Returns what `symbol` adds to the score of the words, and the state after it: the n-gram's state and the node."""
    if symbol == words.space:
        gain, context = _word(words, state, alpha)
        return gain, (context, 0)
    after = _child(words, state[1], symbol)
    return float(words.ahead[after]) - float(words.ahead[state[1]]), (state[0], after)


def _end(lm: Ngram | None, state: int, spelt: tuple[int, int], words: Words | None, alpha: float, blank: int) -> float:
    """Returns what the end of the text adds to the score."""
    end = alpha * _arc(lm, state, blank)[0] if lm else 0.0
    if words:
        gain, context = _word(words, spelt, alpha)
        end += gain + alpha * _arc(words.lm, context, _blank(words.lm))[0]
    return end


def _search(
    rows: list[list[float]], beam: int, lm: Ngram | None, alpha: float, beta: float, words: Words | None
) -> list[tuple[Prefix, float, float]]:
    """Returns prefixes with their scores and log(b + n), the best first."""
    kept: dict[Prefix, tuple[float, float]] = {(): (0.0, -inf)}  # the beam: log b and log n of each prefix
    weighed: dict[Prefix, Weighed] = {(): (0.0, lm.start if lm else 0, (words.lm.start if words else 0, 0))}

    def score(prefix: Prefix) -> float:
        return _add(*found[prefix]) + weighed[prefix][0]

    def weigh(prefix: Prefix, symbol: int) -> Weighed:
        bonus, state, spelt = weighed[prefix]
        gain, state = _arc(lm, state, symbol) if lm else (0.0, 0)
        by_words, spelt = _spell(words, spelt, symbol, alpha) if words else (0.0, spelt)
        return alpha * gain + beta + by_words + bonus, state, spelt

    blank = len(rows[0]) - 1 if rows else _blank(lm) if lm else 0
    for row in rows:
        found = {p: (_add(b, n) + row[blank], n + row[p[-1]] if p else -inf) for p, (b, n) in kept.items()}
        for prefix, (b, n) in kept.items():
            for symbol in range(blank):
                paths = b if prefix and symbol == prefix[-1] else _add(b, n)  # a repeated symbol needs a blank between
                longer = (*prefix, symbol)
                b_before, n_before = found.get(longer, (-inf, -inf))
                found[longer] = (b_before, _add(n_before, paths + row[symbol]))
                if longer not in weighed:
                    weighed[longer] = weigh(prefix, symbol)
        best = sorted((p for p in found if score(p) > -inf), key=score, reverse=True)[:beam]  # stable
        kept = {prefix: found[prefix] for prefix in best}
    ended = [
        (p, _add(b, n) + weighed[p][0] + _end(lm, *weighed[p][1:], words, alpha, blank), _add(b, n))
        for p, (b, n) in kept.items()
    ]
    return sorted((item for item in ended if item[1] > -inf), key=lambda item: item[1], reverse=True)


def _blank(lm: Ngram) -> int:
    return int(lm.arc_begin[1]) - 1  # state 0 has an arc for every class
