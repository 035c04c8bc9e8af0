"""The structs of csrc/cuda/conv1d.cuh, conv1d_wgrad.cuh and conv1d_launch.cuh as ctypes structures."""

from __future__ import annotations

import ctypes

from torch import Tensor

CHUNK = 64  # channels of a panel (see conv1d.cuh). A block of packed weights, called an image, is CHUNK x CHUNK
OUT = 128  # output channels of a tile
IMAGE = CHUNK * CHUNK
CELL16, ELEMENT, FLOAT = range(3)  # how activations are read: 16 bytes at a time, by 16-bit element, by fp32 element
PLAIN, STATS, NORM, LOG_SOFTMAX = range(4)  # what the epilogue computes

Pointer, Int, Long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


def pack_blocks(channels: int) -> int:
    """Returns the number of blocks of 64 channels in a pack of `channels` channels, rounded up to an even number."""
    return -(-channels // OUT) * 2


def address(x: Tensor | None) -> int | None:
    """Returns the address of the data of `x`, or None."""
    return None if x is None else x.data_ptr()


class Operand(ctypes.Structure):
    """Activations (N, T, C), and the packed weight that they are multiplied with (none in wgrad)."""

    _fields_ = [
        *((name, Pointer) for name in ("x", "pack")),
        *((name, Long) for name in ("item", "row", "channel")),
        *((name, Int) for name in ("channels", "blocks_in", "blocks_out", "source")),
    ]

    @classmethod
    def of(cls, x: Tensor, pack: Tensor | None = None, c_in: int = 0, c_out: int = 0) -> Operand:
        """Returns the operand for `x` (N, T, C), with any strides, and the pack of a weight (c_out, c_in, K)."""
        (n, t, channels), (item, row, channel) = x.shape, x.stride()
        if x.element_size() == 4:
            source = FLOAT
        else:
            taken = (row if t > 1 else 0, item if n > 1 else 0)
            cells = (channel == 1 or channels == 1) and channels % 8 == 0 and x.data_ptr() % 16 == 0
            source = CELL16 if cells and all(s % 8 == 0 for s in taken) else ELEMENT
        blocks = pack_blocks(c_in), pack_blocks(c_out)
        return cls(x.data_ptr(), address(pack), item, row, channel, channels, *blocks, source)


class Ahead(ctypes.Structure):
    """Packed weights that the next launch in the stream reads."""

    _fields_ = [("at", Pointer), ("bytes", Long)]


class Args(ctypes.Structure):
    """Arguments of a conv kernel."""

    _fields_ = [
        *((name, Operand) for name in ("main", "panes")),
        *((name, Pointer) for name in ("in_lengths", "out_lengths", "lengths_out", "out", "bias", "part_a", "part_b")),
        *((name, Pointer) for name in ("y", "z", "mean", "rstd", "shares", "arrived")),
        *((name, Long) for name in ("out_item", "out_row")),
        ("scale", ctypes.c_float),
        *((name, Int) for name in ("batch", "frames", "frames_out", "c_out", "taps", "stride", "padding", "dilation")),
        *((name, Int) for name in ("relu", "masked", "out_vector")),
        *((name, Int) for name in ("t_blocks", "o_blocks", "splits", "panels_kept", "stages")),
        ("ahead", Ahead * 2),
    ]


class WgradArgs(ctypes.Structure):
    """Arguments of a wgrad kernel."""

    _fields_ = [
        *((name, Operand) for name in ("x", "dy")),
        *((name, Pointer) for name in ("lengths", "parts")),
        *((name, Int) for name in ("batch", "frames", "frames_out", "taps", "stride", "padding", "dilation")),
        *((name, Int) for name in ("in_blocks", "out_blocks", "tap_groups", "shares", "segments", "share", "stages")),
    ]


class Launch(ctypes.Structure):
    """Where and how a kernel is launched."""

    _fields_ = [
        *((name, Int) for name in ("loop", "grid", "shared", "cooperative", "early")),
        ("stream", Pointer),
    ]
