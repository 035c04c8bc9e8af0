"""Trains n-grams with interpolated modified Kneser-Ney smoothing in bounded memory.

The formulas are in csrc/cpu/ngram_train.cpp. This is our own code because no library with wheels fits: KenLM's wheels
lack `lmplz`, and the Python packages stop at order 5, lack modified Kneser-Ney or take minutes for a million words.
"""

import contextlib
import ctypes
import itertools
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jasper_fast.kernels import native
from jasper_fast.lm.arpa import LanguageModelError
from jasper_fast.lm.texts import TextFile, chunks, refuse_reserved, token

MOST_WORDS = 6  # words of the longest n-grams; KenLM's wheels read no higher order
_END, _FIRST = 2, 3  # ids of </s> and of the first word; 0 and 1 are <unk> and <s>
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Order:
    """Statistics of the n-grams of one order."""

    ngrams: int
    discounts: tuple[float, float, float]
    fallback: bool  # whether fixed discounts are used, because there are too few counts to estimate them


@dataclass(frozen=True)
class Trained:
    """What ``train`` returns: the numbers of sentences and words of the text, the size of the vocabulary, and the
    statistics of each order."""

    sentences: int
    words: int
    vocabulary: int
    orders: tuple[Order, ...]


class _Trainer:
    def __init__(self, order: int, folder: str, memory: int, prune: Sequence[int]) -> None:
        self._library = native.cpu_functions()
        self._library.jf_ngram_new.restype = ctypes.c_void_p
        self._library.jf_ngram_error.restype = ctypes.c_char_p
        self._handle = ctypes.c_void_p(
            self._library.jf_ngram_new(
                order, os.fsencode(folder), ctypes.c_int64(memory), (ctypes.c_int64 * order)(*prune)
            )
        )

    def call(self, name: str, *arguments: object) -> None:
        if getattr(self._library, f"jf_ngram_{name}")(self._handle, *arguments):
            raise OSError(self._library.jf_ngram_error(self._handle).decode(errors="replace"))

    def statistics(self, n: int) -> Order:
        found = (ctypes.c_double * 8)()
        self._library.jf_ngram_statistics(self._handle, n, found)
        *_, d1, d2, d3, kept = found
        return Order(int(kept) + 2 * (n == 1), (abs(d1), abs(d2), abs(d3)), d1 < 0)

    def close(self) -> None:
        self._library.jf_ngram_delete(self._handle)


def thresholds(order: int, prune: Sequence[int]) -> list[int]:
    """Returns one count per order: those of ``prune``, the last one repeated for higher orders, or zeros without any.
    Raises ValueError for unusable counts."""
    found = [*prune, *([prune[-1]] * (order - len(prune)))] if prune else [0] * order
    if len(found) > order or found[0] != 0 or found != sorted(found):
        raise ValueError(
            f"--prune {' '.join(map(str, prune))}: give at most one count per order; the first must be 0, and "
            "none may be smaller than the one before"
        )
    return found


def train(
    texts: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    order: int,
    *,
    characters: bool = False,
    lower_case: bool = False,
    prune: Sequence[int] = (),
    memory: int = 512 << 20,
    progress: Progress = lambda what, share: None,
) -> Trained:
    """Trains an n-gram of words, or of ``characters`` (the space as <space>), and writes it as an ARPA file.

    ``texts``: UTF-8, gzipped or not, with one sentence per line. They are lower-cased only if ``lower_case`` is true.
    ``prune``: one number per order, the last one also for higher orders; n-grams that occur at most this often are left
    out. ``memory``: bytes for sorting. A longer text needs more disk space in the folder of ``out``, and more memory
    only for its distinct words. Raises ValueError for an unusable order or unusable thresholds, LanguageModelError for
    a text that cannot be read or contains a reserved word and if there are no words, and OSError if the disk is full.
    """
    files = [TextFile(path, characters, lower_case) for path in texts]
    if not 1 <= order <= MOST_WORDS:
        raise ValueError(f"--order {order} is not from 1 to {MOST_WORDS}, the orders that KenLM reads")
    out, counts = Path(out), thresholds(order, prune)
    with (
        tempfile.TemporaryDirectory(prefix=".ngrams-", dir=out.resolve().parent) as folder,
        contextlib.closing(_Trainer(order, folder, memory, counts)) as trainer,
    ):
        numbers, sentences, words = _feed(trainer, files, progress)
        if not words:
            raise LanguageModelError(f"{', '.join(map(str, texts))}: has no words")
        for step in range(order + 1):
            progress("counting", step / (2 * order + 1))
            trainer.call("step", step)
        names = [b"<unk>", b"<s>", b"</s>", *(token(word).encode() for word in numbers)]
        blob, offsets = b"".join(names), np.cumsum([0, *map(len, names)], dtype=np.int64)
        temporary = out.with_name(f".{out.name}.tmp")
        # The trainer keeps pointers to `blob` and `offsets`, and reads from them until "end_file".
        trainer.call("begin_file", os.fsencode(temporary), ctypes.c_char_p(blob), ctypes.c_void_p(offsets.ctypes.data))
        for n in range(1, order + 1):
            progress("writing", (order + n) / (2 * order + 1))
            trainer.call("step", order + n)
        trainer.call("end_file")
        os.replace(temporary, out)
        progress("writing", 1.0)
        return Trained(sentences, words, len(names), tuple(map(trainer.statistics, range(1, order + 1))))


def _feed(trainer: _Trainer, texts: Sequence[TextFile], progress: Progress) -> tuple[dict[str, int], int, int]:
    """Feeds the texts to the trainer as ids. Returns the ids of the words, and the numbers of sentences and words."""
    numbers: dict[str, int] = defaultdict(itertools.count(_FIRST).__next__)  # a new word gets the next id
    total = sum(text.size for text in texts) or 1
    sentences = words = 0

    def encode(line: list[str]) -> list[int]:
        return [*map(numbers.__getitem__, line), _END]

    for text, chunk in chunks(texts, encode, lambda done: progress("reading", min(1.0, done / total))):
        refuse_reserved(text.path, numbers)
        trainer.call("add", ctypes.c_void_p(chunk.buffer_info()[0]), ctypes.c_int64(len(chunk)))
        sentences += chunk.count(_END)
        words += len(chunk)
    return numbers, sentences, words - sentences
