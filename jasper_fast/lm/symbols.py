"""An n-gram of the acoustic model's own symbols, for the prefix search."""

import os
import sys
from collections.abc import Sequence

import numpy as np
import torch

from jasper_fast.kernels.prefix_beam.ngram import Ngram
from jasper_fast.lm.arpa import SPACE, Arpa, LanguageModelError
from jasper_fast.speech.text import Vocabulary

MISSING = -100.0  # log10 p of an unlisted word in a model without <unk>, as in KenLM


def tokens(vocabulary: Vocabulary) -> list[str]:
    """Returns the labels as a language model writes them."""
    return [SPACE if label == " " else label for label in vocabulary.labels]


def foreign(arpa: Arpa, vocabulary: Vocabulary) -> list[str]:
    """Returns the words of the file that are not labels of the vocabulary. In a model of symbols there are none."""
    return sorted(set(arpa.words()) - set(tokens(vocabulary)))


class SymbolLM:
    """An n-gram of a vocabulary's symbols (`jasper-fast lm train --characters`), from an ARPA file.

    A label that the file does not list has the probability of the file's <unk>, or 1e-100 if it has none. Raises
    LanguageModelError if the file is broken, lacks <s> or </s>, or lists a word that is no label.
    """

    def __init__(self, path: str | os.PathLike, vocabulary: Vocabulary) -> None:
        self.path, self.vocabulary = str(path), vocabulary
        arpa = Arpa(path)
        if words := foreign(arpa, vocabulary):
            raise LanguageModelError(
                f"{path}: {words[0]!r} is no label of the acoustic model ({len(words)} words are not); "
                "`jasper-fast lm train --characters` makes an n-gram of symbols"
            )
        self.ngram = automaton(arpa, tokens(vocabulary))


def automaton(arpa: Arpa, listed_tokens: Sequence[str]) -> Ngram:
    """Returns the n-gram over classes. Each token is a class, and the last class is the end of the text.

    A token that the file does not list gets the n-grams of <unk>, or log10 p = MISSING if the file has no <unk>. Raises
    LanguageModelError if the file is broken or lacks <s> or </s>, or if there are over 1.1 million tokens.
    """
    # A context is stored as a string with one character per word. A word of class i is chr(i), and <s> is chr(begin).
    # <unk> is chr(unknown), unless it is itself one of the tokens.
    end = len(listed_tokens)
    begin, unknown = end + 1, end + 2
    if unknown > sys.maxunicode:
        raise LanguageModelError(
            f"{arpa.path}: {end:,} words; at most {sys.maxunicode - 2:,} can be searched. Train with fewer words"
        )
    number = {token: i for i, token in enumerate(listed_tokens)}
    number |= {"</s>": end, "<s>": begin} | {u: number.get("<unk>", unknown) for u in ("<unk>", "<UNK>")}
    state_of, back_off = {"": 0}, [0.0]
    grams: list[tuple[str, int, float]] = []  # the context, the last word and log10 p of each n-gram
    for log10, words, weight in arpa:
        try:
            ids = [number[word] for word in words]
        except KeyError as error:
            raise LanguageModelError(f"{arpa.path}: {error} is not among its 1-grams") from None
        context = "".join(map(chr, ids))
        grams.append((context[:-1], ids[-1], log10))
        if len(words) < arpa.order and ids[-1] != end:
            if context in state_of:
                raise LanguageModelError(f"{arpa.path}: {' '.join(words)!r} is listed twice")
            state_of[context] = len(back_off)
            back_off.append(weight)
    listed = {i for source, i, _ in grams if not source}
    for name in ("<s>", "</s>"):
        if number[name] not in listed:
            raise LanguageModelError(f"{arpa.path}: no {name} among its 1-grams; train the model on whole lines")

    def longest(context: str) -> int:
        while context not in state_of:
            context = context[1:]
        return state_of[context]

    missing = sorted(set(range(end)) - listed)
    arcs: dict[tuple[int, int], tuple[float, int]] = {(0, i): (MISSING, 0) for i in missing}
    for source, i, log10 in grams:
        if source not in state_of:
            raise LanguageModelError(f"{arpa.path}: has an n-gram whose prefix is not listed; make the file again")
        following = 0 if i == end else longest((source + chr(i))[-(arpa.order - 1) or len(source) + 1 :])
        for symbol in missing if i == unknown else () if i == begin else (i,):
            arcs[state_of[source], symbol] = (log10, following)
    keys = np.array(sorted(arcs), dtype=np.int64).reshape(-1, 2)
    ends = np.cumsum(np.bincount(keys[:, 0], minlength=len(back_off)))
    sorted_arcs = [arcs[state, symbol] for state, symbol in keys.tolist()]
    return Ngram(
        torch.from_numpy(np.concatenate(([0], ends)).astype(np.int64)),
        torch.from_numpy(keys[:, 1].astype(np.int32)),
        torch.tensor([following for _, following in sorted_arcs], dtype=torch.int32),
        torch.tensor([log10 for log10, _ in sorted_arcs], dtype=torch.float32),
        torch.tensor([0, *(longest(context[1:]) for context in list(state_of)[1:])], dtype=torch.int32),
        torch.tensor(back_off, dtype=torch.float32),
        longest(chr(begin)),
    )
