"""Draws the dropout bits of philox.py inside a Triton kernel, for a tile of an NTC activation."""

import triton
import triton.language as tl


@triton.jit
def keep(m0, c0, C, seed_ptr, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    """Returns which elements dropout keeps in the tile at row m0 and channel c0: bool [BLOCK_M, BLOCK_C]."""
    seed = tl.load(seed_ptr)
    threshold = tl.cast(threshold, tl.int32).to(tl.uint32, bitcast=True)
    if VEC % 4 == 0:  # C is a multiple of 4, so the four words of a counter belong to neighbours in one row
        groups: tl.constexpr = BLOCK_C // 4
        base = m0 * (C // 4) + c0 // 4
        offs = tl.arange(0, BLOCK_M)[:, None] * (C // 4) + tl.arange(0, groups)[None, :]
        counter = base + offs.to(tl.int64)
        low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        zero = tl.zeros([BLOCK_M, groups], tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
        even = tl.join(w0 >= threshold, w2 >= threshold)
        odd = tl.join(w1 >= threshold, w3 >= threshold)
        kept = tl.join(even, odd).reshape([BLOCK_M, BLOCK_C])  # [M, C/4, 2, 2] in the order w0 w1 w2 w3
    else:  # one call per element, which uses one of the four words
        base = m0 * C + c0
        offs = tl.arange(0, BLOCK_M)[:, None] * C + tl.arange(0, BLOCK_C)[None, :]
        element = base + offs.to(tl.int64)
        counter = element >> 2
        low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
        zero = tl.zeros([BLOCK_M, BLOCK_C], tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
        word = element & 3
        drawn = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        kept = drawn >= threshold
    return kept
