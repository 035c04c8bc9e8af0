"""Makes the search over symbols use words: an n-gram of words, an open or closed vocabulary, and hot words."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from jasper_fast.kernels.prefix_beam.ngram import Ngram
from jasper_fast.kernels.prefix_beam.words import Words
from jasper_fast.lm.arpa import Arpa, LanguageModelError
from jasper_fast.lm.symbols import MISSING, automaton
from jasper_fast.lm.words import Entry, WordLM, entry, is_binary, word_lm
from jasper_fast.speech.text import Vocabulary

UNKNOWN = -10.0  # the default of `unknown`, which is added to the score for each word outside the lexicon
BOOST = 5.0  # the default boost of a hot word
_MOST = 20_000_000  # n-grams that a model may have


class SpeltLM:
    """A word n-gram (ARPA) for ``beam_search``, which can also allow words that it does not list.

    A word that is not in the lexicon (by default the words of the file) has the probability of <unk>. For each such
    word ``unknown``, a natural logarithm, is added to the score; with -inf the vocabulary is closed. Raises
    LanguageModelError as ``word_lm`` does. Raises it also for a KenLM binary, for a file of more than 20 million
    n-grams, and for an open vocabulary if the file has no <unk>. Raises ValueError if ``unknown`` is NaN or +inf.
    """

    def __init__(
        self,
        lm: str | os.PathLike | WordLM,
        vocabulary: Vocabulary,
        lexicon: str | os.PathLike | None = None,
        *,
        unknown: float = UNKNOWN,
    ) -> None:
        if not unknown < math.inf:
            raise ValueError(f"unknown {unknown} must be a number, or -inf")
        known = lm if isinstance(lm, WordLM) else word_lm(lm, vocabulary, lexicon)
        self.path, self.vocabulary, self.unknown = known.path, vocabulary, unknown
        self.entries, self.left_out = known.entries, known.left_out
        if is_binary(self.path):
            raise LanguageModelError(f"{self.path}: a search without flashlight needs the ARPA file of this binary")
        arpa = Arpa(self.path)
        if sum(arpa.counts) > _MOST:
            raise LanguageModelError(
                f"{self.path}: has {sum(arpa.counts)} n-grams, but a search without flashlight takes at most {_MOST}: "
                f"train a smaller model with `jasper-fast lm train --prune`"
            )
        listed = arpa.words()
        self._classes = {word: i for i, word in enumerate(listed)}
        self.ngram = automaton(arpa, [*listed, "<unk>"])
        self._has_unknown = float(self.ngram.arc_log10[len(listed)]) > MISSING
        if unknown > -math.inf and not self._has_unknown:
            raise LanguageModelError(
                f"{self.path}: has no <unk> for words that it does not list; leave --open-vocabulary out"
            )
        self._made: tuple[object, Words] | None = None

    def words(self, alpha: float, beta: float, hot_words: Mapping[str, float] | None = None) -> Words:
        """Returns the words for ``kernels.prefix_beam``. Each word adds ``beta``, and a hot word also its boost."""
        key = alpha, beta, tuple((hot_words or {}).items())
        if self._made is None or self._made[0] != key:
            hot = _hot(hot_words or {}, self.vocabulary)
            unknown = len(self._classes)
            # if words share a spelling, the first wins
            spellings = {e.symbols: self._classes.get(e.token, unknown) for e in reversed(self.entries)}
            for e in hot:
                if e.symbols not in spellings and not self._has_unknown:
                    raise LanguageModelError(f"hot word {e.token!r} is not in {self.path}, which has no <unk> either")
                spellings.setdefault(e.symbols, unknown)
            boosts = {e.symbols: boost for e, boost in hot.items()}
            extra = [beta + boosts.get(s, 0.0) for s in spellings] + [beta + self.unknown]
            classes = [*spellings.values(), unknown]
            self._made = key, _words([*spellings], classes, extra, boosts, alpha, self.ngram, self.vocabulary)
        return self._made[1]


def hot_words_alone(hot_words: Mapping[str, float], vocabulary: Vocabulary) -> Words:
    """Returns hot words for a search without a model of words.

    Raises ValueError for an unusable hot word, or unless the labels are characters and include the space.
    """
    if vocabulary.of_words or " " not in vocabulary.characters:
        raise ValueError("hot words need labels that are characters and include the space")
    boosts = {e.symbols: boost for e, boost in _hot(hot_words, vocabulary).items()}
    arcs = torch.zeros(2, dtype=torch.int32)
    none = Ngram(torch.tensor([0, 2]), torch.tensor([0, 1], dtype=torch.int32), arcs, arcs.float(), arcs[:1],
                 arcs[:1].float(), 0)  # fmt: skip
    return _words([*boosts], [0] * (len(boosts) + 1), [*boosts.values(), 0.0], boosts, 0.0, none, vocabulary)


def _hot(hot_words: Mapping[str, float], vocabulary: Vocabulary) -> dict[Entry, float]:
    found = {}
    for word, boost in hot_words.items():
        if len(word.split()) != 1:
            raise ValueError(f"hot word {word!r} is not one word; name the words of a phrase one by one")
        if not math.isfinite(boost):
            raise ValueError(f"hot word {word!r}: its boost {boost} must be finite")
        if (made := entry(word, None, vocabulary)) is None:
            raise ValueError(f"hot word {word!r} cannot be spelt with the labels of the model")
        found[made] = boost
    return found


def _words(
    spellings: Sequence[tuple[int, ...]],
    classes: Sequence[int],
    extra: Sequence[float],
    boosts: Mapping[tuple[int, ...], float],
    alpha: float,
    ngram: Ngram,
    vocabulary: Vocabulary,
) -> Words:
    node_of, parents, symbols, levels = _trie(spellings)
    count = len(parents)
    word = np.full(count, -1, dtype=np.int32)
    word[node_of] = np.arange(len(spellings))
    # ahead[node]: the best score, by 1-gram probabilities, of the words that end at or below this node and of the
    # unknown word. After half of the letters of a hot word, the word's score includes half of its boost, and so on.
    alone = alpha * ngram.arc_log10.numpy()[np.array(classes)].astype(np.float64) + np.array(extra)
    boosted = np.array([boosts.get(s, 0.0) for s in spellings])
    ahead = np.full(count + 1, alone[-1])
    np.maximum.at(ahead, node_of, alone[:-1] - boosted)
    for first, last in reversed(levels):
        np.maximum.at(ahead, parents[first:last], ahead[first:last])
    begin = np.concatenate(([0], np.cumsum(np.bincount(parents[1:], minlength=count))))
    for i in np.flatnonzero(boosted).tolist():
        node = node_of[i]
        for spelt in range(len(spellings[i]), 0, -1):
            ahead[node] = max(ahead[node], alone[i] - boosted[i] + boosted[i] * spelt / len(spellings[i]))
            node = parents[node]
    ahead[0] = 0.0
    return Words(
        torch.from_numpy(begin.astype(np.int64)),
        torch.from_numpy(symbols[1:].astype(np.int32)),
        torch.arange(1, count, dtype=torch.int32),
        torch.from_numpy(word),
        torch.from_numpy(ahead),
        torch.tensor(extra, dtype=torch.float64),
        torch.tensor(classes, dtype=torch.int32),
        vocabulary.labels.index(" "),
        ngram,
    )


def _trie(
    spellings: Sequence[tuple[int, ...]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Returns the node where each spelling ends, each node's parent, each node's symbol, and the range of nodes of each
    depth. Nodes are sorted by depth, then by parent, then by symbol."""
    flat = np.array([c for s in spellings for c in s], dtype=np.int64)
    lengths = np.array([len(s) for s in spellings], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    at = np.zeros(len(spellings), dtype=np.int64)
    parents, symbols, levels, count = [np.zeros(1, np.int64)], [np.full(1, -1)], [], 1
    for depth in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > depth)
        links = np.stack([at[longer], flat[starts[longer] + depth]])
        pairs, which = np.unique(links, axis=1, return_inverse=True)
        parents.append(pairs[0])
        symbols.append(pairs[1])
        levels.append((count, count + pairs.shape[1]))
        at[longer] = count + which.reshape(-1)
        count += pairs.shape[1]
    return at, np.concatenate(parents), np.concatenate(symbols), levels
