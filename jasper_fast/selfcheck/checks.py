"""Lists the checks that a device needs: those of every kernel and configuration that dispatch can choose there."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from jasper_fast.dispatch import backends, tuned
from jasper_fast.dispatch.verdict import FACES, OPS
from jasper_fast.kernels import tables
from jasper_fast.kernels.conv1d import cuda_launch
from jasper_fast.kernels.operands import Geometry

CONV = ("forward", "forward_stats", "dgrad", "dgrad_bn", "wgrad")
DEPTHWISE = ("forward", "dgrad", "wgrad")
DTYPES = {name: dtype for dtype, name in tables.DTYPES.items()}
QUICK_TILES = 3  # how many of a table's tiles a quick plan checks for each function
TABLE_ROWS = 2048  # a table's tiles are checked on inputs of at most this many rows


class Conv(NamedTuple):
    """A conv's inputs: batch, frames, channels, taps, stride, dilation."""

    n: int
    t: int
    c_in: int
    c_out: int
    k: int
    stride: int = 1
    dilation: int = 1

    def __str__(self) -> str:
        more = (f" s {self.stride}" if self.stride > 1 else "") + (f" d {self.dilation}" if self.dilation > 1 else "")
        return f"({self.n}, {self.c_in}->{self.c_out}, {self.t}) K {self.k}{more}"

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, (self.k // 2) * self.dilation, self.dilation)

    @property
    def t_out(self) -> int:
        return self.geometry.frames(self.t, self.k)


class Norm(NamedTuple):
    """Sizes of the input of bn_relu_dropout: batch, channels, frames."""

    n: int
    c: int
    t: int

    def __str__(self) -> str:
        return f"({self.n}, {self.c}, {self.t})"


class Speech(NamedTuple):
    """Sizes of the inputs of the CTC loss: batch, frames, symbols, labels of the longest target."""

    n: int
    t: int
    v: int
    u: int

    def __str__(self) -> str:
        return f"({self.n}, {self.t}, {self.v}) U {self.u}"


# In this order: an odd number of frames; one frame; fewer frames than taps; stride 2; dilation 2, with a number of
# channels that is a multiple of no tile.
SMALL_CONV = (Conv(2, 37, 64, 48, 11), Conv(3, 1, 32, 32, 1), Conv(3, 5, 32, 29, 25), Conv(2, 41, 64, 32, 11, 2),
              Conv(2, 23, 35, 48, 3, 1, 2))  # fmt: skip
# the convs of Jasper 10x5: first block, main blocks, dilated conv, last block, decoder; then one short utterance
REAL_CONV = (
    Conv(4, 420, 64, 256, 11, 2), Conv(4, 330, 256, 256, 11), Conv(4, 330, 256, 384, 13), Conv(4, 330, 384, 384, 13),
    Conv(4, 330, 512, 512, 17), Conv(4, 330, 640, 640, 21), Conv(4, 330, 768, 768, 25),
    Conv(4, 330, 768, 896, 29, 1, 2), Conv(4, 330, 896, 1024, 1), Conv(4, 330, 1024, 29, 1), Conv(1, 104, 768, 768, 25),
)  # fmt: skip
QUICK_CONV = (Conv(2, 37, 64, 48, 11), Conv(2, 200, 256, 256, 11))
# This conv has more programs than any GPU runs at once: 448 with tiles of 128 frames by 128 channels, while an H100 has
# 132 SMs. Races and wrong reuse of shared memory appear only when programs follow each other on an SM. A call takes 39
# GFLOP. A check makes two calls in fp64, two in plain PyTorch and four of ours. Together they take tens of
# milliseconds on an H100, and a second on GPUs with slow fp64.
WAVE_CONV = Conv(32, 840, 256, 256, 11)
WAVE = "wave"  # the variant for WAVE_CONV
EXACT = "exact"  # a variant with exact fp32 products; by default a GPU runs other kernels, which use TF32
SMALL_NORM = (Norm(2, 64, 37), Norm(3, 29, 1), Norm(3, 48, 7))
REAL_NORM = (Norm(4, 256, 420), Norm(4, 768, 420), Norm(4, 1024, 331))
QUICK_NORM = (Norm(2, 64, 37), Norm(2, 256, 200))
NORM_VARIANTS = ("batch", "evaluation", "residual", "no dropout", "no lengths", "halo")
# depthwise convs like those of QuartzNet: c_in and c_out are both the number of channels
SMALL_DEPTHWISE = (Conv(2, 41, 24, 24, 9, 2), Conv(4, 21, 40, 40, 33), Conv(2, 37, 29, 29, 13, 1, 2))
REAL_DEPTHWISE = (Conv(4, 840, 256, 256, 33, 2), Conv(4, 420, 512, 512, 75), Conv(32, 420, 512, 512, 87, 1, 2))
QUICK_DEPTHWISE = (Conv(2, 37, 64, 64, 33), Conv(2, 200, 256, 256, 63))
FUSED_VARIANTS = ("plain", "panes", "panes splits", "features", "log-softmax", "splits")
STEP_VARIANTS = ("plain", "all", "not finite")
SMALL_CTC, REAL_CTC = (Speech(5, 23, 7, 6), Speech(4, 9, 40, 3)), (Speech(8, 420, 29, 150), Speech(4, 840, 129, 300))
# The variant without the promise `clean`, as in an engine's first conv and in direct calls of a face. The padding of x
# is NaN and must not be read.
UNCLEAN = "unclean"
CLEAN_FUNCTIONS = ("forward", "forward_stats", "wgrad", "fused")  # functions of Triton's conv with the argument `clean`
# Channels of a pane, the second input of a fused conv. 40 channels are no multiple of a tile's step (BLOCK_K), so the
# kernel loads without tensor descriptors.
SMALL_PANES, PANES = 40, 256
SMALL_GRAM, REAL_GRAM = (Norm(2, 24, 37), Norm(3, 40, 7)), (Norm(4, 256, 420), Norm(8, 768, 840))
QUICK_GRAM = (Norm(2, 64, 37), Norm(4, 256, 420))


@dataclass(frozen=True)
class Check:
    """One function of one face, with one configuration, on one shape."""

    op: str
    face: str
    function: str
    configuration: str
    shape: Conv | Norm | Speech
    dtype: str
    variant: str = ""
    tile: dict[str, int] | None = None

    @property
    def id(self) -> str:
        """A name that is unique in a plan and the same in every process."""
        return " | ".join((self.op, self.face, self.function, self.configuration, str(self.shape), self.dtype,
                           self.variant))  # fmt: skip

    def plain(self) -> dict[str, str]:
        """Returns the fields that a report prints, as strings."""
        return {name: str(value) for name, value in vars(self).items() if name != "tile"} | {"id": self.id}


def plan(
    device: torch.device,
    *,
    quick: bool = False,
    ops: tuple[str, ...] = OPS,
    faces: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
) -> list[Check]:
    """Returns the checks of `ops` for `device`, on all faces that run there or only on `faces`.

    quick: return a small part of the checks. dtypes: names such as "bfloat16". The default is all dtypes of a face, or
    one of them for a quick plan. Raises ValueError for an unknown op, face or dtype.
    """
    for name, asked, known in (("op", ops, OPS), ("face", faces, FACES), ("dtype", dtypes, tuple(DTYPES))):
        if unknown := [value for value in asked if value not in known]:
            raise ValueError(f"{name} {unknown[0]!r} is not one of {', '.join(known)}")
    found: list[Check] = []
    for face in FACES:
        if (faces and face not in faces) or (face != "aten" and backends.why_missing(face, device) is not None):
            continue
        large = device.type == "cuda" or face == "cpu"  # Triton's interpreter takes minutes for a model's real shape
        for dtype in _dtypes(face, device, quick, dtypes):
            for op in _PLANS:
                if op in ops and _has(face, op, dtype, device):
                    found += _PLANS[op](op, face, dtype, quick, large, device)
    return found


def _has(face: str, op: str, dtype: str, device: torch.device) -> bool:
    """Returns whether `face` has kernels of `op` in `dtype` for `device`."""
    if face == "aten":
        return op == "panes"
    if op in ("novograd", "ctc"):
        return dtype == "float32" and (op == "novograd" or face == "triton")
    if op == "panes":
        return face == "cpu" and dtype == "float32"
    if face != "cuda" or op == "bn_relu_dropout":
        return True
    return op != "depthwise" and cuda_launch.takes(device, DTYPES[dtype])


def _dtypes(face: str, device: torch.device, quick: bool, wanted: tuple[str, ...]) -> tuple[str, ...]:
    if wanted:
        return tuple(dict.fromkeys(wanted))
    if device.type == "cpu" and (face == "aten" or (face == "cpu" and quick)):
        return ("float32",)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return ("float16",) if quick else ("float16", "float32")
    return ("bfloat16",) if quick else ("bfloat16", "float16", "float32")


# Each function in _PLANS (below) yields the checks of an op on a face in a dtype.


def _panes(op: str, face: str, dtype: str, quick: bool, large: bool, device: torch.device) -> Iterator[Check]:
    """On the CPU face the plain form in C++ is checked, else the Gram form, whose matrix products are ATen's."""
    shapes = QUICK_GRAM if quick else SMALL_GRAM + REAL_GRAM[: 1 if face == "cpu" else None]
    for shape in shapes if large else SMALL_GRAM:
        yield Check(op, face, "plain" if face == "cpu" else "panes", "default", shape, dtype)


def _norms(op: str, face: str, dtype: str, quick: bool, large: bool, device: torch.device) -> Iterator[Check]:
    # On a CPU plain PyTorch takes minutes for the real shapes in 16 bits.
    real = QUICK_NORM[1:] if quick or (face == "cpu" and dtype != "float32") else REAL_NORM
    for shape in (QUICK_NORM[:1] if quick else SMALL_NORM) + (real if large else ()):
        yield Check(op, face, "stats", "default", shape, dtype)
        for variant, function in product(("batch", "residual") if quick else NORM_VARIANTS, ("forward", "backward")):
            yield Check(op, face, function, "default", shape, dtype, variant)


def _depthwise(op: str, face: str, dtype: str, quick: bool, large: bool, device: torch.device) -> Iterator[Check]:
    shapes = QUICK_DEPTHWISE if quick else SMALL_DEPTHWISE + (REAL_DEPTHWISE if face != "cpu" else QUICK_DEPTHWISE[1:])
    for shape, function in product(shapes if large else SMALL_DEPTHWISE[: 1 if quick else None], DEPTHWISE):
        yield Check(op, face, function, "default", shape, dtype)


def _steps(op: str, face: str, dtype: str, quick: bool, large: bool, device: torch.device) -> Iterator[Check]:
    """A step of NovoGrad is checked on the parameters of a sub-block, so the shapes are those of convs."""
    shapes = (QUICK_CONV if quick else (*SMALL_CONV[:3], REAL_CONV[-1])) if large else SMALL_CONV[:2]
    for shape, variant in product(shapes, STEP_VARIANTS):
        yield Check(op, face, "step", "default", shape, dtype, variant)


def _losses(op: str, face: str, dtype: str, quick: bool, large: bool, device: torch.device) -> Iterator[Check]:
    for shape in SMALL_CTC + (REAL_CTC[: 1 if quick else None] if large else ()):
        yield Check(op, face, "loss", "default", shape, dtype)


def _convs(op: str, face: str, dtype: str, quick: bool, large: bool, device: torch.device) -> Iterator[Check]:
    impl = backends.face("conv1d", face)
    for function in ("fused",) if op == "conv1d.fused" else [name for name in CONV if hasattr(impl, name)]:
        for shape in _conv_shapes(quick, large, face):
            for variant in _variants(function, shape, unclean=face == "triton" and not quick, fast=face == "cpu"):
                yield Check(op, face, function, "default", shape, dtype, variant)
        if face != "cpu" and large:
            yield Check(op, face, function, "default", WAVE_CONV, dtype, WAVE)
        if face == "triton":
            for shape in QUICK_CONV if large and dtype == "float32" else ():
                exact = f"panes splits {EXACT}" if function == "fused" else EXACT
                yield Check(op, face, function, "default", shape, dtype, exact)
            yield from _measured(op, function, dtype, quick, device)


def _conv_shapes(quick: bool, large: bool, face: str) -> tuple[Conv, ...]:
    if quick:
        return QUICK_CONV if large else SMALL_CONV[:2]
    return SMALL_CONV + ((QUICK_CONV[1:] if face == "cpu" else REAL_CONV) if large else ())


def _variants(function: str, shape: Conv, *, unclean: bool, fast: bool) -> Iterator[str]:
    """Yields the variants in which a function of a conv is checked on `shape`. `unclean` adds variants with NaN in the
    padding of small shapes. `fast` keeps only the first two variants of "fused"."""
    unclean = unclean and shape in SMALL_CONV and function in CLEAN_FUNCTIONS
    if function != "fused":
        variants = ("", UNCLEAN) if unclean else ("",)
        yield from variants if shape.stride == 1 or not function.startswith("dgrad") else ()
        return
    wanted = {"features": shape.c_in <= 64, "log-softmax": shape.c_out <= 128, "panes": shape.stride == 1}
    more = (f"plain {UNCLEAN}", f"panes {UNCLEAN}") if unclean else ()
    for variant in (*FUSED_VARIANTS[: 2 if fast else None], *more):
        if wanted.get(variant.split()[0], True):
            yield variant


def _measured(op: str, function: str, dtype: str, quick: bool, device: torch.device) -> Iterator[Check]:
    """Yields checks of the tiles that were tuned on this GPU or are in its table; a quick plan checks only the most
    frequent ones."""
    if device.type != "cuda":
        return
    table = tables.for_gpu(torch.cuda.get_device_name(device))
    known = {row.key: row for row in (*(table.rows if table else ()), *tuned.rows(device.index or 0))}
    rows = [r for r in known.values() if r.op == f"conv1d.{function}" and r.dtype == dtype and r.tile]
    if quick:
        frequent = Counter(row.label() for row in rows).most_common(QUICK_TILES)
        rows = [next(r for r in rows if r.label() == label) for label, _ in frequent]
    for row in rows:
        frames = max(1, min(1 << row.rows_log2, TABLE_ROWS) * row.stride)
        n = 1 if row.rows_log2 <= 10 else 4
        shape = Conv(n, max(1, frames // n - 3), row.c_in, row.c_out, row.taps, row.stride, row.dilation)
        variants = ("",)
        if function == "fused":
            variants = ("splits", "panes splits") if row.tile["splits"] > 1 else ("plain", "panes")
            # The last conv of a block uses the same tile and also adds panes. A full plan checks that variant too.
            variants = variants[: 1 if quick or shape.stride > 1 else 2]
        configuration = f"table 2^{row.rows_log2} {row.label().removeprefix('triton ')}"
        for variant in variants:
            yield Check(op, row.face, function, configuration, shape, dtype, variant, dict(row.tile))


_PLANS = {
    "panes": _panes, "bn_relu_dropout": _norms, "novograd": _steps, "ctc": _losses, "depthwise": _depthwise,
    "conv1d": _convs, "conv1d.fused": _convs,
}  # fmt: skip
