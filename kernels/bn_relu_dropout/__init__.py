"""Batch norm, optional residual sum, ReLU, dropout and the zeroing of padding, in one pass over NTC memory.

    z = mask(dropout(relu((y - mean)*rstd*gamma + beta [+ residual])))

y, z, residual: logical (N, C, T), memory N, T, C. `Norm` holds mean, rstd, gamma, beta: (C,), fp32 (fp64 for fp64);
`Mask` holds the lengths, (N,) int64, and the seed and rate of the dropout. Frames t >= length are padding and become
exactly 0. Each face (an implementation: reference, cpu, triton, cuda) exports `stats`, `forward`, `backward_reduce` and
`backward_apply`; `reference.py` is their definition. Backward needs y, the channel vectors, the lengths and the seed.
From them it recomputes the dropout mask and the sign of the ReLU's input. With a residual it needs z as well. An
element of z is zero if the ReLU or dropout let nothing pass, so the residual itself need not be kept.
"""
