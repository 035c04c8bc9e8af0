"""The rows of a table of measured configurations, and the rules that a table's file must satisfy (see tables.py)."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
ALGORITHMS = ("direct", "library")  # our own kernels, or whatever cuDNN or plain PyTorch chooses
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
HEADER = (
    *("gpu", "capability", "multiprocessors", "bandwidth"),
    *("driver", "torch", "triton", "commit", "command", "date"),
)
SHAPE = ("c_in", "c_out", "taps", "stride", "dilation")
MAX_ROWS_LOG2 = 40
NEAR = 1  # a cell counts as measured if its shape was measured at a rows_log2 that differs by at most this
# Bytes of shared memory that one program may use, by compute capability (from CUDA's programming guide). Architectures
# that are not listed get the largest.
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448, "sm_120": 101376}
_LARGEST_SHARED = max(SHARED_LIMIT.values())
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_SPLIT = ("conv1d.fused", "conv1d.wgrad")  # ops whose reduction several programs may share


class TableError(ValueError):
    """Raised for a faulty table. The message names the file, the fault, and the row if the fault is in a row."""


class Cell(NamedTuple):
    """The unit of tuning: an op in one dtype, at one shape, with at most 2**rows_log2 rows and more than half of that.

    All faces of a cell are tuned together.
    """

    op: str
    dtype: str
    c_in: int
    c_out: int
    taps: int
    stride: int
    dilation: int
    rows_log2: int

    @property
    def batch(self) -> tuple[int, int]:
        """The numbers of utterances and of output frames T' with which the cell is timed.

        Their product is about 0.75 * 2**rows_log2. The utterances have at least 800 frames, or there is a single
        shorter one if the product is below 800.
        """
        rows = max(3 << self.rows_log2 >> 2, (1 << self.rows_log2 >> 1) + 1)
        n = max(1, rows // 800)
        return n, rows // n


@dataclass(frozen=True)
class Row:
    """One measured configuration.

    tile: {"t", "n", "k", "num_warps", "num_stages", "splits"} of a Triton conv, None on other faces and ops. time_s:
    seconds of one call. registers (per thread), shared (bytes per program), spilled (bytes per thread): None if nothing
    was compiled.
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

    @property
    def key(self) -> tuple:
        """The fields that identify the row in its table."""
        return (*self.shape, self.rows_log2, self.face, self.algorithm)

    @property
    def shape(self) -> tuple:
        """The op, the dtype and the sizes of the conv, which must match exactly in a look-up."""
        return (self.op, self.dtype, self.c_in, self.c_out, self.taps, self.stride, self.dilation)

    @property
    def cell(self) -> Cell:
        """The cell that the row was measured for."""
        return Cell(*self.shape, self.rows_log2)

    def label(self) -> str:
        """Returns the configuration in words: the face with its tile, or with its algorithm if it has no tile."""
        if self.tile is None:
            return f"{self.face} {self.algorithm}"
        t = self.tile
        splits = f" splits {t['splits']}" if t["splits"] > 1 else ""
        return f"{self.face} {t['t']}x{t['n']}x{t['k']} warps {t['num_warps']} stages {t['num_stages']}{splits}"

    def plain(self) -> dict[str, Any]:
        """Returns the row as it is written to a file."""
        return {name: getattr(self, name) for name in _ROW}


@dataclass(frozen=True)
class Table:
    """A checked table: its header, which says where the numbers come from, and its rows."""

    header: Mapping[str, str]
    rows: tuple[Row, ...]


def shape_of_norm(channels: int) -> dict[str, int]:
    """Returns the shape under which a table lists an op of NORM_OPS with this number of channels."""
    return dict(zip(SHAPE, (channels, channels, 1, 1, 1), strict=True))


# ---- the rules for a file ----

# A function that tells whether a value is valid, and a description of valid values.
_Rule = tuple[Callable[[Any], bool], str]


def _one_of(allowed: Iterable[str]) -> _Rule:
    return lambda value: isinstance(value, str) and value in allowed, f"one of {', '.join(allowed)}"


def _whole(low: int, high: float, wanted: str = "a whole number from {} to {}") -> _Rule:
    return lambda value: type(value) is int and low <= value <= high, wanted.format(low, high)


def _power(low: int, high: int) -> _Rule:
    right, wanted = _whole(low, high, "a power of two from {} to {}")
    return lambda value: right(value) and value & (value - 1) == 0, wanted


def _matching(pattern: str, wanted: str) -> _Rule:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL) is not None, wanted


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
    "tile": (lambda value: True, "checked later, because it depends on op and face"),
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
    """Returns why `values` is not a dict with exactly the fields of `rules` and valid values, or None if it is."""
    if not isinstance(values, dict):
        return f"expected an object, got {values!r}"
    if wrong := sorted(values.keys() ^ rules.keys()):
        return f"unknown or missing fields: {', '.join(wrong)}"
    faults = (
        f"{name} must be {wanted}, got {values[name]!r}"
        for name, (right, wanted) in rules.items()
        if not right(values[name])
    )
    return next(faults, None)


def header_fault(values: object) -> str | None:
    """Returns why `values` is not the header of a table, or None if it is."""
    return _fault(values, _HEADER)


def row_fault(values: object, capability: str) -> str | None:
    """Returns why `values` is not a valid row for a GPU with this compute capability, or None if it is."""
    if fault := _fault(values, _ROW):
        return fault
    op, face, limit = values["op"], values["face"], SHARED_LIMIT.get(capability, _LARGEST_SHARED)
    if op in NORM_OPS and not shape_of_norm(values["c_in"]).items() <= values.items():
        return f"{op} must have its channels as c_in and c_out, and 1 for taps, stride and dilation"
    if values["spilled"]:
        return f"the kernel spills {values['spilled']} bytes, and such a configuration is never chosen"
    if (values["shared"] or 0) > limit:
        return f"the kernel takes {values['shared']} bytes of shared memory, but {capability} has {limit}"
    tiled = op.startswith("conv1d.") and face == "triton"
    if (values["tile"] is not None) != tiled:
        return f"{op} on {face} {'needs a' if tiled else 'has no'} tile"
    return tile_fault(op, values["dtype"], values["tile"], limit) if tiled else None


def tile_fault(op: str, dtype: str, tile: object, shared: int = _LARGEST_SHARED) -> str | None:
    """Returns why the Triton conv cannot run `tile` with `shared` bytes of shared memory per program, or None."""
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
        return f"tile: its stages take at least {needed} bytes of shared memory, but a program has {shared}"
    return None
