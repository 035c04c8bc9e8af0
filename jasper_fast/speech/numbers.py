"""Writes numbers in English words, as the text cleaners of NVIDIA's Jasper do, with the same package, inflect."""

import functools
import re

from jasper_fast.extras import need

_LONGEST = 21  # digits of a number; longer numbers are written digit by digit


@functools.cache
def _engine():
    return need("inflect", "train").engine()  # imported only for texts with digits, because the import takes seconds


def _words(number: int | str, andword: str = "", **settings: object) -> str:
    return _engine().number_to_words(number, andword=andword, **settings).replace(",", "")


def _ordinal(match: re.Match[str]) -> str:
    return _words(match[1], group=1) if len(match[1]) > _LONGEST else _words(f"{int(match[1])}th", "and")


def _number(match: re.Match[str]) -> str:
    """Writes a number in words. Years, which are 1001 to 2999 without 2000 to 2009, become two pairs of digits, or
    hundreds if they end in 00. Numbers with a leading zero, those above a billion that are no multiple of 10,000, and
    those of more than 21 digits are written digit by digit."""
    n = int(match[0][: _LONGEST + 1])
    if len(match[0]) > _LONGEST or match[0][0] == "0" or (n > 10**9 and n % 10**4):
        return _words(match[0], group=1)
    if not 1000 < n < 3000 or n == 2000 or 2000 < n < 2010:
        return _words(n)
    return _words(n, group=2, zero="oh") if n % 100 else f"{_words(n // 100)} hundred"


def _dollars(match: re.Match[str]) -> str:
    amount = match[1].replace(",", "")
    parts = amount.split(".")
    if len(parts) > 2:
        return f"{amount} dollars"
    dollars, cents = (p.lstrip("0") for p in (*parts, "0")[:2])
    amounts = [f"{n} {unit}{'' if n == '1' else 's'}" for n, unit in ((dollars, "dollar"), (cents, "cent")) if n]
    return " ".join(amounts) or "zero dollars"


def expand_numbers(text: str) -> str:
    """Writes the numbers in a text as English words: dollars and cents, decimals, ordinals, years and cardinals.

    '$3.50 in 1984, the 21st' -> 'three dollars fifty cents in nineteen eighty-four, the twenty-first'. Commas in
    numbers are removed. Raises MissingExtra if the text contains a digit and inflect is not installed.
    """
    text = re.sub(r"[0-9][0-9,]+[0-9]", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"\$([0-9.,]*[0-9])", _dollars, text)
    text = re.sub(r"([0-9]+)\.([0-9]+)", r"\1 point \2", text)
    text = re.sub(r"([0-9]+)(?:st|nd|rd|th)", _ordinal, text, flags=re.IGNORECASE)
    return re.sub(r"[0-9]+", _number, text)
