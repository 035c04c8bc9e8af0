"""When no times were measured, estimates which face is fastest, from counts of FLOP, bytes and launches.

    seconds = max(FLOP / (peak * reach), bytes / bandwidth) + bytes of later kernels / bandwidth + launches * LAUNCH

`reach` is the share of the peak rate that a face is assumed to reach. `kernels/README.md` lists the counts and explains
where they come from. The estimates are used only if there are no measured times, not even of a similar GPU.
"""

from collections.abc import Iterable

import torch

from jasper_fast.kernels import likeness

LAUNCH = 2e-6  # seconds between the end of one kernel and the start of the next
PADDED = 0.125  # assumed share of a batch's rows that are padding, which our kernels skip
BATCH_ROWS = 2048  # an output with more rows is assumed to come from several utterances
# dense 16-bit FLOP per clock and SM with fp32 sums, by compute capability
FLOP_CLOCK = {"sm_80": 2048, "sm_86": 512, "sm_87": 1024, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "sm_120": 1024}
CLOCK = 1.6e9  # Hz, typical of these GPUs
UNKNOWN = likeness.Traits("sm_90", 132, 3.35e12)  # an H100, which is assumed if the traits of the GPU are not known
REACH = {
    ("triton", True): 0.70, ("aten", True): 0.75,  # 16 bits
    ("triton", False): 0.45, ("aten", False): 0.70,  # TF32; Triton's loop is slower because it loads without TMA
}  # fmt: skip
# For each op and face: extra passes over the output in the conv's own kernel, passes over the output in later kernels,
# and the number of launches.
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
    """Estimates the seconds of one call of `op` on `face` at `shape` (c_in, c_out, taps, stride, dilation) with `rows`
    = N*T' (batch times output frames)."""
    gpu = gpu if gpu is not None and gpu.bytes_s and gpu.sms else UNKNOWN
    c_in, c_out, taps, stride, _ = shape
    wide, size = dtype.itemsize == 2, dtype.itemsize
    done = 1.0 - PADDED if face == "triton" and rows > BATCH_ROWS else 1.0
    peak = FLOP_CLOCK.get(gpu.capability, FLOP_CLOCK["sm_90"]) * gpu.sms * CLOCK * (1.0 if wide else 0.5)
    # Rows are computed in tiles of 128, and a partial tile costs as much as a full one.
    products = 2.0 * done * -(-rows // 128) * 128 * c_in * c_out * taps
    inside, after, launches = PASSES[op][face]
    output = size * done * rows * c_out
    moved = size * (done * rows * stride * c_in + taps * c_in * c_out) + (1 + inside) * output
    conv = max(products / (peak * REACH[face, wide]), moved / gpu.bytes_s)
    return conv + after * output / gpu.bytes_s + launches * LAUNCH


def fastest(
    calls: Iterable[tuple[str, tuple[int, ...], int]], device: torch.device, dtype: torch.dtype, rows: int | None
) -> str:
    """Returns the face, "triton" or "aten", on which `calls`, each (op, shape, count), take the least estimated time.
    `rows` is N*T' (None: 32768)."""
    rows, calls, gpu = 1 << 15 if rows is None else rows, list(calls), likeness.traits(device.index or 0)
    total = {
        face: sum(count * seconds(face, op, shape, rows, dtype, gpu) for op, shape, count in calls)
        for face in ("triton", "aten")
    }
    return min(sorted(total), key=total.__getitem__)
