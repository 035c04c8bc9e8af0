"""Beam search with a word n-gram and a lexicon, by flashlight-text with KenLM (extra `lm`).

Torch is not imported here, so that the processes that only search start fast.
"""

import importlib.util
import math
import os
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jasper_fast.extras import need
from jasper_fast.lm.arpa import SPECIAL, Arpa, LanguageModelError, begins_with
from jasper_fast.speech.text import Hypothesis, Vocabulary

_TOKENS = 40  # only the 40 likeliest symbols of a frame may extend a hypothesis, as in the paper's decoder
_THRESHOLD = 50.0  # a hypothesis is dropped if its score is more than this below the best one
_NEVER = -1e30  # used in place of -inf, because sums of it stay finite
_KENLM = b"mmap lm http://kheafield.com/code"  # the first bytes of a KenLM binary
_LONGEST = 512  # symbols that a word may have


@dataclass(frozen=True)
class Entry:
    """A word of a lexicon: as the language model writes it, as a transcript writes it, and its symbols as classes."""

    token: str
    text: str
    symbols: tuple[int, ...]


@dataclass(frozen=True)
class WordLM:
    """The path of a word n-gram (ARPA or KenLM binary) and the words that a text may contain. It can be pickled."""

    path: str
    entries: tuple[Entry, ...]
    labels: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # words that the labels cannot spell


def has_wheels() -> bool:
    """Returns whether flashlight-text is installed or has wheels for this Python."""
    return sys.version_info < (3, 13) or importlib.util.find_spec("flashlight") is not None


def is_binary(path: str | os.PathLike) -> bool:
    """Returns whether a language model is a KenLM binary. Raises LanguageModelError if there is no such file."""
    if not Path(path).is_file():
        raise LanguageModelError(f"{path}: no such language model")
    return begins_with(path, _KENLM)


def word_lm(path: str | os.PathLike, vocabulary: Vocabulary, lexicon: str | os.PathLike | None = None) -> WordLM:
    """Loads a word language model for a vocabulary of characters with a space.

    ``lexicon``: a text file with one word per line, which may be followed by the word's symbols, all separated by
    spaces. Without a lexicon, the words are those of the ARPA file. A word in capitals is spelt in small letters if the
    labels have only small letters. Raises LanguageModelError for another vocabulary, for a file that is missing, empty,
    broken or has only 1-grams, for a KenLM binary without a lexicon (because its words cannot be listed), and if no
    word can be spelt.
    """
    if vocabulary.of_words or " " not in vocabulary.characters:
        raise LanguageModelError("a word language model needs labels that are characters and include the space")
    arpa = None if is_binary(path) else Arpa(path)
    if arpa is None and lexicon is None:
        raise LanguageModelError(f"{path}: the words of a KenLM binary cannot be listed; give them with --lexicon")
    if arpa and arpa.order == 1:
        raise LanguageModelError(f"{path}: has only 1-grams, but KenLM needs order 2 or higher")
    words = [(word, None) for word in arpa.words()] if lexicon is None else _lexicon(lexicon)
    spelt = [(word, entry(word, spelling, vocabulary)) for word, spelling in words]
    entries = tuple(dict.fromkeys(made for _, made in spelt if made))
    if not entries:
        raise LanguageModelError(f"{lexicon or path}: none of its words can be spelt with the labels of the model")
    return WordLM(str(path), entries, tuple(vocabulary.labels), tuple(word for word, made in spelt if made is None))


def _lexicon(path: str | os.PathLike) -> list[tuple[str, list[str] | None]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LanguageModelError(f"{path}: cannot be read as a lexicon ({error})") from None
    found = [line.split() for line in lines if line.strip()]
    if not found:
        raise LanguageModelError(f"{path}: the lexicon is empty")
    return [(word, [s for s in spelling if s != "|"] or None) for word, *spelling in found if word not in SPECIAL]


def entry(word: str, spelling: list[str] | None, vocabulary: Vocabulary) -> Entry | None:
    """Spells a word with the labels, in lower or upper case if necessary. Returns None if they cannot spell it."""
    text = unicodedata.normalize("NFC", word if spelling is None else "".join(spelling))
    for form in (text, text.lower(), text.upper()):
        if 0 < len(form) <= _LONGEST and " " not in form and set(form) <= vocabulary.characters:
            return Entry(word, form, tuple(vocabulary.encode(form)))
    return None


class WordSearch:
    """flashlight's lexicon decoder for a WordLM. It sums the probabilities of CTC paths; alpha multiplies log10 p.

    Raises LanguageModelError if KenLM cannot read the model or flashlight has no wheels for this Python, and
    MissingExtra if the packages of the extra `lm` are not installed.
    """

    def __init__(self, lm: WordLM, beam: int, alpha: float, beta: float, n_best: int = 1) -> None:
        if not has_wheels():
            raise LanguageModelError(
                f"{lm.path}: flashlight-text searches over words, and has wheels only for Python 3.11 and 3.12; use "
                "one of these, or a model of symbols (`jasper-fast lm train --characters`)"
            )
        decoder = need("flashlight.lib.text.decoder", "lm")
        kenlm = need("flashlight.lib.text.decoder.kenlm", "lm")
        self.n_best, self._beam = n_best, beam
        self.entries, self._labels, self._space = lm.entries, lm.labels, lm.labels.index(" ")
        text_of = {entry.token: entry.text for entry in reversed(lm.entries)}  # the first spelling of a word wins
        dictionary = need("flashlight.lib.text.dictionary", "lm").Dictionary([*text_of, "<unk>"])
        self._unknown = dictionary.get_index("<unk>")
        self._texts = {dictionary.get_index(token): text for token, text in text_of.items()}
        try:
            self._model = kenlm.KenLM(lm.path, dictionary)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            reason = " ".join(str(error).split()).rpartition(" threw ")[2]
            raise LanguageModelError(f"{lm.path}: KenLM cannot read it: {reason[:200]}") from None
        self._trie, start = decoder.Trie(len(lm.labels) + 1, self._space), self._model.start(False)
        for entry in lm.entries:
            word = dictionary.get_index(entry.token)
            _, score = self._model.score(start, word)
            self._trie.insert([*entry.symbols, self._space], word, score)
        self._trie.smear(decoder.SmearingMode.MAX)
        self.weigh(alpha, beta)

    def weigh(self, alpha: float, beta: float) -> None:
        """Sets the weights of later searches; the model stays loaded."""
        self.alpha, self.beta = alpha, beta
        decoder = need("flashlight.lib.text.decoder", "lm")
        options = decoder.LexiconDecoderOptions(
            beam_size=self._beam,
            beam_size_token=min(_TOKENS, len(self._labels) + 1),
            beam_threshold=_THRESHOLD,
            lm_weight=alpha,
            word_score=beta,
            unk_score=-math.inf,
            sil_score=0.0,
            log_add=True,
            criterion_type=decoder.CriterionType.CTC,
        )
        self._decoder = decoder.LexiconDecoder(
            options, self._trie, self._model, self._space, len(self._labels), self._unknown, [], False
        )

    def __call__(self, log_probs: np.ndarray) -> list[Hypothesis]:
        """Returns the best texts of log-probs (T, V), fp32, the best first; an empty list if no sequence
        of words is possible."""
        frames, classes = log_probs.shape
        emissions = np.full((frames + 1, classes), _NEVER, dtype=np.float32)
        np.maximum(log_probs, _NEVER, out=emissions[:frames])
        emissions[frames, self._space] = 0.0  # a space after the last frame ends the last word
        best: dict[str, Hypothesis] = {}
        for result in self._decoder.decode(emissions.ctypes.data, frames + 1, classes):
            words = [self._texts[w] for w in result.words if w >= 0]
            text = " ".join(words)
            log_prob = result.score - self.alpha * result.lmScore - self.beta * len(words)
            if text not in best and result.score > _NEVER / 2:
                best[text] = Hypothesis(text, result.score, log_prob, tuple(map(self._labels.index, text)))
            if len(best) == self.n_best:
                break
        return [*best.values()]
