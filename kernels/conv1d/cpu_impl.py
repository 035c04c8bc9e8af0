"""The CPU face of conv1d: C++ micro-kernels (csrc/cpu/isa/conv1d_*.cpp), vectorised at run time and threaded.

`fused` takes x and gives y in fp32, with weights in fp32 or, on a CPU that multiplies pairs of it (AVX512-BF16), bf16,
as x may be then. The functions of training take 16 bits as well, and compute in bf16 there, else in fp32.

Weights are packed in every call, by an algorithm that the shape chooses: `packed` is not used. Results are the same
bits whatever the number of threads, and an item's are the same in any batch and with any padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jasper_fast.kernels import native

ALGORITHMS = {"direct": 0, "fast_fir_1": 1, "fast_fir_2": 2}  # how often the fast FIR algorithm is nested
# Taps from which 1.7 times fewer multiplications outweigh 2.3 times larger weights. In training the weights are packed
# once a call: below so many rows the larger packs cost more than they save (measured on Zen 4 at 256 x 256 x 11 and
# 768 x 768 x 25).
_FAST_TAPS = 5
_FAST_ROWS = 512


@dataclass(frozen=True)
class Packed:
    """A conv's weight in the kernel's order: made by `pack`, for this process' instruction set.

    `fast_fir_1` (Parker and Parhi's two-parallel FIR filter) does 1.3 times fewer multiplications than `direct` and
    keeps 1.5 times as much; `fast_fir_2`, the same nested, 1.7 times fewer and 2.3 times as much. They need stride 1
    and K >= 2 and 4. A NaN or infinity in x may reach 1 and 3 rows further than K says.
    Weights in bf16 are always `direct`; x is rounded to bf16 where it meets them, and sums are fp32.
    """

    data: Tensor
    c_out: int
    c_in: int
    taps: int
    algorithm: str = "direct"


def has_bf16() -> bool:
    """Whether this process' instruction set multiplies pairs of bf16, so that `pack` may make them."""
    return native.cpu().conv1d_has_bf16()


def pack(
    weight: Tensor,
    *,
    transposed: bool = False,
    algorithm: str = "direct",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Packed:
    """fp32 `weight` (C_out, C_in, K) packed for `fused`; `transposed` packs the conv that gives the gradient of x.

    dtype: float32, or bfloat16 where `has_bf16()`. out: a buffer of that dtype and `packed_size(...)` elements to write
    into, so that a module can keep one.
    """
    c_out, c_in, taps = weight.shape
    if out is None:
        out = torch.empty(packed_size(weight, transposed=transposed, algorithm=algorithm, dtype=dtype), dtype=dtype)
    native.cpu().conv1d_pack(weight.detach().contiguous(), transposed, ALGORITHMS[algorithm], out)
    return Packed(out, *((c_in, c_out) if transposed else (c_out, c_in)), taps, algorithm)


def pack_once(weight: Tensor, dtype: torch.dtype, stride: int = 1) -> Packed:
    """`weight` (C_out, C_in, K) of any dtype packed for many calls of `fused` at `stride`, in a network in `dtype`.

    bf16 where this CPU multiplies it, at twice the rate of fp32; else fp32, than which no other dtype is faster here.
    """
    if dtype == torch.bfloat16 and has_bf16():
        return pack(weight.float(), dtype=dtype)
    return pack(weight.float(), algorithm="fast_fir_2" if stride == 1 and weight.shape[2] >= _FAST_TAPS else "direct")


def packed_size(
    weight: Tensor, *, transposed: bool = False, algorithm: str = "direct", dtype: torch.dtype = torch.float32
) -> int:
    """Elements of `dtype` that `pack` writes for `weight` (C_out, C_in, K)."""
    bf16 = dtype == torch.bfloat16
    return native.cpu().conv1d_packed_size(*weight.shape, transposed, ALGORITHMS[algorithm], bf16)


def fused(
    x: Tensor,
    packed: Packed,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    in_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out_lengths: Tensor | None = None,
    x2: Tensor | None = None,
    packed2: Packed | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """mask(relu(conv1d(x) + x2 @ packed2 + bias)) of `x` (N, T, C_in) and `x2` (N, T', C2), into `out` (N, T', C_out).

    All three have unit channel stride and any other strides, so that a slice of a history buffer will do. Rows of x
    and x2 at t >= `in_lengths` (N,) count as zero and are not read; rows of the result at t >= `out_lengths` (N,) are
    zero and cost nothing, and so do rows that no row of x reaches. packed2 is a 1x1 conv, packed `direct`.
    """
    if out is None:
        frames = (x.shape[1] + 2 * padding - dilation * (packed.taps - 1) - 1) // stride + 1
        out = torch.empty((x.shape[0], max(frames, 0), packed.c_out), dtype=torch.float32)
    native.cpu().conv1d_fwd(
        x, packed.data, packed.c_out, packed.taps, stride, dilation, padding, ALGORITHMS[packed.algorithm],
        in_lengths, bias, relu, out_lengths, x2, None if packed2 is None else packed2.data, out,
    )  # fmt: skip
    return out


def forward(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> Tensor:
    """y (N, C_out, T') of `x` (N, C_in, T) in NTC memory, zero at t >= `lengths` (N,), and `weight` (C_out, C_in, K).

    Equivalent to `F.conv1d(x.masked_fill(t >= lengths, 0), weight, None, stride, padding, dilation)`.
    """
    how = _how(x, weight, x.shape[0] * x.shape[2], stride)
    packed, rows = pack(weight.float(), **how), x.transpose(1, 2).to(how["dtype"])
    y = fused(rows, packed, stride=stride, padding=padding, dilation=dilation, in_lengths=lengths)
    return y.to(x.dtype).transpose(1, 2)


def dgrad(
    dy: Tensor,
    weight: Tensor,
    t: int,
    stride: int,
    padding: int,
    dilation: int,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """dx (N, C_in, T = `t`) of `dy` (N, C_out, T') in NTC memory, zero at t >= `lengths`; stride 1.

    It is the conv of dy with the taps reversed and the channels swapped.
    """
    flipped = dilation * (weight.shape[2] - 1) - padding
    if stride != 1 or flipped < 0:
        raise ValueError(
            f"conv1d: the CPU kernel has a gradient of x for stride 1 and padding <= dilation * (K - 1), not for "
            f"stride {stride}, padding {padding}, dilation {dilation}, K {weight.shape[2]}; use backend='reference'"
        )
    how = _how(dy, weight, dy.shape[0] * dy.shape[2], stride)
    packed, rows = pack(weight.float(), transposed=True, **how), dy.transpose(1, 2).to(how["dtype"])
    dx = torch.empty((dy.shape[0], t, weight.shape[1]), dtype=torch.float32)  # t is not implied where K is even
    fused(rows, packed, padding=flipped, dilation=dilation, out_lengths=lengths, out=dx)
    return dx.to(dy.dtype).transpose(1, 2)


def wgrad(
    x: Tensor,
    dy: Tensor,
    k: int,
    stride: int,
    padding: int,
    dilation: int,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
) -> Tensor:
    """dweight (C_out, C_in, K = `k`), fp32, of `x` (N, C_in, T), zero at t >= `lengths`, and `dy` (N, C_out, T')."""
    if dtype not in (None, torch.float32):
        raise TypeError(f"the cpu face computes in fp32, and gives no gradient in {dtype}")
    dw = torch.empty((dy.shape[1], x.shape[1], k), dtype=torch.float32)
    how = _how(x, dw, dy.shape[0] * dy.shape[2], stride)
    algorithm, bf16 = ALGORITHMS[how["algorithm"]], how["dtype"] == torch.bfloat16
    rows, dy_rows = (v.transpose(1, 2).to(how["dtype"]) for v in (x, dy))
    native.cpu().conv1d_wgrad(rows, dy_rows, lengths, stride, dilation, padding, algorithm, bf16, dw)
    return dw


def _how(x: Tensor, weight: Tensor, rows: int, stride: int) -> dict[str, Any]:
    """The algorithm and the dtype of the products of one call, as `pack` takes them."""
    if x.dtype == torch.bfloat16 and has_bf16():
        return {"algorithm": "direct", "dtype": torch.bfloat16}
    return {"algorithm": _algorithm(weight, rows, stride), "dtype": torch.float32}


def _algorithm(weight: Tensor, rows: int, stride: int) -> str:
    fast = stride == 1 and weight.shape[2] >= _FAST_TAPS and rows >= _FAST_ROWS
    return "fast_fir_2" if fast else "direct"
