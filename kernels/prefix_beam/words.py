"""Words spelt by symbols, in flat arrays: a trie, and what each word adds to the score at its end."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from jasper_fast.kernels.prefix_beam.ngram import Ngram


class Words(NamedTuple):
    """M nodes of a trie of K words; node 0 is the root, and a child has a higher number than its parent. The last of
    the K is the unknown word: all spellings that are not in the trie.

    A word ends at a space that follows a symbol, and at the end of the text; there it adds, in natural logarithms,

        alpha * log10 p(class of the word | words before it) + extra[word]

    and the end of the text adds alpha * log10 p(end | words). To guide the beam early, a prefix within a word, at
    node m, already counts ``ahead[m]`` of this; or ``ahead[M]``, if no word begins that way.

    child_begin (M + 1,) int64: the children of node m are child_begin[m] .. child_begin[m + 1] - 1, by symbol,
    ascending; child_symbol, child_next (M - 1,) int32; word (M,) int32, -1 where no word ends; ahead (M + 1,) fp64,
    ahead[0] is 0; extra (K,) fp64; classes (K,) int32, each word's class in ``lm``; space: the class of the space.
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
