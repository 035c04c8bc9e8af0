"""The CPU face of conv1d: threaded C++ kernels (csrc/cpu/isa/conv1d_*.cpp), one set per instruction set.

In `fused`, x, weights and result are fp32. On a CPU with AVX512-BF16 the weights may be bf16. With bf16 weights x may
be bf16 too, and so may the result if there is no bias. The functions for training take 16-bit tensors as well. They
multiply bf16 tensors in bf16 if the CPU can, and all others in fp32.

The functions for training choose the algorithm by the shape and the dtype. `forward` and `dgrad` pack the weight in
every call and do not use `packed`. Results are bit-identical for any number of threads. The result of `fused` for an
utterance does not depend on the rest of the batch or on padding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jasper_fast.kernels import native
from jasper_fast.kernels.operands import FULL, Geometry, Lengths

ALGORITHMS = {"direct": 0, "fast_fir_1": 1, "fast_fir_2": 2}  # levels of nesting of the fast FIR algorithm
# From _FAST_TAPS taps on, 1.7 times fewer multiplications outweigh 2.3 times larger packs. In training the weights are
# packed in every call: below _FAST_ROWS rows, making the larger packs costs more than it saves (measured on Zen 4 at
# 256 x 256 x 11 and 768 x 768 x 25).
_FAST_TAPS = 5
_FAST_ROWS = 512


@dataclass(frozen=True)
class Packed:
    """A conv's weight in the order in which the kernel of this process's instruction set reads it; made by `pack`.

    `fast_fir_1` (Parker and Parhi's two-parallel FIR filter) does 1.3 times fewer multiplications than `direct`, and
    its pack is 1.5 times as large. `fast_fir_2` nests the filter once more: it does 1.7 times fewer multiplications
    than `direct`, and its pack is 2.3 times as large. Both need stride 1; `fast_fir_1` needs K >= 2 and `fast_fir_2`
    K >= 4. A NaN or infinity in x may spread 1 row (`fast_fir_1`) or 3 rows (`fast_fir_2`) further than the taps reach.
    Weights in bf16 are always `direct`: x is rounded to bf16 and sums are fp32.
    """

    data: Tensor
    c_out: int
    c_in: int
    taps: int
    algorithm: str = "direct"


def has_bf16() -> bool:
    """Returns whether this CPU has instructions for bf16 products, which bf16 packs need."""
    return native.cpu().conv1d_has_bf16()


def pack(
    weight: Tensor,
    *,
    transposed: bool = False,
    algorithm: str = "direct",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Packed:
    """Packs fp32 `weight` (C_out, C_in, K) for `fused`.

    transposed: pack the weight of the conv that computes the gradient of x. dtype: float32, or bfloat16 if
    `has_bf16()`. out: a buffer of that dtype and `packed_size(...)` elements to write into, which a module may keep
    from call to call.
    """
    c_out, c_in, taps = weight.shape
    if out is None:
        out = torch.empty(packed_size(weight, transposed=transposed, algorithm=algorithm, dtype=dtype), dtype=dtype)
    native.cpu().conv1d_pack(weight.detach().contiguous(), transposed, ALGORITHMS[algorithm], out)
    return Packed(out, *((c_in, c_out) if transposed else (c_out, c_in)), taps, algorithm)


def pack_once(weight: Tensor, dtype: torch.dtype, stride: int = 1) -> Packed:
    """Packs `weight` (C_out, C_in, K) of any dtype for many calls of `fused` at `stride`, in a network in `dtype`.

    The pack is bf16 if the network is in bf16 and this CPU multiplies bf16, which it does at twice the rate of fp32.
    Otherwise the pack is fp32, because no other dtype is faster on a CPU.
    """
    return pack(weight.float(), **_how(weight, dtype, _FAST_ROWS, stride))  # as for a large batch: packing is done once


def packed_size(
    weight: Tensor, *, transposed: bool = False, algorithm: str = "direct", dtype: torch.dtype = torch.float32
) -> int:
    """Returns how many elements of `dtype` `pack` writes for `weight` (C_out, C_in, K)."""
    return native.cpu().conv1d_packed_size(*weight.shape, transposed, ALGORITHMS[algorithm], dtype == torch.bfloat16)


def fused(
    x: Tensor,
    packed: Packed,
    geometry: Geometry,
    *,
    lengths: Lengths = FULL,
    bias: Tensor | None = None,
    relu: bool = False,
    panes: tuple[Tensor, Packed] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns mask(relu(conv1d(x) + x2 @ packed2 + bias)), (N, T', C_out), for `x` (N, T, C_in), in `out` if given.

    panes: x2 (N, T', C2) and packed2, a 1x1 conv packed `direct`; needs stride 1 and T' = T. x, x2 and out need unit
    channel stride; their other strides are free, so they may be slices of wider buffers. `out` is fp32. It may also be
    bf16 if the weights are bf16 and there is no bias.

    Rows of x and x2 at t >= `lengths.before` count as zero and are not read. Rows of the result at t >= `lengths.after`
    are zero. The kernel computes no products for these rows, nor for rows of the result all of whose inputs count as
    zero.

    Raises ValueError for `lengths.made` and for `masked=False`, which only GPU faces support.
    """
    if lengths.made is not None or not lengths.masked:
        raise ValueError("the cpu face always masks and does not compute output lengths: give it lengths.after")
    if out is None:
        frames = max(geometry.frames(x.shape[1], packed.taps), 0)
        out = torch.empty((x.shape[0], frames, packed.c_out), dtype=torch.float32)
    x2, packed2 = panes or (None, None)
    native.cpu().conv1d_fwd(
        x, packed.data, packed.c_out, packed.taps, geometry.stride, geometry.dilation, geometry.padding,
        ALGORITHMS[packed.algorithm], lengths.before, bias, relu, lengths.after,
        x2, None if packed2 is None else packed2.data, out,
    )  # fmt: skip
    return out


def forward(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns y (N, C_out, T'), the conv of `x` (N, C_in, T) in NTC memory with `weight` (C_out, C_in, K).

    x counts as zero at t >= `lengths` (N,). Equivalent to
    `F.conv1d(x.masked_fill(t >= lengths, 0), weight, None, *geometry)`.
    """
    how = _how(weight, x.dtype, x.shape[0] * x.shape[2], geometry.stride)
    rows = x.transpose(1, 2).to(how["dtype"])
    packed, frames = pack(weight.float(), **how), geometry.frames(x.shape[2], weight.shape[2])
    y = torch.empty((x.shape[0], max(frames, 0), weight.shape[0]), dtype=how["dtype"])
    return fused(rows, packed, geometry, lengths=Lengths(lengths), out=y).to(x.dtype).transpose(1, 2)


def dgrad(
    dy: Tensor,
    weight: Tensor,
    t: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of x, (N, C_in, T = `t`), zero at t >= `lengths`, from `dy` (N, C_out, T'); stride 1.

    The gradient is the conv of dy with the taps reversed and the channels swapped. It has NTC memory. Raises ValueError
    for another stride, and if the padding exceeds dilation * (K - 1).
    """
    stride, padding, dilation = geometry
    flipped = dilation * (weight.shape[2] - 1) - padding
    if stride != 1 or flipped < 0:
        raise ValueError(
            f"conv1d: the CPU kernel has a gradient of x only for stride 1 and padding <= dilation * (K - 1), not for "
            f"stride {stride}, padding {padding}, dilation {dilation}, K {weight.shape[2]}; use backend='reference'"
        )
    how = _how(weight, dy.dtype, dy.shape[0] * dy.shape[2], stride)
    packed, rows = pack(weight.float(), transposed=True, **how), dy.transpose(1, 2).to(how["dtype"])
    dx = torch.empty((dy.shape[0], t, weight.shape[1]), dtype=how["dtype"])  # `fused` checks t
    fused(rows, packed, Geometry(1, flipped, dilation), lengths=Lengths(after=lengths), out=dx)
    return dx.to(dy.dtype).transpose(1, 2)


def wgrad(
    x: Tensor,
    dy: Tensor,
    k: int,
    geometry: Geometry,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = False,
) -> Tensor:
    """Returns the gradient of the weight, (C_out, C_in, K = `k`), from `x` (N, C_in, T) and `dy` (N, C_out, T').

    x counts as zero at t >= `lengths`. Sums are fp32; the result is in `dtype` (default: that of `x`).
    """
    stride, padding, dilation = geometry
    dw = torch.empty((dy.shape[1], x.shape[1], k), dtype=torch.float32)
    how = _how(dw, x.dtype, dy.shape[0] * dy.shape[2], stride)
    rows, dy_rows = (v.transpose(1, 2).to(how["dtype"]) for v in (x, dy))
    native.cpu().conv1d_wgrad(
        rows, dy_rows, lengths, stride, dilation, padding, ALGORITHMS[how["algorithm"]],
        how["dtype"] == torch.bfloat16, dw,
    )  # fmt: skip
    return dw.to(dtype or x.dtype)


def _how(weight: Tensor, dtype: torch.dtype, rows: int, stride: int) -> dict[str, Any]:
    """Returns the algorithm for a conv of `rows` rows in `dtype`, and the dtype of its products, for `pack`."""
    if dtype == torch.bfloat16 and has_bf16():
        return {"algorithm": "direct", "dtype": torch.bfloat16}
    fast = stride == 1 and weight.shape[2] >= _FAST_TAPS and rows >= _FAST_ROWS
    return {"algorithm": "fast_fir_2" if fast else "direct", "dtype": torch.float32}
