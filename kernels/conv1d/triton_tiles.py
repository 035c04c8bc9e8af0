"""Chooses the tiles of the Triton convs: the tile of a call (from a table, or the default), and the tiles to be timed.

A forward, dgrad or fused program owns `t` frames by `n` output channels. In each step it takes `k` input channels of
one tap, so a 16-bit step of 128 x 128 x 64 moves 32 KB for 2.1 MFLOP. In fused, `splits` programs share the reduction
of a tile. A wgrad program owns `n` input by `k` output channels of one tap or two (`wgrad_taps`) and takes `t` frames
in each step; `splits` programs share the utterances.
"""

import functools
from typing import NamedTuple

import torch

from jasper_fast.kernels import tables

# WAVE, FLOP_S, BYTES_S and L2_S describe an H100. Defaults are computed from them, so they are the same on every GPU.
WAVE = 132  # multiprocessors. A wave of programs is one on each multiprocessor, or two if a wgrad program has one tap
FLOP_S = 660e12  # FLOP/s of 16-bit matrix products that these tiles reach at best
BYTES_S = 3e12  # bytes per second of the GPU's memory
L2_S = 5.5e12  # bytes per second from L2 to all multiprocessors
MERGE_G, MERGE_C = 64, 32  # tiles that a merging program reads at a time, and channels that it owns
MIN_STEPS = 8  # minimum steps per split: with fewer, adding up the splits would cost more than splitting saves


class Tile(NamedTuple):
    """Sizes of a program's tile and of its steps (powers of two), and the options that it is compiled with."""

    t: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    splits: int = 1


class Shape(NamedTuple):
    """The sizes of a conv, by which its tile is chosen; `rows` is N*T' of the output."""

    c_in: int
    c_out: int
    taps: int
    stride: int
    dilation: int
    rows: int


def choose(op: str, device: torch.device, dtype: torch.dtype, shape: Shape, frames: int, exact: bool = False) -> Tile:
    """Returns the tile of `op` ("forward", "dgrad", ...) in the table of this GPU if there is one, else the default."""
    row = tables.lookup(f"conv1d.{op}", device, dtype, **shape._asdict())
    return default(op, dtype, shape, frames, exact) if row is None else Tile(**row.tile)


@functools.lru_cache(maxsize=4096)
def default(op: str, dtype: torch.dtype, shape: Shape, frames: int, exact: bool = False) -> Tile:
    """Returns a reasonable tile for `frames` output frames per utterance, for shapes that were not measured.

    exact: fp32 operands are not rounded to TF32. Exact products take more registers.
    """
    wide = dtype.itemsize == 2
    if op == "wgrad":
        side = 128 if wide else 64
        n, k = _fit(shape.c_in, 16, side), _fit(shape.c_out, 16, side)
        warps = 8 if not wide and n * k >= 64 * 64 else _warps(n * k)  # with 4 warps fp32 spills on sm_100
        tile = Tile(64 if wide else 32, n, k, warps, 3)
        return tile._replace(splits=_shares(tile, shape, frames))
    reduced, out = (shape.c_out, shape.c_in) if op.startswith("dgrad") else (shape.c_in, shape.c_out)
    t = 128 if wide and frames > 64 else 64 if wide or frames > 32 else 32  # wgmma needs at least 64
    if op == "fused" and shape.stride > 1:
        t = min(t, 64)  # with 128 frames the network's first kernel spills registers
    if op == "fused" and exact and not wide:
        t = 32  # at 64 frames, programs that split a reduction spill: on sm_86 with 4 warps, on sm_100 with 8
    n, k = _fit(out, 16, 128 if wide else 64), _fit(reduced, 16, 64 if wide else 32)
    small = op == "fused" and not wide and t * n < 64 * 64  # 4 warps spill in the last conv, and in panes on sm_100
    warps = 8 if small else _warps(t * n)
    tile = Tile(t, n, k, warps, 3)
    return _split(tile, shape, dtype) if op == "fused" else tile


def narrower(tile: Tile, dtype: torch.dtype) -> list[Tile]:
    """Returns `tile` and narrower ones, of which `default` takes one for `fused` if `tile` makes too few programs."""
    found = [tile]
    while dtype.itemsize == 2 and found[-1].n > 32 and tile.t * found[-1].n > 64 * 64:  # 64 x 32 spills on sm_86
        found.append(found[-1]._replace(n=found[-1].n // 2))
    return found


def candidates(op: str, dtype: torch.dtype, shape: Shape, frames: int) -> list[Tile]:
    """Returns the tiles that tuning may time for `op`: the default, other sizes with 3 stages, then all with 4.

    fp32 has only the default size, with 3, 4 and 2 stages. In 16 bits, all tiles after the default have the `splits`
    that the estimate prefers.
    """
    first = default(op, dtype, shape, frames)
    if dtype.itemsize != 2:
        return [first, first._replace(num_stages=4), first._replace(num_stages=2)]
    if op == "wgrad":
        sizes = [(64, 128, 128, 8), (64, 128, 128, 4), (32, 128, 256, 8), (64, 64, 128, 4), (64, 256, 128, 8)]
        most_t, most_n, most_k = 64, shape.c_in, shape.c_out
    else:
        sizes = [
            (128, 128, 64, 8), (128, 256, 64, 8), (64, 128, 64, 4), (64, 256, 64, 8), (128, 64, 64, 4),
            (64, 64, 64, 4), (128, 128, 64, 4), (128, 128, 128, 8), (256, 128, 64, 8),
        ]  # fmt: skip
        most_k, most_n = (shape.c_out, shape.c_in) if op.startswith("dgrad") else (shape.c_in, shape.c_out)
        most_t = max(32, 2 * frames)
    fits = [
        Tile(t, n, k, warps, 3)
        for t, n, k, warps in sizes
        if t <= most_t and n <= max(16, most_n) and k <= max(16, most_k)
    ]
    deeper = [tile._replace(num_stages=4) for tile in (first, *fits)]
    return list(dict.fromkeys([first, *(_shared(op, dtype, tile, shape, frames) for tile in fits + deeper)]))


def shortlist(op: str, dtype: torch.dtype, shape: Shape, frames: int) -> list[Tile]:
    """Returns the candidates, the most promising first: the default, the default with more stages, then other sizes.

    Other sizes are in the order of their estimated time on an H100, first all with 3 stages, then all with 4. In fp32
    the default with fewer stages comes last.
    """
    first, *others = candidates(op, dtype, shape, frames)
    twins = [tile for tile in others if tile[:4] == first[:4]][:1]
    others = [tile for tile in others if tile not in twins]
    return [first, *twins, *sorted(others, key=lambda tile: (tile.num_stages, _seconds(op, dtype, tile, shape)))]


def _seconds(op: str, dtype: torch.dtype, tile: Tile, shape: Shape) -> float:
    """Estimates the seconds of `op`. Programs run in whole waves; in fused, partial sums are written and read once.

    A step takes as long as its reads from L2 or as its products, whichever is longer.
    """
    if op == "wgrad":
        taps = wgrad_taps(tile, shape.taps)
        programs = -(-shape.taps // taps) * -(-shape.c_in // tile.n) * -(-shape.c_out // tile.k) * tile.splits
        steps = -(-shape.rows // tile.t) / tile.splits
        read, products = (taps * tile.n + tile.k) * tile.t, taps * tile.n * tile.k * tile.t
    else:
        reduced, out = (shape.c_out, shape.c_in) if op.startswith("dgrad") else (shape.c_in, shape.c_out)
        programs = -(-shape.rows // tile.t) * -(-out // tile.n) * tile.splits
        steps = -(-shape.taps * -(-reduced // tile.k) // tile.splits)
        read, products = (tile.t + tile.n) * tile.k, tile.t * tile.n * tile.k
    step = max(read * dtype.itemsize / (L2_S / WAVE), 2 * products / (FLOP_S / WAVE))
    partials = 8 * programs * tile.t * tile.n if op == "fused" and tile.splits > 1 else 0
    return -(-programs // WAVE) * steps * step + partials / L2_S


def _shared(op: str, dtype: torch.dtype, tile: Tile, shape: Shape, frames: int) -> Tile:
    """Returns `tile` with the splits that take the least estimated time. Only fused and wgrad split a reduction."""
    if op == "fused":
        shared = (tile._replace(splits=s) for s in range(1, _splits(tile, shape) + 1))
        return min(shared, key=lambda tile: _seconds(op, dtype, tile, shape))
    return tile._replace(splits=_shares(tile, shape, frames)) if op == "wgrad" else tile


def wgrad_taps(tile: Tile, taps: int) -> int:
    """Returns how many taps a wgrad program takes: two, if their sums fit into 128 registers of a thread, else one."""
    return 2 if taps > 1 and 2 * tile.n * tile.k <= 128 * 32 * tile.num_warps else 1


def transpose_meta(taps: int) -> dict[str, int]:
    """Returns the block of a program that packs weights or adds up their gradients: all K taps of 4 x 32 channels."""
    return {"BLOCK_K": 1 << (taps - 1).bit_length(), "BLOCK_I": 4, "BLOCK_O": 32}


def _shares(tile: Tile, shape: Shape, frames: int) -> int:
    """Returns the number of shares: the groups into which wgrad splits the utterances.

    More shares leave less of the last wave idle, but write more partial results. A single share counts as writing none,
    although it does write one if the conv has one tap.
    """
    batch = max(1, shape.rows // frames)
    taps = wgrad_taps(tile, shape.taps)
    # the last of an odd number of taps counts as half a program of two taps
    programs = -(-shape.taps * -(-shape.c_in // tile.n) * -(-shape.c_out // tile.k) // taps)
    wave = 2 * WAVE // taps  # two programs of one tap, or one program of two taps, fill a multiprocessor
    utterance = 2 * frames * taps * tile.n * tile.k / (FLOP_S / wave)
    partials = 8 * shape.taps * shape.c_in * shape.c_out / BYTES_S  # fp32, written and read

    def seconds(shares: int) -> float:
        merged = shares * partials if shares > 1 else 0.0
        return -(-programs * shares // wave) * -(-batch // shares) * utterance + merged

    return min(range(1, min(batch, 64) + 1), key=seconds)


def _split(tile: Tile, shape: Shape, dtype: torch.dtype) -> Tile:
    """Returns `tile` or one of `narrower`, with the number of splits at which one SM moves the fewest bytes.

    A tile that gives a whole wave of programs is returned as it is. A program reads the frames and weights of its share
    of the steps; the last one also reads all partial sums.
    """

    def moved(tile: Tile) -> int:
        steps = -(-shape.taps * -(-shape.c_in // tile.k) // tile.splits)
        partials = 4 * tile.t * tile.n * (tile.splits + 1) if tile.splits > 1 else 0
        waves = -(-_tiles(tile, shape) * tile.splits // WAVE)
        return waves * (steps * (tile.t + tile.n) * tile.k * dtype.itemsize + partials)

    if _tiles(tile, shape) >= WAVE:
        return tile
    narrow = narrower(tile, dtype)
    return min((n._replace(splits=s) for n in narrow for s in range(1, _splits(n, shape) + 1)), key=moved)


def _splits(tile: Tile, shape: Shape) -> int:
    """Returns how many programs may share a tile: all fit one wave, and each has at least MIN_STEPS steps."""
    steps = shape.taps * -(-shape.c_in // tile.k)
    return max(1, min(WAVE // _tiles(tile, shape), steps // MIN_STEPS))


def _tiles(tile: Tile, shape: Shape) -> int:
    return -(-shape.rows // tile.t) * -(-shape.c_out // tile.n)


def _fit(c: int, low: int, high: int) -> int:
    return min(high, max(low, 1 << (c - 1).bit_length()))


def _warps(elements: int) -> int:
    return 8 if elements >= 128 * 128 else 4
