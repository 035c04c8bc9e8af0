"""1D convolution in NTC memory: an implicit GEMM without gathering, layout changes or work in the padding.

    y[n, t, co] = sum_k sum_c x[n, t*stride + k*dilation - padding, c] * w[co, c, k]

x: logical (N, C_in, T), memory N, T, C; weight: (C_out, C_in, K) as PyTorch keeps it; lengths: (N,) int64, rows of x at
t >= length count as zero and are not read (`clean` says that they are zero, for the faces that gain by it; `packed` is
the weight as the face packs it, for those that take it). Each face exports `forward`, `dgrad` and `wgrad`, and where
its kernels take batch norm's reductions along `forward_stats` and `dgrad_bn`; `reference.py` is the definition of all.
Saved for backward: x and the weight.

For inference `fused` adds what follows a folded conv: bias, 1x1 convs over a second input (the panes of a dense
residual), ReLU and the mask; it works on (N, T, C) tensors whose rows may be slices of a wider buffer.
"""
