"""Word and character error rates over corpora; the package jiwer aligns the texts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jasper_fast.extras import need


@dataclass(frozen=True)
class Errors:
    """Counts of the edits that turn a corpus's references into its hypotheses; ``length`` is the number of words or
    characters in the references."""

    substitutions: int
    deletions: int
    insertions: int
    length: int

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per word or character of the references; may exceed 1. If all references are empty, it is the number
        of insertions."""
        return self.total / max(self.length, 1)


def _tidy(texts: Sequence[str] | str) -> list[str]:
    return [" ".join(t.split()) for t in ([texts] if isinstance(texts, str) else texts)]


def _count(references: Sequence[str] | str, hypotheses: Sequence[str] | str, process: str) -> Errors:
    references, hypotheses = _tidy(references), _tidy(hypotheses)
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, but {len(hypotheses)} hypotheses; give one per reference")
    result = getattr(need("jiwer", "train"), process)(references, hypotheses)
    return Errors(
        result.substitutions,
        result.deletions,
        result.insertions,
        length=result.hits + result.substitutions + result.deletions,
    )


def word_errors(references: Sequence[str] | str, hypotheses: Sequence[str] | str) -> Errors:
    """Counts the word edits of a corpus. White space separates words. Raises ValueError if the lists differ in
    length."""
    return _count(references, hypotheses, "process_words")


def character_errors(references: Sequence[str] | str, hypotheses: Sequence[str] | str) -> Errors:
    """Counts the character edits of a corpus; the single space between words is a character. Raises ValueError if the
    lists differ in length."""
    return _count(references, hypotheses, "process_characters")


def wer(references: Sequence[str] | str, hypotheses: Sequence[str] | str) -> float:
    """Returns the word error rate of a corpus as a fraction: all edits over all reference words."""
    return word_errors(references, hypotheses).rate


def cer(references: Sequence[str] | str, hypotheses: Sequence[str] | str) -> float:
    """Returns the character error rate of a corpus as a fraction: all edits over all reference characters."""
    return character_errors(references, hypotheses).rate


def alignment(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """Aligns the words of two texts. Returns one tuple (kind, reference word, hypothesis word) per position.

    ``kind`` is "equal", "substitute", "delete" (the hypothesis word is empty) or "insert" (the reference word is
    empty). The counts agree with ``word_errors``.
    """
    [reference], [hypothesis] = _tidy(reference), _tidy(hypothesis)
    said, heard = reference.split(), hypothesis.split()
    return [
        (chunk.type, *pair)
        for chunk in need("jiwer", "train").process_words(reference, hypothesis).alignments[0]
        for pair in itertools.zip_longest(
            said[chunk.ref_start_idx : chunk.ref_end_idx], heard[chunk.hyp_start_idx : chunk.hyp_end_idx], fillvalue=""
        )
    ]
