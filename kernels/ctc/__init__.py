"""CTC loss (Graves et al., 2006) with all lengths on the device: the host reads nothing, so a CUDA graph can hold it.

log_probs (N, T, V), targets (N, U), lengths and target_lengths (N,). U labels have U + 1 blanks around them: b[u]
comes before label l[u], and b[U] after the last label. Before the first frame b[0] = 0 and all other states are -inf.
With e the log-probability of a state's symbol in frame t and lse the logsumexp, each frame does, forward,

    b[u] = e + lse(b[u], l[u-1])     l[u] = e + lse(l[u], b[u], l[u-1] where the label differs from the one before)
    loss = -lse(b[U], l[U-1])

and likewise from the end. A state's posterior is exp(forward + backward + loss). The gradient is PyTorch's: of the
log-probabilities as a log-softmax gave them, `exp(log_probs) - posterior`, and 0 beyond the lengths.
Each face exports `forward` and `backward`; `reference.py` is the definition.
"""
