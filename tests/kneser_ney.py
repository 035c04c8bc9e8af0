"""The definition of interpolated modified Kneser-Ney smoothing, in plain Python."""

import functools
from collections import Counter, defaultdict

Gram = tuple[str, ...]


class KneserNey:
    """Computes p(word | context) of a corpus of sentences, and which n-grams a model of that corpus lists."""

    def __init__(self, sentences: list[list[str]], order: int, prune: list[int] | None = None) -> None:
        self.order, prune = order, prune or [0] * order
        self.times: list[Counter[Gram]] = [Counter() for _ in range(order + 1)]
        for words in sentences:
            line = ["<s>", *words, "</s>"]
            for n in range(1, order + 1):
                self.times[n].update(tuple(line[i : i + n]) for i in range(len(line) - n + 1))
        del self.times[1]["<s>",]
        self.count = [self._adjusted(n) for n in range(order + 1)]
        self.discount = [(0.0, 0.0, 0.0), *(self._discounts(n) for n in range(1, order + 1))]
        self.kept = [
            {g for g, t in self.times[n].items() if t > prune[n - 1]} if n else set() for n in range(order + 1)
        ]
        self.after: list[dict[Gram, list[Gram]]] = [defaultdict(list) for _ in range(order + 1)]
        for n in range(1, order + 1):
            for gram in self.times[n]:
                self.after[n][gram[:-1]].append(gram)
        self.vocabulary = {g[0] for g in self.times[1]} | {"<unk>"}
        self.gamma, self.p = functools.cache(self.gamma), functools.cache(self.p)

    def _adjusted(self, n: int) -> dict[Gram, int]:
        if n in (0, self.order):
            return dict(self.times[n])
        before: dict[Gram, set[str]] = defaultdict(set)
        for gram in self.times[n + 1]:
            before[gram[1:]].add(gram[0])
        return {g: t if g[0] == "<s>" else len(before[g]) for g, t in self.times[n].items()}

    def _discounts(self, n: int) -> tuple[float, float, float]:
        t = Counter(self.count[n].values())
        if t[1] and t[2] and t[3]:
            y = t[1] / (t[1] + 2 * t[2])
            found = tuple(k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3))
            if all(0 < d <= k for k, d in enumerate(found, 1)):
                return found
        return (0.5, 1.0, 1.5)

    def gamma(self, context: Gram) -> float | None:
        """Returns the weight of the lower order's probability, or None if the model lists no word after `context`."""
        n = len(context) + 1
        grams = self.after[n].get(context, ())
        if not any(g in self.kept[n] for g in grams):
            return None
        back = sum(self._d(n, g) if g in self.kept[n] else self.count[n][g] for g in grams)
        return back / sum(self.count[n][g] for g in grams)

    def _d(self, n: int, gram: Gram) -> float:
        return self.discount[n][min(self.count[n][gram], 3) - 1]

    def p(self, gram: Gram) -> float:
        """p(last word | the words before)."""
        n, context = len(gram), gram[:-1]
        lower = self.p(gram[1:]) if n > 1 else 1 / len(self.vocabulary)
        gamma = self.gamma(context)
        if gamma is None:
            return lower
        if gram not in self.kept[n]:
            return gamma * lower
        total = sum(self.count[n][g] for g in self.after[n][context])
        return (self.count[n][gram] - self._d(n, gram)) / total + gamma * lower
