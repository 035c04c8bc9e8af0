"""Measured choices of face and tile: one JSON file per GPU in tables/, written by `python -m bench tune`.

A file is {"header": {...}, "rows": [...]}. A row says how fast one face of an op ran at a shape with its best tile. Its
key is (op, dtype, c_in, c_out, taps, stride, dilation, rows_log2, face, algorithm); 2**rows_log2 is the power of two at
or above the N*T' rows of the output. An op without a conv has its channels as c_in and c_out, and 1 for taps, stride
and dilation. Dispatch takes the fastest row of an op at a shape. A file is loaded and checked as a whole on the first
look-up for its GPU. On a GPU without a file the kernels use their defaults.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

NORM_OPS = ("bn_relu_dropout.forward", "bn_relu_dropout.backward")
OPS = (
    "conv1d.forward",
    "conv1d.forward_stats",
    "conv1d.dgrad",
    "conv1d.dgrad_bn",
    "conv1d.wgrad",
    "conv1d.fused",
    *NORM_OPS,
)
FACES = ("triton", "cuda", "aten", "reference")
ALGORITHMS = ("direct", "library")  # our own kernels; the library's own choice
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
HEADER = ("gpu", "capability", "driver", "torch", "triton", "commit", "command", "date")
SHAPE = ("c_in", "c_out", "taps", "stride", "dilation")
MAX_ROWS_LOG2 = 40
# Bytes of shared memory that one program may use, by compute capability (CUDA's programming guide); newer GPUs get the
# largest.
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448, "sm_120": 101376}
_LARGEST_SHARED = max(SHARED_LIMIT.values())
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_SPLIT = ("conv1d.fused", "conv1d.wgrad")  # ops in which several programs may share a reduction


class TableError(ValueError):
    """A faulty table; the message names the file, the row and the fault."""


@dataclass(frozen=True)
class Row:
    """One measured configuration. `exact` is False if a look-up found no row for its row count and took the nearest.

    tile: {"t", "n", "k", "num_warps", "num_stages", "splits"} of a Triton conv, else None; time_s: seconds of one call;
    registers per thread, shared bytes per program and spilled bytes per thread, None if nothing was compiled.
    """

    op: str
    dtype: str
    c_in: int
    c_out: int
    taps: int
    stride: int
    dilation: int
    rows_log2: int
    face: str
    algorithm: str
    tile: Mapping[str, int] | None
    time_s: float
    registers: int | None = None
    shared: int | None = None
    spilled: int | None = None
    exact: bool = True

    @property
    def key(self) -> tuple:
        """The key: no two rows of a table share it."""
        return (*self.shape, self.rows_log2, self.face, self.algorithm)

    @property
    def shape(self) -> tuple:
        """The part of the key that a look-up must match exactly."""
        return (self.op, self.dtype, self.c_in, self.c_out, self.taps, self.stride, self.dilation)

    def label(self) -> str:
        """The configuration in words: face, algorithm, tile."""
        if self.tile is None:
            return f"{self.face} {self.algorithm}"
        t = self.tile
        splits = f" splits {t['splits']}" if t["splits"] > 1 else ""
        return f"{self.face} {t['t']}x{t['n']}x{t['k']} warps {t['num_warps']} stages {t['num_stages']}{splits}"

    def plain(self) -> dict[str, Any]:
        """The row as a file holds it."""
        return {name: getattr(self, name) for name in _ROW}


@dataclass(frozen=True)
class Table:
    """A checked file: where its numbers come from, and its rows."""

    header: Mapping[str, str]
    rows: tuple[Row, ...]


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
    """The fastest measured configuration of `op` on one `face`; None if this GPU or shape was not measured.

    c_in, c_out: the channels of the conv's weight, for gradients too; rows: N*T' of the conv's output. If its power of
    two was not measured, the nearest measured one of the same shape is taken (`exact` is then False). Raises TableError
    if the file of this GPU is faulty when it is first loaded.
    """
    if _forced and (row := _forced.get(op)) is not None:
        return row
    if (index := _index_of(device)) is None:
        return None
    near = index.get((op, DTYPES.get(dtype), c_in, c_out, taps, stride, dilation))
    return None if near is None else near.nearest(face, rows)


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
    """The face on which all `ops` together take the least time at a shape; None unless all were measured.

    rows: N*T' of the output; None means the most rows that were measured.
    """
    if (index := _index_of(device)) is None:
        return None
    total: dict[str, float] | None = None
    for op in ops:
        near = index.get((op, DTYPES.get(dtype), c_in, c_out, taps, stride, dilation))
        if near is None:
            return None
        times = near.times(MAX_ROWS_LOG2 if rows is None else bucket(rows))
        total = times if total is None else {f: total[f] + times[f] for f in total.keys() & times.keys()}
    return min(sorted(total), key=total.__getitem__) if total else None


def fastest_overall(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The face with the least time over all measured shapes of `op`, or None: for callers that use one face for a whole
    network."""
    if (index := _index_of(device)) is None:
        return None
    cells = [
        times
        for shape, near in index.items()
        if shape[:2] == (op, DTYPES.get(dtype))
        for times in (near.times(b) for b in near.measured)
    ]
    faces = set.intersection(*map(set, cells)) if cells else set()
    return min(sorted(faces), key=lambda face: sum(times[face] for times in cells)) if faces else None


def shape_of_norm(channels: int) -> dict[str, int]:
    """The shape under which a table lists an op of NORM_OPS."""
    return dict(zip(SHAPE, (channels, channels, 1, 1, 1), strict=True))


def bucket(rows: int) -> int:
    """rows_log2: the exponent of the power of two at or above `rows`."""
    return max(0, (operator.index(rows) - 1).bit_length())  # a tensor under torch.jit.trace


@contextmanager
def forced(op: str, tile: Mapping[str, int], face: str = "triton") -> Iterator[None]:
    """Makes every look-up of `op` return `tile`, on any device, so that tuning and the self-check can run that tile.

    This changes the whole process: do not use it while other threads launch kernels.
    """
    before = _forced.get(op)
    _forced[op] = Row(op, "", 0, 0, 0, 0, 0, 0, face, "direct", dict(tile), 0.0)
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


_forced: dict[str, Row] = {}


class _Nearest:
    """The rows of one shape, and for each power of two the rows of the nearest measured one."""

    def __init__(self) -> None:
        self._by_bucket: dict[int, dict[str, Row]] = {}

    def add(self, row: Row) -> None:
        faces = self._by_bucket.setdefault(row.rows_log2, {})
        if row.face not in faces or row.time_s < faces[row.face].time_s:
            faces[row.face] = row

    def finish(self) -> None:
        self.measured = sorted(self._by_bucket)
        self._rows = {face: self._fill(face) for faces in self._by_bucket.values() for face in faces}
        # faces are compared within one bucket, never across two
        self._times = [self._by_bucket[_near(self.measured, b)] for b in range(MAX_ROWS_LOG2 + 1)]

    def _fill(self, face: str) -> list[Row]:
        own = {b: faces[face] for b, faces in self._by_bucket.items() if face in faces}
        return [
            own[b] if b in own else replace(own[_near(sorted(own), b)], exact=False) for b in range(MAX_ROWS_LOG2 + 1)
        ]

    def nearest(self, face: str, rows: int) -> Row | None:
        found = self._rows.get(face)
        return None if found is None else found[min(bucket(rows), MAX_ROWS_LOG2)]

    def times(self, rows_log2: int) -> dict[str, float]:
        return {face: row.time_s for face, row in self._times[min(rows_log2, MAX_ROWS_LOG2)].items()}


def _near(measured: list[int], wanted: int) -> int:
    """The measured bucket nearest to `wanted`; of two equally near ones the larger."""
    return min(measured, key=lambda b: (abs(b - wanted), -b))


_Index = dict[tuple, _Nearest]


def _index_of(device: torch.device) -> _Index | None:
    if device.type != "cuda":
        return None
    gpu = _gpu_name(torch.cuda.current_device() if device.index is None else device.index)
    return _index(gpu, os.environ.get("JASPER_FAST_TABLES"))


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _index(gpu: str, where: str | None) -> _Index | None:
    table = for_gpu(gpu, Path(where) if where else None)
    if table is None:
        return None
    index: _Index = {}
    for row in table.rows:
        index.setdefault(row.shape, _Nearest()).add(row)
    for near in index.values():
        near.finish()
    return index


def forget() -> None:
    """Makes the next look-up read the files again; called after a file was written."""
    _index.cache_clear()
    _gpu_name.cache_clear()


# ---- files ----


def folder() -> Path:
    """The folder of the tables: `JASPER_FAST_TABLES` if it is set, else the folder beside this module."""
    own = os.environ.get("JASPER_FAST_TABLES")
    return Path(own) if own else Path(__file__).with_name("tables")


def slug(gpu: str) -> str:
    """The name of a GPU's file, without its suffix."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def for_gpu(gpu: str, where: Path | None = None) -> Table | None:
    """The checked table of the GPU called `gpu`, or None if there is none; raises TableError for a faulty one."""
    path = (where or folder()) / f"{slug(gpu)}.json"
    if not path.is_file():
        return None
    table = load(path)
    if table.header["gpu"] != gpu:
        raise TableError(f"{path}: header: gpu is {table.header['gpu']!r}, but the file is named after {gpu!r}")
    return table


def load(path: Path) -> Table:
    """The table in `path`; raises TableError that names the file, the row and the fault."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"{path}: no JSON: {error}") from error
    return parse(data, str(path))


def parse(data: object, where: str) -> Table:
    """A table from plain values; raises a TableError whose message begins with `where`."""
    if not isinstance(data, dict) or set(data) != {"header", "rows"} or not isinstance(data["rows"], list):
        raise TableError(f"{where}: a table is an object with a header and a list of rows")
    if fault := _fault(data["header"], _HEADER):
        raise TableError(f"{where}: header: {fault}")
    rows: dict[tuple, Row] = {}
    for number, values in enumerate(data["rows"], 1):
        if fault := _row_fault(values, data["header"]["capability"]):
            raise TableError(f"{where}: row {number}: {fault}")
        row = Row(**values)
        if row.key in rows:
            raise TableError(f"{where}: row {number}: the same key as row {list(rows).index(row.key) + 1}")
        rows[row.key] = row
    return Table(data["header"], tuple(rows.values()))


def write(path: Path, header: Mapping[str, str], rows: Iterable[Row]) -> None:
    """Writes a table atomically, one line per row; raises TableError instead of writing a faulty one."""
    data = {"header": dict(header), "rows": [row.plain() for row in sorted(rows, key=lambda row: row.key)]}
    parse(data, str(path))
    lines = ",\n".join(f"  {json.dumps(row)}" for row in data["rows"])
    text = f'{{\n "header": {json.dumps(data["header"], indent=1)},\n "rows": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# ---- what a file must hold ----

_Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and in words what it must be


def _one_of(allowed: Iterable[str]) -> _Rule:
    return lambda value: isinstance(value, str) and value in allowed, f"one of {', '.join(allowed)}"


def _whole(low: int, high: float, told: str = "a whole number from {} to {}") -> _Rule:
    return lambda value: type(value) is int and low <= value <= high, told.format(low, high)


def _power(low: int, high: int) -> _Rule:
    right, told = _whole(low, high, "a power of two from {} to {}")
    return lambda value: right(value) and value & (value - 1) == 0, told


def _matching(pattern: str, told: str) -> _Rule:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL) is not None, told


def _or_null(rule: _Rule) -> _Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]} or null"


_HEADER: dict[str, _Rule] = {
    **dict.fromkeys(HEADER, _matching(".+", "a text that is not empty")),
    "capability": _matching(r"sm_\d{2,3}", "a text like sm_90"),
}
_ROW: dict[str, _Rule] = {
    "op": _one_of(OPS),
    "dtype": _one_of(_ITEMSIZE),
    **dict.fromkeys(SHAPE, _whole(1, math.inf, "a positive whole number")),
    "rows_log2": _whole(0, MAX_ROWS_LOG2),
    "face": _one_of(FACES),
    "algorithm": _one_of(ALGORITHMS),
    "tile": (lambda value: True, "checked with its op and face"),
    "time_s": (lambda value: isinstance(value, float) and 0 < value < math.inf, "a positive number of seconds"),
    **dict.fromkeys(("registers", "shared", "spilled"), _or_null(_whole(0, math.inf, "a whole number"))),
}
_TILE: dict[str, _Rule] = {
    **dict.fromkeys(("t", "n", "k"), _power(16, 256)),
    "num_warps": _power(1, 16),
    "num_stages": _whole(1, 8),
    "splits": _whole(1, 1024),
}


def _fault(values: object, rules: Mapping[str, _Rule]) -> str | None:
    """Why `values` is not an object with exactly these fields, or None."""
    if not isinstance(values, dict):
        return f"an object is wanted, got {values!r}"
    if wrong := sorted(values.keys() ^ rules.keys()):
        return f"unknown or missing fields: {', '.join(wrong)}"
    faults = (
        f"{name} must be {wanted}, got {values[name]!r}"
        for name, (right, wanted) in rules.items()
        if not right(values[name])
    )
    return next(faults, None)


def _row_fault(values: object, capability: str) -> str | None:
    """Why `values` is not a row for a GPU with this compute capability, or None."""
    if fault := _fault(values, _ROW):
        return fault
    op, face, limit = values["op"], values["face"], SHARED_LIMIT.get(capability, _LARGEST_SHARED)
    if op in NORM_OPS and not shape_of_norm(values["c_in"]).items() <= values.items():
        return f"{op} has its channels as c_in and c_out, and taps, stride and dilation 1"
    if values["spilled"]:
        return f"the kernel spills {values['spilled']} bytes: such a configuration is never chosen"
    if (values["shared"] or 0) > limit:
        return f"the kernel takes {values['shared']} bytes of shared memory, {capability} has {limit}"
    tiled = op.startswith("conv1d.") and face == "triton"
    if (values["tile"] is not None) != tiled:
        return f"{op} on {face} {'needs a' if tiled else 'has no'} tile"
    return tile_fault(op, values["dtype"], values["tile"], limit) if tiled else None


def tile_fault(op: str, dtype: str, tile: object, shared: int = _LARGEST_SHARED) -> str | None:
    """Why the Triton conv cannot run `tile` with `shared` bytes of shared memory per program, or None."""
    if fault := _fault(tile, _TILE):
        return f"tile: {fault}"
    if tile["splits"] > 1 and op not in _SPLIT:
        return f"tile: {op} does not split its reduction, got splits {tile['splits']}"
    t, n, k = tile["t"], tile["n"], tile["k"]
    staged, summed = (t * n + t * k, n * k) if op == "conv1d.wgrad" else (t * k + k * n, t * n)
    threads = 32 * tile["num_warps"]
    if summed > 256 * threads:
        return f"tile: {summed} fp32 sums do not fit the registers of {threads} threads"
    needed = staged * _ITEMSIZE[dtype] * max(1, tile["num_stages"] - 1)
    if needed > shared:
        return f"tile: its stages take {needed} bytes of shared memory at least, a program has {shared}"
    return None
