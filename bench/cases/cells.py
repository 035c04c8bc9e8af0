"""What `python -m bench tune` tunes: the cells of Jasper 10x5 at the batches of BATCHES.

A cell is an op at one shape, in one dtype, with one number of rows. A table has the measured times of each cell.
"""

import torch

from jasper_fast.bench.cases import counts, models
from jasper_fast.kernels import tables
from jasper_fast.kernels.tables import Cell
from jasper_fast.nn import cells

CONV_OPS = ("forward", "forward_stats", "dgrad", "dgrad_bn", "wgrad", "fused")
OPS = (*CONV_OPS, *tables.NORM_OPS)


# (utterances, feature frames of each, mode). 16.7 s are 1670 frames. A batch counts as measured if its number of rows
# (utterances x output frames) is up to `tables.NEAR` powers of two larger or smaller than that of a measured cell.
BATCHES = (
    (32, 1670, "training"), (1, 200, "inference"), (1, 1670, "inference"), (8, 1670, "training"),
    (1, 700, "inference"), (4, 1670, "inference"), (16, 1670, "inference"), (32, 1670, "evaluation"),
)  # fmt: skip
# Tiny cells for Triton's interpreter.
STAND_IN = [
    *((f"conv1d.{op}", (16, 24, 3, 1, 1)) for op in CONV_OPS),
    ("conv1d.fused", (24, 13, 1, 1, 1)),
    *((op, (24, 24, 1, 1, 1)) for op in tables.NORM_OPS),
]


def plan(device: torch.device, dtype: torch.dtype, ops: tuple[str, ...] = OPS) -> list[Cell]:
    """Returns the cells, the most valuable first: by the order of BATCHES, and in a batch those with the most work
    first. On a CPU these are the cells of STAND_IN."""
    wanted = {op if op in tables.NORM_OPS else f"conv1d.{op}" for op in ops}
    if device.type == "cpu":
        found = [Cell(op, tables.DTYPES[dtype], *shape, 5) for op, shape in STAND_IN]
    else:
        config = models.config("jasper10x5")
        found = [cell for n, t, mode in BATCHES for cell in cells.cells(config, n, t, dtype, mode)]
    return [cell for cell in dict.fromkeys(found) if cell.op in wanted]


def work(cell: Cell) -> tuple[float, float]:
    """Returns the operations and bytes of a cell's op on the batch on which it is timed."""
    (n, frames), size = cell.batch, 4 if cell.dtype == "float32" else 2
    if cell.op in tables.NORM_OPS:
        mode = cell.op.removeprefix("bn_relu_dropout.")
        shape = n, cell.c_in, frames
        return counts.bn_relu_dropout_flops(*shape, mode), counts.bn_relu_dropout_bytes(*shape, size, mode)
    conv = counts.Conv("", n, cell.c_in, cell.c_out, cell.taps, frames * cell.stride, frames)
    return conv.flops, conv.nbytes(size)
