"""How well a model foresees a text, in figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Perplexity:
    """Of a text: its sentences, its words and unknown ones, and log10 p of all, </s> included, and of the unknown."""

    sentences: int
    words: int
    unknown: int
    log10: float
    log10_unknown: float

    @property
    def value(self) -> float:
        return _power(-self.log10, self.words + self.sentences)

    @property
    def known(self) -> float:
        """Without the unknown words."""
        return _power(self.log10_unknown - self.log10, self.words + self.sentences - self.unknown)


def _power(log10: float, count: int) -> float:
    return 10 ** min(log10 / max(count, 1), 300.0)
