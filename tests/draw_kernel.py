"""Triton kernels for tests of bn_relu_dropout: `draw` stores the dropout bits of a tile, and `places` stores the
utterance and the frame of each row of a tile."""

import triton
import triton.language as tl

from jasper_fast.kernels.bn_relu_dropout.triton_impl import _places
from jasper_fast.kernels.triton_dropout import keep


@triton.jit
def draw(out_ptr, m0, C, seed_ptr, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    kept = keep(tl.cast(m0, tl.int64), 0, C, seed_ptr, threshold, BLOCK_M, BLOCK_C, VEC)
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(out_ptr + offs, kept.to(tl.int8))


@triton.jit
def places(n_ptr, t_ptr, m0, rows, frames, BLOCK_M: tl.constexpr):
    n, t = _places(tl.cast(m0, tl.int64), rows, frames, BLOCK_M)
    tl.store(n_ptr + tl.arange(0, BLOCK_M), n.to(tl.int64))
    tl.store(t_ptr + tl.arange(0, BLOCK_M), t.to(tl.int64))
