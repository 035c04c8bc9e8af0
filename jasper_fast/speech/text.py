"""Vocabularies (they convert text to class indices and back), the texts that a beam search finds, and the normalisation
of text."""

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jasper_fast.extras import need
from jasper_fast.speech.numbers import expand_numbers

LABELS = [" ", *string.ascii_lowercase, "'"]  # the alphabet of NVIDIA's Jasper; the blank comes after it


@dataclass(frozen=True)
class Hypothesis:
    """A text that a beam search found. ``score`` is the number by which the search ranked it, ``log_prob`` the natural
    logarithm of the text's CTC probability, and ``symbols`` the classes of its symbols."""

    text: str
    score: float
    log_prob: float
    symbols: tuple[int, ...]


class UnknownSymbolError(ValueError):
    """A text contains a symbol that is not in the vocabulary."""


class Vocabulary:
    """The symbols of a CTC model, in the order of the model's outputs. The blank comes after them.

    Either every label is one character, or every label is a word of two or more characters. A model for a few words
    (digits, commands) cannot misspell them if they are its labels. ``labels`` defaults to space, a-z, apostrophe.
    Raises ValueError if there are no labels, if two of them are equal after Unicode composition, if characters and
    words are mixed, or if a word contains white space or "<".
    """

    def __init__(self, labels: Iterable[str] | None = None) -> None:
        labels = [*LABELS] if labels is None else [*labels]
        self.of_words = bool(labels) and all(isinstance(x, str) and _is_word(x) for x in labels)
        check = (lambda _, x: unicodedata.normalize("NFC", x)) if self.of_words else _one_character
        self.labels: list[str] = [check(i, x) for i, x in enumerate(labels)]
        if not self.labels:
            raise ValueError("a vocabulary needs at least one label")
        self._index: dict[str, int] = {}
        for i, label in enumerate(self.labels):
            if (first := self._index.setdefault(label, i)) != i:
                raise ValueError(f"labels {first} and {i} collide: both are {label!r}; remove one")

    @property
    def blank(self) -> int:
        """Index of the CTC blank: one past the last label."""
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        return len(self.labels) + 1

    @property
    def characters(self) -> set[str]:
        """The characters that a text may contain."""
        return {" ", *"".join(self.labels)} if self.of_words else set(self.labels)

    @property
    def separator(self) -> str:
        """The separator of words: a space, or the empty string if the labels are characters without a space."""
        return " " if " " in self.characters else ""

    def __len__(self) -> int:
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.labels == other.labels

    def encode(self, text: str) -> list[int]:
        """Returns the indices of the characters (or words) of ``text``, which must be labels (see ``normalize``).

        Raises UnknownSymbolError, which names the characters (or words) that are not labels.
        """
        text = unicodedata.normalize("NFC", text)
        symbols = text.split() if self.of_words else text
        try:
            return [self._index[c] for c in symbols]
        except KeyError:
            unknown = sorted(set(symbols) - self._index.keys())
            raise UnknownSymbolError(
                f"{text!r} contains {', '.join(map(repr, unknown))}, not in the vocabulary; normalize() the text first "
                "or add the symbol to the labels"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ``ids`` without blanks. Raises ValueError for an id that is not a class of this
        vocabulary."""
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i <= self.blank]:
            raise ValueError(f"class {wrong[0]} is not in 0..{self.blank}: it belongs to another vocabulary")
        return (" " if self.of_words else "").join(self.labels[i] for i in ids if i != self.blank)


def _is_word(label: str) -> bool:
    return len(unicodedata.normalize("NFC", label)) > 1 and not any(c.isspace() or c == "<" for c in label)


def _one_character(index: int, label: str) -> str:
    composed = unicodedata.normalize("NFC", label) if isinstance(label, str) else ""
    if len(composed) != 1:
        hint = "; leave out the blank, which is added automatically" if "blank" in str(label).lower() else ""
        raise ValueError(
            f"label {index} is {label!r}; labels must all be single characters, or all be words of several, without <"
            f"{hint}"
        )
    return composed


def normalize(text: str, labels: Sequence[str] | Vocabulary | None = None, english: bool | None = None) -> str:
    """Rewrites ``text`` with the symbols of ``labels``: 'Mr. Müller owes $5!' -> 'mister muller owes five dollars'.

    The steps, in this order:

    - Unicode composition;
    - lower case (upper case if the labels have only capitals), and ASCII for characters that are not labels;
    - if ``english`` is true: numbers, money, ordinals, '&' and '+' in words, and abbreviations in full;
    - spaces for other punctuation; symbols that are still not labels are dropped; spaces are collapsed and stripped.

    A label is never changed: digits that are labels stay digits, and an alphabet with umlauts keeps them. By default
    ``english`` is true if all letters of the labels are ASCII. Semantics: english_cleaners of NVIDIA's Jasper for
    PyTorch, which supports only ASCII alphabets. Raises MissingExtra if a text needs anyascii or inflect and it is not
    installed.
    """
    return normalize_and_lost(text, labels, english)[0]


def normalize_and_lost(
    text: str, labels: Sequence[str] | Vocabulary | None = None, english: bool | None = None
) -> tuple[str, list[str]]:
    """Returns the text from ``normalize``, and the letters, digits and symbols that it lost, in lower case.

    A character is lost if nothing of its ASCII form is kept, or only a part of it. Characters of words that
    ``normalize`` inserted can be lost too. 'hello мир' with Russian labels -> 'мир', ['h', 'e', 'l', 'o'].
    """
    vocabulary = labels if isinstance(labels, Vocabulary) else Vocabulary(labels)
    keep = vocabulary.characters
    letters = [c for c in keep if c.isalpha()]
    if english is None:
        english = all(c.isascii() for c in letters)
    text = unicodedata.normalize("NFC", text)
    if english:
        text = re.sub(r"£([0-9,]*[0-9]+)", r"\1 pounds", text)
    before = text
    text = "".join(c if c in keep else _fold(c, keep) for c in text)
    if english:
        if keep.isdisjoint(string.digits):
            text = expand_numbers(text)
        text = _ABBREVIATION.sub(lambda m: _ABBREVIATIONS[m[1].lower()], text)
        for sign, word in (("&", " and "), ("+", " plus ")):
            text = text if sign in keep else text.replace(sign, word)
    if letters and all(c != c.lower() for c in letters):  # only capitals, so the words inserted above need capitals
        text = "".join(c if c in keep else c.upper() for c in text)
    text = text.translate({ord(c): " " for c in string.punctuation if c not in keep})
    dropped = {c for c in text if c not in keep and not c.isspace()}
    text = " ".join("".join(c for c in text if c not in dropped).split())
    return text.replace(" ", vocabulary.separator), _lost(before, dropped, keep)


def _lost(before: str, dropped: set[str], keep: set[str]) -> list[str]:
    """Returns the characters that normalisation lost from the text ``before``.

    There are three kinds: characters of the text whose ASCII form contains a ``dropped`` character; letters and digits
    that have no ASCII form; ``dropped`` characters from words that normalisation inserted, for example for a number.
    ``keep``: the characters of the labels.
    """
    lower, lost, explained = {c.lower() for c in dropped}, {}, set()
    for c in dict.fromkeys(before):
        if c in keep or (c.isascii() and not dropped):
            continue
        folded = set(_fold(c, keep).lower())
        if folded & lower or (not folded and c.isalnum()):
            lost[c.lower()] = None
            explained |= folded
    return [*lost, *sorted(lower - explained)]


def _fold(character: str, keep: set[str]) -> str:
    """Returns the character in lower or upper case, whichever form is a label. Otherwise returns its ASCII form in
    lower case (a space for white space beyond ASCII)."""
    for form in (character.lower(), character.upper()):
        form = unicodedata.normalize("NFC", form)
        if form in keep:
            return form
    if character.isascii():
        return character.lower()
    if character.isspace() or unicodedata.category(character)[0] == "Z":
        return " "
    return need("anyascii", "train").anyascii(character).lower()


# "misess" is the spelling of NVIDIA's Jasper, and published models were trained with it.
_ABBREVIATIONS = {
    "mrs": "misess",
    "mr": "mister",
    "dr": "doctor",
    "st": "saint",
    "co": "company",
    "jr": "junior",
    "maj": "major",
    "gen": "general",
    "drs": "doctors",
    "rev": "reverend",
    "lt": "lieutenant",
    "hon": "honorable",
    "sgt": "sergeant",
    "capt": "captain",
    "esq": "esquire",
    "ltd": "limited",
    "col": "colonel",
    "ft": "fort",
}
_ABBREVIATION = re.compile(rf"\b({'|'.join(_ABBREVIATIONS)})\.", re.IGNORECASE)
