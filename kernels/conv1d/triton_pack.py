"""Packs a weight (C_out, C_in, K), as PyTorch keeps it, into (K, C_in, C_pad) in the dtype of the activations.

C_pad is C_out rounded up to a multiple of 16, because tensor descriptors need rows that start at multiples of 16 bytes;
the added columns are zeros. A program owns BLOCK_O output by BLOCK_I input channels with all K taps. Every element is
read once in the dtype of the master weight and written once. The forward and dgrad kernels read the same pack.
"""

import triton
import triton.language as tl

PAD_OUT = 16


@triton.jit(do_not_specialize=["taps", "c_in", "c_out"])
def conv1d_pack_kernel(
    weight_ptr, pack_ptr, taps, c_in, c_out,
    PAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    i_blocks = tl.cdiv(c_in, BLOCK_I)
    offs_i = (tl.program_id(0) % i_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = (tl.program_id(0) // i_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_o < c_out)[:, None, None] & (offs_i < c_in)[None, :, None] & (offs_k < taps)[None, None, :]
    offs = (offs_o[:, None, None] * c_in + offs_i[None, :, None]) * taps + offs_k[None, None, :]
    w = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(pack_ptr.dtype.element_ty)
    c_pad = tl.cdiv(c_out, PAD) * PAD
    mask = (offs_k < taps)[:, None, None] & (offs_i < c_in)[None, :, None] & (offs_o < c_pad)[None, None, :]
    offs = (offs_k[:, None, None] * c_in + offs_i[None, :, None]) * c_pad + offs_o[None, None, :]
    tl.store(pack_ptr + offs, tl.permute(w, (2, 1, 0)), mask=mask)
