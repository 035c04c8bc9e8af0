"""Word and character error rates of whole corpora (jiwer aligns the words)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jasper_fast.extras import need


@dataclass(frozen=True)
class Errors:
    """Edits that turn the references into the hypotheses, counted over a corpus, and the length of the references."""

    substitutions: int
    deletions: int
    insertions: int
    length: int

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference token, a fraction that may exceed 1. If the references are empty, the number of
        insertions."""
        return self.total / max(self.length, 1)


def _tidy(texts: Sequence[str] | str) -> list[str]:
    return [" ".join(t.split()) for t in ([texts] if isinstance(texts, str) else texts)]


def _count(references: Sequence[str] | str, hypotheses: Sequence[str] | str, process: str, size) -> Errors:
    references, hypotheses = _tidy(references), _tidy(hypotheses)
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses; they must pair up")
    # jiwer does not handle empty references: every token of the hypothesis is then an insertion.
    inserted = sum(size(h) for r, h in zip(references, hypotheses, strict=True) if not r)
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r]
    if not pairs:
        return Errors(0, 0, inserted, 0)
    result = getattr(need("jiwer", "train"), process)(*map(list, zip(*pairs, strict=True)))
    length = result.hits + result.substitutions + result.deletions
    return Errors(result.substitutions, result.deletions, result.insertions + inserted, length)


def word_errors(references: Sequence[str] | str, hypotheses: Sequence[str] | str) -> Errors:
    """Word edits of the corpus; words are separated by white space. Raises ValueError if the lists differ in length."""
    return _count(references, hypotheses, "process_words", lambda t: len(t.split()))


def character_errors(references: Sequence[str] | str, hypotheses: Sequence[str] | str) -> Errors:
    """Character edits of the corpus, single spaces between words included. Raises ValueError as ``word_errors``."""
    return _count(references, hypotheses, "process_characters", len)


def wer(references: Sequence[str] | str, hypotheses: Sequence[str] | str) -> float:
    """Word error rate of the corpus as a fraction: all edits over all reference words."""
    return word_errors(references, hypotheses).rate


def cer(references: Sequence[str] | str, hypotheses: Sequence[str] | str) -> float:
    """Character error rate of the corpus as a fraction: all edits over all reference characters."""
    return character_errors(references, hypotheses).rate


def alignment(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """The words of a text beside those that were heard, as (kind, said, heard): "equal", "substitute", "delete" (heard
    is empty) or "insert" (said is empty), one word each. Their counts are those of ``word_errors``."""
    [reference], [hypothesis] = _tidy(reference), _tidy(hypothesis)
    said, heard = reference.split(), hypothesis.split()
    if not said:  # jiwer has no opinion on empty references
        return [("insert", "", word) for word in heard]
    rows = []
    for chunk in need("jiwer", "train").process_words(reference, hypothesis).alignments[0]:
        ours, theirs = said[chunk.ref_start_idx : chunk.ref_end_idx], heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        rows += [(chunk.type, *pair) for pair in itertools.zip_longest(ours, theirs, fillvalue="")]
    return rows
