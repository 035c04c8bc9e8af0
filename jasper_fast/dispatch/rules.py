"""Estimates which face is faster where nothing was measured, from products, bytes and launches.

    seconds = max(products / (peak * reach), bytes / bandwidth) + later passes / bandwidth + launches * LAUNCH

`reach` is the share of the peak rate that a face is assumed to reach. `kernels/README.md` lists the counts and says
where they come from. A measured row, even that of a similar GPU, comes before these estimates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from jasper_fast.kernels import likeness

LAUNCH = 2e-6  # seconds from one kernel to the next
PADDED = 0.125  # share of a batch's rows that are padding, which our kernels skip
BATCH_ROWS = 2048  # an output with more rows is assumed to come from several utterances
# dense 16-bit FLOP per clock and SM with fp32 sums, by compute capability; and clocks per second, roughly
FLOP_CLOCK = {"sm_80": 2048, "sm_86": 512, "sm_87": 1024, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "sm_120": 1024}
CLOCK = 1.6e9
# the traits assumed if the GPU's are not known: those of an H100
UNKNOWN = likeness.Traits("sm_90", 132, 3.35e12)
REACH = {
    ("triton", True): 0.70, ("aten", True): 0.75,  # 16 bits
    ("triton", False): 0.45, ("aten", False): 0.70,  # TF32, whose operands Triton's loop loads without TMA
}  # fmt: skip
# (extra passes of the conv's own kernel over its output, passes of the kernels after it, launches)
PASSES = {
    "conv1d.forward": {"triton": (0, 0, 1), "aten": (0, 0, 1)},
    "conv1d.forward_stats": {"triton": (0, 0, 2), "aten": (0, 1, 3)},
    "conv1d.dgrad": {"triton": (0, 0, 1), "aten": (0, 0, 1)},
    "conv1d.dgrad_bn": {"triton": (2, 0, 2), "aten": (0, 2, 3)},
    "conv1d.wgrad": {"triton": (0, 0, 2), "aten": (0, 0, 1)},
    "conv1d.fused": {"triton": (0, 0, 1), "aten": (0, 4, 3)},
}


def seconds(
    face: str, op: str, shape: tuple[int, ...], rows: int, dtype: torch.dtype, gpu: likeness.Traits | None
) -> float:
    """Estimated seconds of one call of `op` on `face` at `shape` (c_in, c_out, taps, stride, dilation), `rows` N*T'."""
    gpu = gpu if gpu is not None and gpu.bytes_s and gpu.sms else UNKNOWN
    c_in, c_out, taps, stride, _ = shape
    wide, size = dtype.itemsize == 2, dtype.itemsize
    done = 1.0 - PADDED if face == "triton" and rows > BATCH_ROWS else 1.0
    peak = FLOP_CLOCK.get(gpu.capability, FLOP_CLOCK["sm_90"]) * gpu.sms * CLOCK * (1.0 if wide else 0.5)
    # rows come in tiles of 128, and a tile that is not full costs as much as a full one
    products = 2.0 * done * -(-rows // 128) * 128 * c_in * c_out * taps
    inside, after, launches = PASSES[op][face]
    output = size * done * rows * c_out
    moved = size * (done * rows * stride * c_in + taps * c_in * c_out) + (1 + inside) * output
    conv = max(products / (peak * REACH[face, wide]), moved / gpu.bytes_s)
    return conv + after * output / gpu.bytes_s + launches * LAUNCH


@functools.cache
def traits(device: torch.device) -> likeness.Traits | None:
    """The traits of a CUDA device, cached."""
    return likeness.traits(device.index or 0)


def fastest(
    calls: Iterable[tuple[str, tuple[int, ...], int]], device: torch.device, dtype: torch.dtype, rows: int | None
) -> str:
    """The face, "triton" or "aten", on which `calls`, (op, shape, count), take the least estimated time; `rows` as for
    `tables.fastest`."""
    rows, calls, gpu = 1 << 15 if rows is None else rows, list(calls), traits(device)
    total = {
        face: sum(count * seconds(face, op, shape, rows, dtype, gpu) for op, shape, count in calls)
        for face in ("triton", "aten")
    }
    return min(sorted(total), key=total.__getitem__)
