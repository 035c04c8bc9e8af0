"""How the CUDA convs divide their work: frames per tile, splits of a tile's reduction, shared memory.

`loop` names the inner loop: 75 is mma.sync with loads through registers, 80 is mma.sync with cp.async, 90 is wgmma.
Times are estimates, in clocks of one multiprocessor, derived from its peak rates (kernels/README.md). They serve only
to compare tiles.
"""

import functools
from typing import NamedTuple

from jasper_fast.kernels.conv1d.cuda_args import CHUNK, OUT

BLOCKS = {75: (64,), 80: (128, 64), 90: (216, 176, 104, 64)}  # frames per tile: the choices of each loop
STAGES = {75: 2, 80: 3}  # buffers for the operands of a step; loop 90 has as many as fit, up to MAX_STAGES
MAX_STAGES, MAX_PANELS = 8, 4
SLAB = 32  # frames that the epilogue processes at a time
FRAMES = 64  # frames that wgrad reduces in one step
MIN_STEPS = 8  # fewest steps of a share: with fewer, adding the sums of the shares would cost more than sharing saves
_WEIGHTS = OUT * CHUNK * 2  # bytes of a step's weights
_STAGING = SLAB * (OUT + 8) * 4
_STAGING_90 = SLAB * (OUT + 4) * 4
PRODUCTS = {75: 512, 80: 1024, 90: 2048}  # peak 16-bit multiply-adds per clock of the instruction of each loop
HALF_RATE = ((8, 6), (8, 9), (12, 0), (12, 1))  # compute capabilities with half the A100's rate
_PORT, _L2 = 128, 64  # bytes per clock of one multiprocessor: through the shared-memory port, and from L2


class Gpu(NamedTuple):
    """The properties of a GPU on which plans depend.

    These are its inner loop, the number of multiprocessors, the bytes of shared memory that a CTA may have, the bytes
    of L2, and 16-bit multiply-adds per clock (0: the peak of the loop).
    """

    loop: int
    sms: int
    shared: int
    l2: int = 4 << 20  # the bytes on a T4 (Turing)
    products: int = 0


class Plan(NamedTuple):
    """How a conv is divided: frames per tile, tiles along T and C_out, splits of a tile's reduction, CTAs.

    shared: bytes of shared memory. panels, stages: numbers of buffers for panels of activations and for weights (stages
    is 0 except for loop 90; see STAGES).
    """

    block: int
    t_blocks: int
    o_blocks: int
    splits: int
    grid: int
    shared: int
    panels: int
    stages: int = 0


class Wgrad(NamedTuple):
    """How the gradient of a weight is divided: taps per CTA, blocks of channels, groups of taps, shares of the frames.

    An utterance has `segments` segments of 64 frames. The segments of all utterances are cut into `shares` shares of
    `share` segments, and each share is summed by its own CTAs.
    """

    loop: int
    taps: int
    in_blocks: int
    out_blocks: int
    tap_groups: int
    segments: int
    share: int
    shares: int
    grid: int
    shared: int
    stages: int


class Work(NamedTuple):
    """The sizes of a conv: N, T', reduced and output channels, channels of the panes, taps, stride, dilation."""

    batch: int
    frames: int
    c_red: int
    c_out: int
    c_panes: int
    taps: int
    stride: int
    dilation: int

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of chunks of 64 channels: of the conv and of the panes."""
        return -(-self.c_red // CHUNK), -(-self.c_panes // CHUNK)

    @property
    def steps(self) -> int:
        """Number of steps of one tile: a step reduces one chunk of channels at one tap."""
        conv, panes = self.chunks
        return self.taps * conv + panes


def _panel_bytes(block: int, taps: int, dilation: int, stride: int) -> int:
    """Returns the bytes of a panel.

    A panel has one part for each residue of t modulo the stride. A part has an odd number of rows, so that the cells of
    a row lie in different banks.
    """
    return ((block + (taps - 1) * dilation // stride) | 1) * stride * CHUNK * 2


def shared_bytes(loop: int, block: int, work: Work, panels: int, stages: int = 0) -> int:
    """Returns the bytes of shared memory that a CTA of a conv needs, except in `wgrad`."""
    panel = _panel_bytes(block, work.taps, work.dilation, work.stride)
    if loop == 90:
        return panels * panel + stages * _WEIGHTS + _STAGING_90 + (MAX_STAGES + MAX_PANELS) * 16
    return max(panels * panel + STAGES[loop] * _WEIGHTS, _STAGING)  # staging reuses the memory of the pipeline


@functools.lru_cache(maxsize=4096)
def plan(gpu: Gpu, work: Work, may_split: bool = False) -> Plan:
    """Returns the plan that should take the fewest clocks. Raises ValueError if no tile fits in shared memory."""
    plans = [p for block in BLOCKS[gpu.loop] if (p := _plan(gpu, work, block, may_split)) is not None]
    if not plans:
        raise ValueError(_too_large(gpu, work))
    return min(plans, key=lambda p: _clocks(gpu, work, p))


def fits(gpu: Gpu, work: Work) -> bool:
    """Returns whether the GPU's shared memory has room for a tile of the forward pass and for one of `wgrad`."""
    forward = any(_plan(gpu, work, block, False) is not None for block in BLOCKS[gpu.loop])
    return forward and any(_plan_wgrad(gpu, work, *way) is not None for way in _wgrad_ways(gpu.loop, work))


def _too_large(gpu: Gpu, work: Work) -> str:
    return (
        f"a conv of {work.taps} taps at dilation {work.dilation} and stride {work.stride} does not fit the "
        f"{gpu.shared} bytes of shared memory of this GPU's blocks: use backend='reference' for it"
    )


def _plan(gpu: Gpu, work: Work, block: int, may_split: bool) -> Plan | None:
    t_blocks, o_blocks = -(-work.frames // block), -(-work.c_out // OUT)
    tiles = work.batch * t_blocks * o_blocks
    splits = max(1, min(gpu.sms // tiles, work.steps // MIN_STEPS, 4 * -(-block // SLAB))) if may_split and tiles else 1
    stages, panels = 0, min(2, sum(work.chunks))
    if gpu.loop == 90:
        panels = MAX_PANELS if work.taps == 1 else 2
        fitting = (s for s in range(MAX_STAGES, 1, -1) if shared_bytes(90, block, work, panels, s) <= gpu.shared)
        stages = next(fitting, MAX_STAGES)  # if none fits, `shared` below is too large
    shared = shared_bytes(gpu.loop, block, work, panels, stages)
    if shared > gpu.shared:
        return None
    grid = min(tiles * splits, gpu.sms) if gpu.loop == 90 else tiles * splits  # loop 90: a CTA computes several tiles
    return Plan(block, t_blocks, o_blocks, splits, grid, shared, panels, stages)


def bytes_of_step(block: int, work: Work) -> float:
    """Returns the bytes that a step reads from L2: its weights, and its share of a panel, which serves all taps."""
    return _WEIGHTS + _panel_bytes(block, work.taps, work.dilation, work.stride) / work.taps


def clocks_of_step(gpu: Gpu, block: int, work: Work) -> tuple[float, float, float]:
    """Returns the clocks of a step in the tensor cores, in the shared-memory port (operands and loads), and in L2."""
    moved = bytes_of_step(block, work)
    # loop 90: each of two warpgroups reads 64 channels of weights and all frames
    # other loops: each of four warps reads half of the weights and half of the frames
    read = 2 * (CHUNK + block) if gpu.loop == 90 else 4 * (OUT + block) // 2
    products = gpu.products or PRODUCTS[gpu.loop]
    return OUT * block * CHUNK / products, (read * CHUNK * 2 + moved) / _PORT, moved / _L2


def _clocks(gpu: Gpu, work: Work, p: Plan) -> float:
    """Returns the clocks until the last multiprocessor has finished."""
    epilogue = 16 * p.block + (500 if p.splits > 1 else 0)
    tiles = work.batch * p.t_blocks * p.o_blocks * p.splits
    return -(-tiles // gpu.sms) * (work.steps / p.splits * max(clocks_of_step(gpu, p.block, work)) + epilogue)


@functools.lru_cache(maxsize=4096)
def plan_wgrad(gpu: Gpu, work: Work) -> Wgrad:
    """Returns the plan for dw (c_out, c_red, taps). Raises ValueError if none fits the GPU's shared memory.

    The plan aims at one wave of CTAs for loop 90, and at two waves for the other loops, whose CTAs are smaller.
    """
    for loop, taps in _wgrad_ways(gpu.loop, work):
        if (cut := _plan_wgrad(gpu, work, loop, taps)) is not None:
            return cut
    raise ValueError(_too_large(gpu, work))


def _wgrad_ways(loop: int, work: Work) -> list[tuple[int, int]]:
    """Returns pairs (inner loop, taps of a CTA), the best first. Loop 90 needs stride 1; its CTAs have 3 taps or 1."""
    ways = [(90, 3 if work.taps >= 3 else 1)] if loop == 90 and work.stride == 1 else []
    return ways + [(min(loop, 80), min(taps, work.taps)) for taps in (2, 1)]


def _plan_wgrad(gpu: Gpu, work: Work, loop: int, taps: int) -> Wgrad | None:
    wide = loop == 90
    in_blocks, out_blocks = -(-work.c_red // (OUT if wide else CHUNK)), -(-work.c_out // OUT)
    groups, segments = -(-work.taps // taps), -(-work.frames // FRAMES)
    tiles, everything = in_blocks * out_blocks * groups, work.batch * segments
    wanted = gpu.sms if wide else 2 * gpu.sms
    share = -(-everything // max(1, min(wanted // tiles, everything)))
    shares = -(-everything // share)
    # with one tap, only every stride-th frame is read
    x = _panel_bytes(FRAMES, taps, work.dilation, 1 if taps == 1 else work.stride)
    stage = 2 * _panel_bytes(FRAMES, 1, 1, 1) + (2 * x + 16 if wide else x)
    stages = min(6, gpu.shared // stage) if wide else STAGES[loop]
    if stages < (3 if wide else 2) or stages * stage > gpu.shared:  # the kernels deadlock with fewer stages
        return None
    return Wgrad(
        loop, taps, in_blocks, out_blocks, groups, segments, share, shares, tiles * shares, stages * stage, stages
    )
