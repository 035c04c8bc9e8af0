"""Describes language models and measures their perplexity. KenLM (extra `lm`) scores n-grams and reads its binaries."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jasper_fast.extras import need
from jasper_fast.lm.arpa import SPACE, SPECIAL, Arpa, LanguageModelError
from jasper_fast.lm.neural.files import is_neural
from jasper_fast.lm.perplexity import Perplexity
from jasper_fast.lm.texts import TextFile, token
from jasper_fast.lm.words import is_binary


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences KenLM, which writes its progress to the stderr descriptor instead of sys.stderr."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def load(path: str | os.PathLike) -> Any:
    """Returns the model as KenLM reads it. Raises LanguageModelError if it cannot be read, and MissingExtra without the
    extra `lm`."""
    kenlm = need("kenlm", "lm")
    if not is_binary(path):
        Arpa(path)  # its error about a bad header is shorter than KenLM's
    try:
        with _quiet():
            return kenlm.Model(str(path))
    except (OSError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()).rpartition(" threw ")[2]
        raise LanguageModelError(f"{path}: KenLM cannot read it: {reason[:200]}") from None


def perplexity(path: str | os.PathLike, text: str | os.PathLike, lower_case: bool = False) -> Perplexity:
    """Returns the perplexity of a text with one sentence per line. An n-gram model scores characters if it lists
    <space>, otherwise words. Raises LanguageModelError (CheckpointError for some neural models) if either file cannot
    be read or the text has no words, and MissingExtra for an n-gram without the extra `lm`."""
    if is_neural(path):
        from jasper_fast.lm.neural import scoring

        return scoring.load(path).perplexity(text, lower_case)
    model = load(path)
    sentences = words = unknown = 0
    log10 = log10_unknown = 0.0
    for found in TextFile(text, SPACE in model, lower_case):
        sentences += 1
        words += len(found)
        for score, _, is_unknown in model.full_scores(" ".join(map(token, found))):
            log10 += score
            if is_unknown:
                unknown += 1
                log10_unknown += score
    if not words:
        raise LanguageModelError(f"{text}: no words in it")
    return Perplexity(sentences, words, unknown, log10, log10_unknown)


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Describes a model: its form, size and order, and for an ARPA file also the n-grams per order, the vocabulary,
    the lowest log10 p, and whether it is a model of words or of characters. A neural model is described by
    ``neural.scoring.describe``.

    Reads all of an ARPA file. Raises LanguageModelError (CheckpointError for some neural models) if the model cannot be
    read, and MissingExtra for a KenLM binary without the extra `lm`.
    """
    if is_neural(path):
        from jasper_fast.lm.neural import scoring

        return scoring.describe(path)
    form = "KenLM binary" if is_binary(path) else "ARPA"
    found = {"file": str(path), "form": form, "bytes": Path(path).stat().st_size}
    if form != "ARPA":
        return found | {"order": load(path).order}
    arpa, special, least = Arpa(path), set(), 0.0
    for log10, words, _ in arpa:
        if len(words) == 1:
            special |= {words[0].lower()} & {*SPECIAL, SPACE}
        if words != ("<s>",):
            least = min(least, log10)
    return found | {
        "order": arpa.order,
        "ngrams": arpa.counts,
        "of": "characters" if SPACE in special else "words",
        "vocabulary": arpa.counts[0] - len(special - {SPACE}),
        "open": "<unk>" in special,
        "least_log10": least,
    }
