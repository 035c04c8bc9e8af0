"""From transcripts to symbols and back: vocabularies of any alphabet, and the normalisation of English text."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence

LABELS = [" ", *string.ascii_lowercase, "'"]  # the reference's alphabet; the blank comes after it


class UnknownSymbolError(ValueError):
    """A text holds a symbol that the vocabulary does not."""


class Vocabulary:
    """Symbols of a CTC model, in the order of the model's outputs; the blank follows them.

    Either every label is one character, or every label is a word of several: a model with a small closed vocabulary
    (digits, commands) then emits words whole and cannot misspell them. ``labels`` defaults to space, a-z, apostrophe.
    Raises ValueError naming the labels that collide (the same, or the same after Unicode composition) and any that
    does not fit the others.
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
            if label in self._index:
                raise ValueError(f"labels {self._index[label]} and {i} collide: both are {label!r}; remove one")
            self._index[label] = i

    @property
    def blank(self) -> int:
        """Index of the CTC blank: one past the last label."""
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        return len(self.labels) + 1

    @property
    def characters(self) -> set[str]:
        """What a text may be made of."""
        return {" ", *"".join(self.labels)} if self.of_words else set(self.labels)

    @property
    def separator(self) -> str:
        """What stands between words: a space, or nothing where the labels are characters without one."""
        return " " if " " in self.characters else ""

    def __len__(self) -> int:
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.labels == other.labels

    def __hash__(self) -> int:
        return hash(tuple(self.labels))

    def __repr__(self) -> str:
        return f"Vocabulary({''.join(self.labels)!r})"

    def encode(self, text: str) -> list[int]:
        """Indices of the characters (or words) of ``text``, all of them labels (``normalize`` sees to the characters).

        Raises UnknownSymbolError naming those that are not.
        """
        text = unicodedata.normalize("NFC", text)
        symbols = text.split() if self.of_words else text
        try:
            return [self._index[c] for c in symbols]
        except KeyError:
            unknown = sorted(set(symbols) - self._index.keys())
            raise UnknownSymbolError(
                f"{text!r} holds {', '.join(map(repr, unknown))}, not in the vocabulary; normalize() the text first "
                "or add the symbol to the labels"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; blanks are left out. Raises ValueError for an id that is no class of this vocabulary."""
        out = []
        for i in ids:
            if not 0 <= i <= self.blank:
                raise ValueError(f"class {i} is not in 0..{self.blank}: another vocabulary made it")
            if i != self.blank:
                out.append(self.labels[i])
        return (" " if self.of_words else "").join(out)


def _is_word(label: str) -> bool:
    return len(unicodedata.normalize("NFC", label)) > 1 and not any(c.isspace() or c == "<" for c in label)


def _one_character(index: int, label: str) -> str:
    composed = unicodedata.normalize("NFC", label) if isinstance(label, str) else label
    if not isinstance(composed, str) or len(composed) != 1:
        hint = "; the blank is added by itself, leave it out" if "blank" in str(label).lower() else ""
        raise ValueError(
            f"label {index} is {label!r}; each label must be one character, or each a word of several{hint}"
        )
    return composed


def normalize(text: str, labels: Sequence[str] | Vocabulary | None = None, english: bool | None = None) -> str:
    """``text`` as a model with ``labels`` can write it: 'Mr. Müller owes $5!' -> 'mister muller owes five dollars'.

    In this order: Unicode composition; characters foreign to the labels transliterated to ASCII; lower case (capitals
    only where the labels hold no small letter); numbers, money and ordinals in words, abbreviations in full; '&' and
    '+' in words, other punctuation to spaces; symbols that are still no label dropped; spaces collapsed and stripped.
    Whatever is a label is never changed (digits that are labels stay digits, an alphabet with umlauts keeps them).
    The English words of numbers and abbreviations are used where ``english`` is true; by default, where all letters of
    the labels are ASCII. Semantics: english_cleaners of NVIDIA's Jasper for PyTorch, which knows ASCII alphabets only.
    """
    vocabulary = labels if isinstance(labels, Vocabulary) else Vocabulary(labels)
    keep = vocabulary.characters
    if english is None:
        english = all(c.isascii() for c in keep if c.isalpha())
    text = unicodedata.normalize("NFC", text)
    if english:
        text = re.sub(r"£([0-9,]*[0-9]+)", r"\1 pounds", text)
    text = "".join(c if c in keep else _fold(c, keep) for c in text)
    if english:
        if keep.isdisjoint(string.digits):
            text = expand_numbers(text)
        text = expand_abbreviations(text)
        if "&" not in keep:
            text = text.replace("&", " and ")
        if "+" not in keep:
            text = text.replace("+", " plus ")
    if not _has_case(keep, str.lower) and _has_case(keep, str.upper):
        text = "".join(c if c in keep else c.upper() for c in text)  # the words just written
    punctuation = {ord(c): " " for c in string.punctuation if c not in keep}
    text = "".join(c for c in text.translate(punctuation) if c in keep or c.isspace())
    text = " ".join(text.split())
    return text.replace(" ", vocabulary.separator)


def _has_case(keep: set[str], case) -> bool:
    return any(c.isalpha() and case(c) == c for c in keep)


def _fold(character: str, keep: set[str]) -> str:
    """The character in a case or transliteration that the labels hold; else its lower-case ASCII."""
    for form in (character.lower(), character.upper()):
        form = unicodedata.normalize("NFC", form)
        if form in keep:
            return form
    if character.isascii():
        return character.lower()
    if unicodedata.category(character)[0] == "Z":
        return " "
    from anyascii import anyascii  # transcripts alone need it: what measures kernels runs without

    return anyascii(character).lower()


# "misess" is the reference's own spelling, which models trained by it have learnt.
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


def expand_abbreviations(text: str) -> str:
    """Titles and the like written in full: 'dr.' -> 'doctor'."""
    return _ABBREVIATION.sub(lambda m: _ABBREVIATIONS[m[1].lower()], text)


# fmt: off
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_SCALES = ["", "thousand", "million", "billion", "trillion", "quadrillion", "quintillion"]
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_ORDINALS["twelve"] = "twelfth"
_LARGEST = 1000 ** len(_SCALES)


def _below_hundred(n: int) -> str:
    if n < 20:
        return _UNITS[n]
    return _TENS[n // 10] + (f"-{_UNITS[n % 10]}" if n % 10 else "")


def _below_thousand(n: int, joint: str) -> str:
    hundreds, rest = divmod(n, 100)
    words = [f"{_UNITS[hundreds]} hundred"] if hundreds else []
    if rest:
        words.append(_below_hundred(rest))
    return joint.join(words)


def cardinal(n: int, joint: str = " ") -> str:
    """English words of 0 <= n < 10**21: 1234 -> 'one thousand two hundred thirty-four'.

    ``joint`` stands before the tens and units; ' and ' gives 'one thousand two hundred and thirty-four'.
    Raises ValueError outside the range.
    """
    if not 0 <= n < _LARGEST:
        raise ValueError(f"{n} is outside 0..{_LARGEST - 1}")
    if n == 0:
        return _UNITS[0]
    above, last = divmod(n, 1000)
    words = _below_thousand(last, joint)
    between = joint if 0 < last < 100 else " "
    for scale in _SCALES[1:]:
        above, group = divmod(above, 1000)
        if group:
            words = f"{_below_thousand(group, joint)} {scale}{between if words else ''}{words}"
            between = " "
    return words


def _ordinal(match: re.Match[str]) -> str:
    if len(match[1]) > 21:
        return _digits(match[1])
    words = cardinal(int(match[1]), " and ")
    head, last = re.fullmatch(r"(.*?)([a-z]+)", words).groups()
    if last in _ORDINALS:
        return head + _ORDINALS[last]
    return f"{head}{last[:-1]}ieth" if last.endswith("y") else f"{head}{last}th"


def _digits(number: str) -> str:
    return " ".join(_UNITS[int(d)] for d in number)


def _number(match: re.Match[str]) -> str:
    """Years in pairs, long numbers and those with a leading zero digit by digit, the rest as cardinals."""
    number = match[0]
    n = int(number) if len(number) <= 21 else _LARGEST
    if n >= _LARGEST or number[0] == "0" or (n > 10**9 and n % 10**4 != 0):
        return _digits(number)
    if not 1000 < n < 3000 or n == 2000 or 2000 < n < 2010:
        return cardinal(n)
    century, rest = divmod(n, 100)
    if rest == 0:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def _dollars(match: re.Match[str]) -> str:
    amount = match[1].replace(",", "")
    parts = amount.split(".")
    if len(parts) > 2:
        return f"{amount} dollars"
    dollars, cents = (int(p or 0) for p in (*parts, "0")[:2])
    amounts = [f"{n} {unit}{'' if n == 1 else 's'}" for n, unit in ((dollars, "dollar"), (cents, "cent")) if n]
    return " ".join(amounts) or "zero dollars"


def expand_numbers(text: str) -> str:
    """Numbers in English words: commas taken out, dollars and cents, decimals with 'point', ordinals, years, cardinals.

    '$3.50 in 1984, the 21st' -> 'three dollars fifty cents in nineteen eighty-four, the twenty-first'.
    """
    text = re.sub(r"[0-9][0-9,]+[0-9]", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"\$([0-9.,]*[0-9])", _dollars, text)
    text = re.sub(r"([0-9]+)\.([0-9]+)", r"\1 point \2", text)
    text = re.sub(r"([0-9]+)(?:st|nd|rd|th)", _ordinal, text, flags=re.IGNORECASE)
    return re.sub(r"[0-9]+", _number, text)
