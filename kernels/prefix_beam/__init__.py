"""CTC prefix beam search with shallow fusion of an n-gram of the model's symbols, or of words.

log_probs (N, T, V), the blank is class V - 1. A prefix s of symbols has the probability of all paths that collapse to
it, ending in blank (b) or not (n). Its score, in natural logarithms, is

    log(b + n) + sum over its symbols of (alpha * log10 p(symbol | symbols before it) + beta)

and at the end alpha * log10 p(end | s) is added. After each frame the `beam` best prefixes are kept. Ties go first to
prefixes already in the beam, in its order, then to those with a new symbol, by their parent's place and the symbol.
`ngram.py` says how the n-gram lies in memory, `words.py` what words add. Each face exports `search`; `reference.py` is
its definition.
"""
