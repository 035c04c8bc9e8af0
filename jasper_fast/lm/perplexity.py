"""The perplexity of a text: how well a language model predicts it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Perplexity:
    """The numbers of sentences, words and unknown words of a text, and sums of log10 probabilities.

    ``log10``: the sum over all words and sentence ends. ``log10_unknown``: the sum over the unknown words.
    """

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
        """The perplexity without the unknown words."""
        return _power(self.log10_unknown - self.log10, self.words + self.sentences - self.unknown)


def _power(log10: float, count: int) -> float:
    return 10 ** min(log10 / max(count, 1), 300.0)
