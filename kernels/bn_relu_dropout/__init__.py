"""Batch norm, optional residual sum, ReLU, dropout and the zeroing of padding, in one pass over NTC memory.

    z = mask(dropout(relu((y - mean)*rstd*gamma + beta [+ residual])))

y, z, residual: logical (N, C, T), memory N, T, C. `Norm` holds mean, rstd, gamma, beta: (C,), fp32 (fp64 for fp64);
`Mask` the lengths: (N,) int64, frames t >= length are padding and become exactly 0, and the dropout's seed and rate.
Each face exports `stats`, `forward`, `backward_reduce` and `backward_apply`; `reference.py` is their definition.
Saved for backward: y, mean, rstd and the seed, and z where there is a residual (it tells where the ReLU was open, so
that the residual itself need not be kept). The dropout mask and the ReLU's sign are made again.
"""
