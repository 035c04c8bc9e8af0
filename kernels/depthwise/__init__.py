"""Depthwise 1D convolution in NTC memory: each channel has taps of its own, and no channel sees another.

    y[n, t, c] = sum_k x[n, t*stride + k*dilation - padding, c] * w[c, 0, k]

x: logical (N, C, T), memory N, T, C; weight: (C, 1, K) as PyTorch keeps it. Rows of x at t >= `lengths.before` (N,)
int64 count as zero and are not read, whatever they hold. Rows of y at t >= `lengths.after` are zero: that is the mask
between a depthwise conv and the pointwise conv that follows it. Sums are fp32 (fp64 for fp64). Each face exports
`forward`, `dgrad` and `wgrad`; `reference.py` defines them. Backward needs x and the weight.
"""
