"""Depthwise 1D convolution in NTC memory: each channel has its own taps and does not depend on other channels.

    y[n, t, c] = sum_k x[n, t*stride + k*dilation - padding, c] * w[c, 0, k]

x: logical (N, C, T), memory N, T, C; weight: (C, 1, K) as PyTorch keeps it. Rows of x at t >= `lengths.before` (N,)
int64 count as zero, whatever they hold. Rows of y at t >= `lengths.after` are zero: that is the mask between a
depthwise conv and the pointwise conv that follows it. Sums are fp32 (fp64 for fp64). Each face (an implementation:
reference, aten, cpu, triton) exports `forward`, `dgrad` (gradient of x) and `wgrad` (gradient of the weight);
`reference.py` defines them. Besides dy, backward needs x and the weight.
"""
