"""The words or characters of a neural language model, and their ids."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from jasper_fast.lm.arpa import LanguageModelError
from jasper_fast.lm.neural.model import UNKNOWN
from jasper_fast.lm.texts import TextFile, pieces, refuse_reserved

NAMES = ("</s>", "<unk>")  # names of BOUNDARY and UNKNOWN
_CROWD = 5_000_000  # with more distinct words than this, those counted only once so far are dropped
_OFTEN = 1 << 16  # lines between two reports of progress
Progress = Callable[[int], None]


class Tokens:
    """Ids of words or characters: the boundary, the unknown word, then all others, the most frequent first.

    ``lower_case``: whether texts are lower-cased. Raises ValueError for an invalid list of names.
    """

    def __init__(self, names: Sequence[str], characters: bool, lower_case: bool) -> None:
        if tuple(names[:2]) != NAMES or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of words")
        self.names, self.characters, self.lower_case = list(names), characters, lower_case
        self._number = {name: i for i, name in enumerate(names) if i >= len(NAMES)}
        if len(self._number) != len(names) - len(NAMES):
            raise ValueError("a word is listed twice")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def count(cls, texts: Iterable[TextFile], most: int, progress: Progress = lambda done: None) -> Self:
        """Counts the words (or characters) of texts and keeps the most frequent ones, at most ``most``.

        Beyond five million distinct words, rare words may be lost. Raises LanguageModelError for a text that cannot be
        read or contains a reserved word, and if there are no words.
        """
        counts: Counter[str] = Counter()
        bytes_before = 0
        for text in texts:
            for number, found in enumerate(text):
                counts.update(found)
                if number % _OFTEN == 0:
                    progress(bytes_before + text.position())
                if len(counts) > _CROWD:
                    counts = Counter({word: n for word, n in counts.items() if n > 1})
            bytes_before += text.size
            refuse_reserved(text.path, counts)
        if not counts:
            raise LanguageModelError(f"{text.path}: has no words")
        found = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]
        return cls([*NAMES, *found], text.characters, text.lower_case)

    def pieces(self, text: str) -> list[str]:
        """Returns the words or characters of one line."""
        return pieces(text, self.characters, self.lower_case)

    def encode(self, pieces: Iterable[str]) -> list[int]:
        return [self._number.get(piece, UNKNOWN) for piece in pieces]
