"""Reads ARPA files of n-grams, plain or gzipped, line by line."""

import gzip
import itertools
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

SPACE = "<space>"  # how a model of characters writes the space
SPECIAL = ("<s>", "</s>", "<unk>")
_MOST_ORDERS = 32
_GZIP = b"\x1f\x8b"


class LanguageModelError(ValueError):
    """A language model, lexicon or text cannot be read or used. The message, of one line, says what is wrong."""


def begins_with(path: str | os.PathLike, magic: bytes) -> bool:
    """Returns whether a file begins with ``magic``, the bytes by which its format is recognised."""
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def open_plain(path: str | os.PathLike) -> IO[bytes]:
    """Opens a file for reading, and unpacks it if it is gzipped."""
    return gzip.open(path, "rb") if begins_with(path, _GZIP) else open(path, "rb")


class Arpa:
    """An ARPA file. ``counts``: the number of n-grams of each order, from the header. Iteration yields the n-grams.

    Raises LanguageModelError, at once for a missing file or a wrong header, and during the iteration if an n-gram is
    malformed or missing.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._line = 0
        try:
            with open_plain(path) as file:
                self.counts = self._header(file)
        except FileNotFoundError:
            raise LanguageModelError(f"{path}: no such language model") from None
        except (OSError, EOFError, zlib.error) as error:
            raise LanguageModelError(f"{path}: cannot be read as a language model ({error})") from None
        if not begins_with(path, _GZIP) and sum(self.counts) * 4 > self.path.stat().st_size:
            raise LanguageModelError(
                f"{path}: the header promises {sum(self.counts)} n-grams, and the file is too short for them"
            )

    @property
    def order(self) -> int:
        return len(self.counts)

    def _fail(self, what: str) -> LanguageModelError:
        return LanguageModelError(f"{self.path}, line {self._line}: {what}")

    def _next(self, file: IO[bytes]) -> str:
        line = file.readline(1 << 20)
        if not line:
            raise self._fail("the ARPA file ends here, before its \\end\\; get the whole file")
        self._line += 1
        if len(line) >= 1 << 20:
            raise self._fail("a line of a megabyte: this is no ARPA file")
        try:
            return line.strip().decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail("not UTF-8: this is no ARPA file") from None

    def _header(self, file: IO[bytes]) -> list[int]:
        for line in itertools.islice(iter(lambda: file.readline(1 << 20), b""), 1000):
            self._line += 1
            if line.strip() == b"\\data\\":
                break
        else:
            if not self._line:
                raise LanguageModelError(f"{self.path}: the language model is empty")
            raise LanguageModelError(f"{self.path}: no \\data\\ in its first lines: this is no ARPA file")
        counts: list[int] = []
        while line := self._next(file):
            if not (found := re.fullmatch(rf"ngram\s+{len(counts) + 1}\s*=\s*([0-9]{{1,18}})", line)):
                raise self._fail(f"expected `ngram {len(counts) + 1}=COUNT`, got {line[:60]!r}")
            counts.append(int(found[1]))
        if not 0 < len(counts) <= _MOST_ORDERS or counts[0] == 0:
            raise self._fail(f"the header names no n-grams, or has more than {_MOST_ORDERS} orders")
        return counts

    def __iter__(self) -> Iterator[tuple[float, tuple[str, ...], float]]:
        """Yields (log10 p, words, log10 of the back-off weight or 0) for each n-gram, the lowest order first."""
        self._line = 0
        try:
            with open_plain(self.path) as file:
                self._header(file)
                for n, count in enumerate(self.counts, 1):
                    yield from self._section(file, n, count)
                if self._skip_blank(file) != "\\end\\":
                    raise self._fail(f"more {self.order}-grams than the {self.counts[-1]} that the header promises")
        except (OSError, EOFError, zlib.error) as error:
            raise LanguageModelError(f"{self.path}: cannot be read to its end ({error})") from None

    def _skip_blank(self, file: IO[bytes]) -> str:
        while not (line := self._next(file)):
            pass
        return line

    def _section(self, file: IO[bytes], n: int, count: int) -> Iterator[tuple[float, tuple[str, ...], float]]:
        if (title := self._skip_blank(file)) != f"\\{n}-grams:":
            raise self._fail(f"expected \\{n}-grams:, got {title[:60]!r}; the header's counts may be wrong")
        for _ in range(count):
            line = self._skip_blank(file)
            # only ASCII spaces separate fields, as in KenLM: a word may contain a no-break space
            fields = line.split() if line.isascii() else [*map(bytes.decode, line.encode().split())]
            try:
                log10 = float(fields[0])
                back_off = float(fields[n + 1]) if len(fields) == n + 2 else 0.0
            except (ValueError, IndexError):
                raise self._fail(f"this is no {n}-gram, but the header promises {count} of them") from None
            if len(fields) not in (n + 1, n + 2) or (len(fields) == n + 2 and n == self.order and back_off):
                raise self._fail(f"{len(fields)} fields instead of a log-probability and {n} words")
            if not (log10 <= 0 and math.isfinite(back_off)) or log10 == -math.inf:
                raise self._fail(f"log10 p {fields[0]} with back-off {back_off:g}: not a probability")
            yield log10, tuple(fields[1 : n + 1]), back_off

    def words(self) -> list[str]:
        """Returns the words of the 1-grams, without <s>, </s> and <unk>."""
        found = [word for _, (word,), _ in itertools.islice(self, self.counts[0]) if word.lower() not in SPECIAL]
        if not found:
            raise LanguageModelError(f"{self.path}: contains no words")
        return found
