"""1D convolution in NTC memory: an implicit GEMM that has no im2col buffer, never changes the layout and skips padding.

    y[n, t, co] = sum_k sum_c x[n, t*stride + k*dilation - padding, c] * w[co, c, k]

x: logical (N, C_in, T), memory N, T, C; weight: (C_out, C_in, K) as PyTorch keeps it; lengths: (N,) int64. Rows of x at
t >= length count as zero. (aten reads them, so its caller makes them zero.) `clean` promises that those rows are zero,
which makes some faces faster. `packed` is the weight in the memory order that the face's kernels read. Each face (an
implementation: reference, aten, cpu, triton, cuda) exports `forward`, `dgrad` (gradient of x) and `wgrad` (gradient of
the weight). A face whose kernels also compute the reductions of batch norm exports `forward_stats` and `dgrad_bn` too.
`reference.py` defines them all. Backward needs x and the weight.

`fused`, which all faces but aten export, is for inference, where batch norm is folded into the conv. It adds the bias,
1x1 convs over a second input (the panes of a dense residual), ReLU and the mask. It works on (N, T, C) tensors whose
rows may be slices of a wider buffer.
"""
