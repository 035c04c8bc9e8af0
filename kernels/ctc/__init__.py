"""CTC loss (Graves et al., 2006). The host reads no tensor, not even the lengths, so a CUDA graph can capture it.

log_probs (N, T, V), targets (N, U), lengths and target_lengths (N,). U labels have U + 1 blanks around them: b[u]
comes before label l[u], and b[U] after the last label. Before the first frame b[0] = 0 and all other states are -inf.
Each frame then updates the states. With e the log-probability of a state's symbol in the frame and lse the logsumexp:

    b[u] = e + lse(b[u], l[u-1])     l[u] = e + lse(l[u], b[u], l[u-1] if label u differs from label u-1)
    loss = -lse(b[U], l[U-1])

The backward variables are computed in the same way from the last frame to the first, but those of a frame leave out its
own e. The posterior of a state is exp(forward + backward + loss). The gradient is that of PyTorch's CTC loss, which
takes log_probs as the output of a log-softmax: `exp(log_probs) - posterior`, and 0 beyond the lengths.
Each face (an implementation: reference, triton) exports `forward` and `backward`; `reference.py` is the definition.
"""
