"""CTC loss (Graves et al., 2006) with all lengths on the device: the host reads nothing, so a graph can hold it.

log_probs (N, T, V), targets (N, U), lengths and target_lengths (N,). Of U labels there are U + 1 blanks: b[u] before
label l[u], and the last behind them all. With e the log-probability of the state's symbol in frame t, before the first
frame b[0] = 0 and all others are -inf; then, forward,

    b[u] = e + lse(b[u], l[u-1])     l[u] = e + lse(l[u], b[u], l[u-1] where the label differs from the one before)
    loss = -lse(b[U], l[U-1])

and likewise from the end. A state's posterior is exp(forward + backward + loss). The gradient is PyTorch's: of the
log-probabilities as a log-softmax gave them, `exp(log_probs) - posterior`, and 0 beyond the lengths.
Each face exports `forward` and `backward`; `reference.py` is the definition.
"""
