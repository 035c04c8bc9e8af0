"""Words spelt by symbols, in flat arrays: a trie, and what each word adds to the score at its end."""

from typing import NamedTuple

from torch import Tensor

from jasper_fast.kernels.prefix_beam.ngram import Ngram


class Words(NamedTuple):
    """A trie of K words with M nodes. Node 0 is the root, and a child has a higher number than its parent.

    The last of the K words is the unknown word: it stands for all spellings that are not in the trie. A word ends where
    a symbol other than a space is followed by a space or by the end of the text. There it adds to the score, in natural
    logarithms,

        alpha * log10 p(class of the word | words before it) + extra[word]

    and the end of the text adds alpha * log10 p(end | words). To guide the beam early, the score of a prefix that
    ends within a word, at node m, includes ``ahead[m]``: an estimate of what the word will add. If no word begins with
    these symbols, it includes ``ahead[M]``.

    child_begin (M + 1,) int64: the children of node m are child_begin[m] .. child_begin[m + 1] - 1, in ascending order
    of their symbols. child_symbol, child_next (M - 1,) int32: each child's symbol and node. word (M,) int32: the word
    that ends at a node, or -1. ahead (M + 1,) fp64: ahead[0] is 0. extra (K,) fp64. classes (K,) int32: each word's
    class in ``lm``. space: the class of the space.
    """

    child_begin: Tensor
    child_symbol: Tensor
    child_next: Tensor
    word: Tensor
    ahead: Tensor
    extra: Tensor
    classes: Tensor
    space: int
    lm: Ngram
