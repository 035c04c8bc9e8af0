"""Tables of measured times, from which dispatch chooses the face and tile of an op.

A table is a JSON file {"header": {...}, "rows": [...]} for one GPU. A row says how fast one face of an op ran at a
shape, with its best tile if it has tiles. A row's key is (op, dtype, c_in, c_out, taps, stride, dilation, rows_log2,
face, algorithm). A call with N*T' rows of output belongs to the smallest rows_log2 with N*T' <= 2**rows_log2. An op
without a conv has its number of channels as c_in and c_out, and 1 for taps, stride and dilation.

Rows come from three sources: what was tuned on this machine (`lay_over`), the committed table of this GPU, and the
table of the most similar GPU (`likeness`). For each cell (op, dtype, shape and rows_log2) only the first source that
has rows counts, because times of two machines are not compared. A table is checked in full when it is read. If no
source has rows, look-ups return None and kernels use their default tiles.
"""

import functools
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from jasper_fast.kernels import files, likeness
from jasper_fast.kernels.table_rows import (
    ALGORITHMS,
    DTYPES,
    FACES,
    HEADER,
    MAX_ROWS_LOG2,
    NEAR,
    NORM_OPS,
    OPS,
    SHAPE,
    SHARED_LIMIT,
    Cell,
    Row,
    Table,
    TableError,
    header_fault,
    row_fault,
    shape_of_norm,
    tile_fault,
)

__all__ = [
    "ALGORITHMS", "DTYPES", "FACES", "HEADER", "NORM_OPS", "OPS", "SHAPE", "SHARED_LIMIT",
    "Cell", "Row", "Table", "TableError", "bucket", "covered", "fastest", "folder", "for_gpu", "forced", "forget",
    "lay_over", "load", "lookup", "parse", "shape_of_norm", "slug", "tile_fault", "times", "write",
]  # fmt: skip


_Index = dict[tuple, "_Nearest"]
T = TypeVar("T")


# ---- look-up ----


def lookup(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    c_in: int,
    c_out: int,
    taps: int,
    stride: int,
    dilation: int,
    rows: int,
    face: str = "triton",
) -> Row | None:
    """Returns the fastest configuration of `op` on `face` measured on this GPU or a similar one, or None if none was.

    c_in, c_out: the channels of the conv's weight, also for gradients. rows: N*T' of the conv's output. If its
    rows_log2 was not measured, the row of the nearest rows_log2 that was measured is returned. The files are read at
    the first look-up for a GPU, which raises TableError if one of them is faulty.
    """
    if _forced and (row := _forced.get(op)) is not None:
        return row
    if (index := _index_of(device)) is None:
        return None
    near = index.get((op, DTYPES.get(dtype), c_in, c_out, taps, stride, dilation))
    return None if near is None or face not in near.rows else near.rows[face][min(bucket(rows), MAX_ROWS_LOG2)]


def fastest(
    ops: Iterable[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    c_in: int,
    c_out: int,
    taps: int,
    stride: int,
    dilation: int,
    rows: int | None = None,
) -> str | None:
    """Returns the face on which all `ops` together take the least time, or None if none was measured for all.

    rows: N*T' of the output. None means the largest number that was measured.
    """
    total = times([(op, (c_in, c_out, taps, stride, dilation), 1) for op in ops], device, dtype, rows)
    return min(sorted(total), key=total.__getitem__) if total else None


def times(
    calls: Iterable[tuple[str, tuple[int, ...], int]], device: torch.device, dtype: torch.dtype, rows: int | None
) -> dict[str, float] | None:
    """Returns the total seconds of `calls` on each face on which all of them were measured.

    A call is (op, shape, count). Returns None if some call was not measured on any face. `rows` as for `fastest`.
    """
    if (index := _index_of(device)) is None:
        return None
    total: dict[str, float] | None = None
    for op, shape, count in calls:
        near = index.get((op, DTYPES.get(dtype), *shape))
        if near is None:
            return None
        found = near.times[MAX_ROWS_LOG2 if rows is None else min(bucket(rows), MAX_ROWS_LOG2)]
        before = dict.fromkeys(found, 0.0) if total is None else total
        total = {face: before[face] + count * found[face] for face in before.keys() & found.keys()}
    return total


def covered(device: torch.device, cell: Cell) -> bool:
    """Returns whether this GPU was measured at `cell` or at a similar number of rows."""
    near = (_index_of(device) or {}).get(cell[:-1])
    return near is not None and any(abs(cell.rows_log2 - b) <= NEAR for b in near.own)


def bucket(rows: int) -> int:
    """Returns the rows_log2 of `rows`: the exponent of the smallest power of two that is at least `rows`."""
    return max(0, (operator.index(rows) - 1).bit_length())  # rows is a tensor under torch.jit.trace


@contextmanager
def forced(op: str, tile: Mapping[str, int], face: str = "triton") -> Iterator[None]:
    """A context in which `lookup` of `op` returns a row with `tile`, whatever the device, the shape and the face.

    This changes the whole process: do not use it while other threads launch kernels.
    """
    global _forced
    before, row = _forced, Row(op, "", 0, 0, 0, 0, 0, 0, face, "direct", dict(tile), 0.0)
    _forced = before | {op: row}
    try:
        yield
    finally:
        _forced = before


_forced: dict[str, Row] = {}


class _Nearest:
    """Holds rows and times of one shape for every rows_log2: those of the nearest rows_log2 that was measured.

    own: each rows_log2 that was measured on this model of GPU. rows: by face, then by rows_log2, the row of the fastest
    algorithm. times: by rows_log2, then by face.
    """

    def __init__(self, rows: Sequence[tuple[Row, bool]]) -> None:
        self.own = {row.rows_log2 for row, own in rows if own}
        best: dict[str, dict[int, Row]] = {}
        for row, _ in sorted(rows, key=lambda of: of[0].time_s):
            best.setdefault(row.face, {}).setdefault(row.rows_log2, row)
        self.rows = {face: _spread(found) for face, found in best.items()}
        # Faces are compared only at the same rows_log2.
        self.times = _spread(
            {b: {f: of[b].time_s for f, of in best.items() if b in of} for b in {row.rows_log2 for row, _ in rows}}
        )


def _spread(measured: dict[int, T]) -> list[T]:
    """Returns for each rows_log2 the value of the nearest one in `measured`, the larger one if two are equally near."""
    return [measured[min(measured, key=lambda m: (abs(m - b), -m))] for b in range(MAX_ROWS_LOG2 + 1)]


def _index_of(device: torch.device) -> _Index | None:
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _index(_gpu_name(index), os.environ.get("JASPER_FAST_TABLES"), index)


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _index(gpu: str, where: str | None, device: int) -> _Index | None:
    by_shape: dict[tuple, list[tuple[Row, bool]]] = {}
    filled: set[Cell] = set()
    for rows, own in _layers(gpu, Path(where) if where else folder(), device):
        new = [row for row in rows if row.cell not in filled]
        filled |= {row.cell for row in new}
        for row in new:
            by_shape.setdefault(row.shape, []).append((row, own))
    return {shape: _Nearest(found) for shape, found in by_shape.items()} or None


def _layers(gpu: str, where: Path, device: int) -> Iterator[tuple[Sequence[Row], bool]]:
    """Yields the rows of each source in order of precedence, and whether they were measured on this model of GPU."""
    yield _over(device), True
    if (table := for_gpu(gpu, where)) is not None:
        yield table.rows, True
    mine = likeness.traits(device)
    others = [load(path) for path in sorted(where.glob("*.json")) if path.stem != slug(gpu)] if mine else []
    near = [(likeness.distance(mine, likeness.of_header(other.header)), k) for k, other in enumerate(others)]
    if near and min(near)[0] < math.inf:
        yield others[min(near)[1]].rows, False


def _over(device: int) -> Sequence[Row]:
    """The first source of rows, which `lay_over` replaces."""
    return ()


def lay_over(rows_of: Callable[[int], Sequence[Row]]) -> None:
    """Sets the first source of rows: `rows_of(index of a CUDA device)` takes precedence over the files."""
    global _over
    _over = rows_of
    _index.cache_clear()


def forget() -> None:
    """Makes the next look-up read the files again. Call it after writing a file."""
    _index.cache_clear()
    _gpu_name.cache_clear()


# ---- files ----


def folder() -> Path:
    """Returns the folder of the tables: `JASPER_FAST_TABLES` if it is set, else `tables` beside this module."""
    return Path(os.environ.get("JASPER_FAST_TABLES") or Path(__file__).with_name("tables"))


def slug(gpu: str) -> str:
    """Returns the name of a GPU's file, without its suffix."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def for_gpu(gpu: str, where: Path | None = None) -> Table | None:
    """Returns the table of the GPU named `gpu`, or None if there is none. Raises TableError if it is faulty."""
    path = (where or folder()) / f"{slug(gpu)}.json"
    if not path.is_file():
        return None
    table = load(path)
    if table.header["gpu"] != gpu:
        raise TableError(f"{path}: header: gpu is {table.header['gpu']!r}, but the file is named after {gpu!r}")
    return table


def load(path: Path) -> Table:
    """Returns the table in `path`. Raises TableError if it is faulty."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"{path}: not JSON: {error}") from error
    return parse(data, str(path))


def parse(data: object, where: str) -> Table:
    """Returns a table made from parsed JSON. Raises TableError, whose message begins with `where`."""
    if not isinstance(data, dict) or set(data) != {"header", "rows"} or not isinstance(data["rows"], list):
        raise TableError(f"{where}: a table is an object with a header and a list of rows")
    if fault := header_fault(data["header"]):
        raise TableError(f"{where}: header: {fault}")
    rows: dict[tuple, Row] = {}
    for number, values in enumerate(data["rows"], 1):
        if fault := row_fault(values, data["header"]["capability"]):
            raise TableError(f"{where}: row {number}: {fault}")
        row = Row(**values)
        if row.key in rows:
            raise TableError(f"{where}: row {number}: the same key as row {list(rows).index(row.key) + 1}")
        rows[row.key] = row
    return Table(data["header"], tuple(rows.values()))


def write(path: Path, header: Mapping[str, str], rows: Iterable[Row]) -> None:
    """Writes a table atomically, one line per row. Raises TableError if it is faulty, and then writes nothing."""
    data = {"header": dict(header), "rows": [row.plain() for row in sorted(rows, key=lambda row: row.key)]}
    parse(data, str(path))
    lines = ",\n".join(f"  {json.dumps(row)}" for row in data["rows"])
    text = f'{{\n "header": {json.dumps(data["header"], indent=1)},\n "rows": [\n{lines}\n ]\n}}\n'
    files.write(path, text)
