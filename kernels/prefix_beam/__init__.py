"""CTC prefix beam search with shallow fusion of an n-gram of the model's symbols, one of words, or both.

log_probs is (N, T, V), and the blank is class V - 1. A prefix s of symbols has the probability b + n of all paths
that collapse to it: b is the sum over paths that end in a blank, and n the sum over paths that end in a symbol. The
score of a prefix, in natural logarithms, is

    log(b + n) + sum over its symbols of (alpha * log10 p(symbol | symbols before it) + beta)

and at the end alpha * log10 p(end | s) is added. After each frame the `beam` best prefixes are kept. Among prefixes of
equal score, those already in the beam come first, in the order of the beam. Then come those with a new symbol, ordered
by the place of their parent and then by the symbol. `ngram.py` defines the arrays of an n-gram, `words.py` those of
words, and what words add to the score. Each face (an implementation: reference, cpu, triton) exports `search`;
`reference.py` is its definition.
"""
