"""The table of addresses and sizes that NovoGrad's Triton and CUDA kernels read, and the runs that programs own.

A run is a range of elements of one tensor, and each program owns one run. The table and the runs are sent to the GPU
only when a row of the table, for instance an address, has changed. In the second launch of a step, each program reads
all partial sums. Therefore runs are long, so that there are only some thousands of them.
"""

import torch
from torch import Tensor

from jasper_fast.kernels import capture
from jasper_fast.kernels.novograd.operands import Tensors, Watched

BLOCK = 1024  # elements that a program processes in one iteration
# About this many programs. For Jasper 10x5, partial sums are then 1 % of what a program reads.
PROGRAMS = 4096
SHORTEST = 8192  # minimum elements of a run, so that a program has enough work; a tensor's last run may be shorter
COLUMNS = ("grad", "moment", "param", "mean", "square", "numel", "group", "kind", "first", "end")
UPDATE, AVERAGE, COPY = 0, 1, 2  # kinds of rows


def keep(
    tensors: Tensors, watched: Watched, device: torch.device, held: dict
) -> tuple[Tensor, Tensor, int, int, int, bool]:
    """Returns the table, the runs, the maximum number of elements in a run, the number of runs that update parameters,
    the number of all runs, and whether all tensors except the second moments are aligned to 16 bytes.

    The table, int64 (tensors, COLUMNS), and the runs, int64 (programs, 2), are on the device. Addresses in the table
    are distances from the first parameter, in fp32 elements. A row of the runs has the index of a tensor and the first
    element of the run. Runs that update parameters come first. The results are kept in `held` and made again only if a
    row of the table has changed.
    """
    rows = rows_of(tensors, watched)
    if held.get("rows") != rows:
        held.update(rows=rows, made=_made(rows, device))
    return held["made"]


def rows_of(tensors: Tensors, watched: Watched) -> list[tuple[int, ...]]:
    """Returns the rows of the table without columns "first" and "end", with addresses in bytes."""
    grads, params, moments, squares = (map(Tensor.data_ptr, of) for of in tensors[:4])
    averages = map(Tensor.data_ptr, tensors.averages) if tensors.averages else [0] * len(tensors.params)
    columns = grads, moments, params, averages, squares, map(Tensor.numel, tensors.params), tensors.groups
    rows = [(*row, UPDATE) for row in zip(*columns, strict=True)]
    for live, average in zip(*watched, strict=True):
        kind, words = (AVERAGE, 1) if average.is_floating_point() else (COPY, average.element_size() // 4)
        rows.append((0, 0, live.data_ptr(), average.data_ptr(), 0, live.numel() * words, 0, kind))
    return rows


def _made(rows: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor, int, int, int, bool]:
    size = max(SHORTEST, -(-sum(row[5] for row in rows) // (PROGRAMS * BLOCK)) * BLOCK)
    table, runs, partials, anchor = [], [], 0, rows[0][2]
    for i, row in enumerate(rows):
        first = len(runs)
        runs += [(i, start) for start in range(0, max(1, row[5]), size)]  # an empty tensor has a run too, to update v
        table.append((*((address - anchor) // 4 for address in row[:5]), *row[5:], first, len(runs)))
        partials = len(runs) if row[7] == UPDATE else partials
    aligned = all(address % 16 == 0 for row in rows for address in row[:4])
    return *(capture.sent(of, torch.int64, device) for of in (table, runs)), size, partials, len(runs), aligned
