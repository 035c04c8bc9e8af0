"""CTC prefix beam search, with an n-gram of the model's own symbols fused in, or one of words.

log_probs (N, T, V), the blank is class V - 1. A prefix s of symbols has the probability of all paths that collapse to
it, ending in blank (b) or not (n). Its score, in natural logarithms, is

    log(b + n) + sum over its symbols of (alpha * log10 p(symbol | symbols before it) + beta)

and at the end alpha * log10 p(end | s) is added. Of each frame's prefixes the `beam` best are kept; of equal ones
first those that were in the beam, in its order, then those longer by one symbol, by the beam's order and the symbol.
`ngram.py` says how the n-gram lies in memory, `words.py` what words add. Each face exports `search`; `reference.py` is
its definition.
"""
