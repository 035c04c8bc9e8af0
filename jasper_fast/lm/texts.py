"""Text files for language models: UTF-8, gzipped or not, with one sentence per line."""

import os
import zlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import IO

from jasper_fast.lm.arpa import SPACE, SPECIAL, LanguageModelError, open_plain

_LONGEST = 64 << 20  # bytes that a line may have
_CHUNK = 1 << 20  # ids; a chunk ends with the line that takes it over this number


def pieces(line: str, characters: bool, lower_case: bool) -> list[str]:
    """Returns the words of a line, or its characters, with the space as one of them."""
    words = (line.lower() if lower_case else line).split()
    return [*" ".join(words)] if characters else words


class TextFile:
    """Yields the ``pieces`` of each line of a file. Skips empty lines. ``size``: the file's bytes on disk.

    Raises LanguageModelError, naming the file, if it does not exist or cannot be read as text.
    """

    def __init__(self, path: str | os.PathLike, characters: bool = False, lower_case: bool = False) -> None:
        if not Path(path).is_file():
            raise LanguageModelError(f"{path}: no such text")
        self.path, self.characters, self.lower_case = path, characters, lower_case
        self.size = Path(path).stat().st_size
        self._raw: IO[bytes] | None = None

    def position(self) -> int:
        """Returns how many bytes of the file have been read."""
        raw = getattr(self._raw, "fileobj", self._raw)  # counts compressed bytes if the file is gzipped
        return raw.tell() if raw is not None else 0

    def __iter__(self) -> Iterator[list[str]]:
        try:
            with open_plain(self.path) as raw:
                self._raw = raw
                for number, line in enumerate(iter(lambda: raw.readline(_LONGEST), b""), 1):
                    if len(line) == _LONGEST:
                        raise LanguageModelError(f"{self.path}, line {number}: longer than {_LONGEST >> 20} MiB; put "
                                                 "one sentence on each line")  # fmt: skip
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if "\0" in text:
                        raise LanguageModelError(f"{self.path}, line {number}: holds a null byte; this is no text")
                    if found := pieces(text, self.characters, self.lower_case):
                        yield found
        except UnicodeDecodeError:
            raise LanguageModelError(f"{self.path}, line {number}: not UTF-8; convert the text to UTF-8") from None
        except (OSError, EOFError, zlib.error) as error:
            raise LanguageModelError(f"{self.path}: cannot be read as text ({error})") from None


def chunks(
    texts: Iterable[TextFile], encode: Callable[[list[str]], list[int]], progress: Callable[[int], None]
) -> Iterator[tuple[TextFile, array]]:
    """Yields the ids of texts in chunks (int32), each with its text. ``encode`` returns the ids of a line's pieces.
    ``progress`` is called with the number of bytes read, before each chunk but the last of a text."""
    before = 0
    for text in texts:
        chunk = array("i")
        for line in text:
            chunk.extend(encode(line))
            if len(chunk) > _CHUNK:
                progress(before + text.position())
                yield text, chunk
                chunk = array("i")
        before += text.size
        yield text, chunk


def refuse_reserved(path: str | os.PathLike, words: Container[str]) -> None:
    """Raises LanguageModelError if the words of a text include one that language models reserve."""
    for special in SPECIAL:
        if special in words:
            raise LanguageModelError(f"{path}: contains {special}, a word reserved in models; remove it")


def token(word: str) -> str:
    """Returns a word or character as a language model writes it: the space as <space>."""
    return SPACE if word == " " else word
