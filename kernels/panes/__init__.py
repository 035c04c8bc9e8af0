"""The plain form of the panes (a sum of 1x1 convs, each with its own batch norm): conv outputs are written to memory.

    y_p = x_p W_p^T,   out = start + sum_p (y_p - mean_p)*scale_p
    dy_p = scale_p*(g - mean_g - (y_p - mean_p)*slope_p),   dx_p = dy_p W_p,   dW_p = dy_p^T x_p

x_p: logical (N, C_p, T), memory N, T, C_p, zero at t >= lengths; W_p: (C, C_p, 1); y: (P, N*T, C), the outputs of P
panes; out and its gradient g: (N*T, C); start: (N*T, C) or (C,); mean, scale, and slope = rstd^2 * mean(g*(y - mean)):
(P, C); mean_g: (C,). Vectors are fp32 if activations have 16 bits.
Each face (an implementation: reference, cpu) exports `outputs`, `forward`, `backward_reduce` and `gradients`;
`reference.py` is their definition. `gram.py` is the Gram form of the same sum: it stores no conv outputs and uses
ATen's matrix products on every device.
"""
