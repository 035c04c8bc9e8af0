"""An n-gram model of symbols or words, as an automaton in flat arrays. A state is a context. An arc is one n-gram of
the model: a context and the symbol (or word) that follows it."""

from typing import NamedTuple

from torch import Tensor


class Ngram(NamedTuple):
    """A back-off n-gram over classes 0 .. V - 2; class V - 1 (for symbols, CTC's blank) means the end of the text.

        log10 p(c | state) = arc_log10[a]                                  if the state has an arc a for class c
                             back_off[state] + log10 p(c | lower[state])   if it has none

    arc_begin (S + 1,) int64: the arcs of state i are arc_begin[i] .. arc_begin[i + 1] - 1, in ascending order of their
    symbols. arc_symbol, arc_next (A,) int32: the symbol of an arc and the state after it. arc_log10 (A,) fp32.
    lower (S,) int32: the state of a shorter context, with lower[s] < s for s > 0. back_off (S,) fp32. State 0 is the
    empty context and has an arc for every class. A text begins in state ``start``.
    """

    arc_begin: Tensor
    arc_symbol: Tensor
    arc_next: Tensor
    arc_log10: Tensor
    lower: Tensor
    back_off: Tensor
    start: int
