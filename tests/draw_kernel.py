"""A Triton kernel that writes one tile of the dropout bits of bn_relu_dropout, for test_bn_relu_dropout.py."""

import triton
import triton.language as tl

from jasper_fast.kernels.triton_dropout import keep


@triton.jit
def draw(out_ptr, m0, C, seed_ptr, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    kept = keep(tl.cast(m0, tl.int64), 0, C, seed_ptr, threshold, BLOCK_M, BLOCK_C, VEC)
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(out_ptr + offs, kept.to(tl.int8))
