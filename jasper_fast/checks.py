"""What the self-check runs: every kernel and configuration that dispatch can choose on a device, held against fp64.

A check calls one function of one face on two sets of inputs and then on the first again. Results must be within the
tolerance of tests and benchmarks (twice the error of plain PyTorch at the same precision, plus a floor of roundings),
and the same bits when they are asked for again; padding holds NaN where a kernel must not read it. Kernels are called
as dispatch calls them: Triton's convs are told that x is zero in its padding (`clean`), as the ops and the engine do.
"""

from __future__ import annotations

import errno
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast import backends
from jasper_fast.kernels import tables
from jasper_fast.kernels.layout import ntc

OPS = ("bn_relu_dropout", "conv1d", "conv1d.fused", "panes")  # what has verdicts of its own, by face and dtype
FACES = ("cpu", "triton", "cuda", "aten")  # panes are ATen's matrix products, put together by us
CONV = ("forward", "forward_stats", "dgrad", "dgrad_bn", "wgrad")
FLOOR = {torch.float32: 40.0}  # roundings; sums of ten thousand products in another order differ by twenty in fp32
# Where PyTorch's convs may round fp32 to TF32, ours do, and by cutting off: by up to one such rounding an element, of
# which two thirds are the same for all. cuDNN may take a kernel that does not, so its error says nothing of ours.
TF32 = 4 * 2.0**-10
DTYPES = {name: dtype for dtype, name in tables.DTYPES.items()}
QUICK_TILES = 3  # of a table, by function, in a quick check
TABLE_ROWS = 2048  # rows of the inputs on which a table's tiles are checked


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
    def padding(self) -> int:
        return (self.k // 2) * self.dilation

    @property
    def t_out(self) -> int:
        return (self.t + 2 * self.padding - self.dilation * (self.k - 1) - 1) // self.stride + 1


class Norm(NamedTuple):
    """Inputs of bn_relu_dropout: batch, channels, frames."""

    n: int
    c: int
    t: int

    def __str__(self) -> str:
        return f"({self.n}, {self.c}, {self.t})"


# odd frames, one frame, fewer frames than the taps reach, stride 2, dilation 2 with channels that no tile divides
SMALL_CONV = (Conv(2, 37, 64, 48, 11), Conv(3, 1, 32, 32, 1), Conv(3, 5, 32, 29, 25), Conv(2, 41, 64, 32, 11, 2),
              Conv(2, 23, 35, 48, 3, 1, 2))  # fmt: skip
# the convs of Jasper 10x5: prologue, main convs, its dilated one, epilogue, decoder
REAL_CONV = (
    Conv(4, 420, 64, 256, 11, 2), Conv(4, 330, 256, 256, 11), Conv(4, 330, 256, 384, 13), Conv(4, 330, 384, 384, 13),
    Conv(4, 330, 512, 512, 17), Conv(4, 330, 640, 640, 21), Conv(4, 330, 768, 768, 25),
    Conv(4, 330, 768, 896, 29, 1, 2), Conv(4, 330, 896, 1024, 1), Conv(4, 330, 1024, 29, 1), Conv(1, 104, 768, 768, 25),
)  # fmt: skip
QUICK_CONV = (Conv(2, 37, 64, 48, 11), Conv(2, 200, 256, 256, 11))
# More programs than any GPU runs at once (448 by 128 frames and channels, an H100 has 132 SMs): races and reuse of
# shared memory show where programs follow each other on an SM. 39 GFLOP a call, of which a check makes two in fp64, two
# in plain PyTorch and four of ours: tens of milliseconds on an H100, a second where fp64 is slow.
WAVE_CONV = Conv(32, 840, 256, 256, 11)
WAVE = "wave"  # its variant
EXACT = "exact"  # fp32 products as they are, other kernels than those that round to TF32, as a GPU does by default
AGAIN = {WAVE: 2}  # times that a check asks for the first results again; one elsewhere
SMALL_NORM = (Norm(2, 64, 37), Norm(3, 29, 1), Norm(3, 48, 7))
REAL_NORM = (Norm(4, 256, 420), Norm(4, 768, 420), Norm(4, 1024, 331))
QUICK_NORM = (Norm(2, 64, 37), Norm(2, 256, 200))
NORM_VARIANTS = ("batch", "evaluation", "residual", "no dropout", "no lengths", "halo")
FUSED_VARIANTS = ("plain", "panes", "panes splits", "features", "log-softmax", "splits")
UNCLEAN = "unclean"  # padding of x holds NaN and is not to be read: an engine's first conv, callers of the faces
CLEAN_FUNCTIONS = ("forward", "forward_stats", "wgrad", "fused")  # of Triton's conv: those that may be told it is zero
SMALL_PANES, PANES = 40, 256  # channels of a second input: 40 are no whole step of a tile, so descriptors stay out
SMALL_GRAM, REAL_GRAM = (Norm(2, 24, 37), Norm(3, 40, 7)), (Norm(4, 256, 420), Norm(8, 768, 840))
QUICK_GRAM = (Norm(2, 64, 37), Norm(4, 256, 420))


@dataclass(frozen=True)
class Check:
    """One function of one face, with one configuration, on one shape."""

    op: str
    face: str
    function: str
    configuration: str
    shape: Conv | Norm
    dtype: str
    variant: str = ""
    tile: dict[str, int] | None = None

    @property
    def id(self) -> str:
        """Unique in a plan, the same in every process."""
        return " | ".join((self.op, self.face, self.function, self.configuration, str(self.shape), self.dtype,
                           self.variant))  # fmt: skip

    def plain(self) -> dict[str, str]:
        """What a report shows of it."""
        found = {k: str(v) for k, v in asdict(self).items() if k not in ("tile", "shape")}
        return found | {"id": self.id, "shape": str(self.shape)}


# ---- what is to be checked ----


def plan(
    device: torch.device,
    *,
    quick: bool = False,
    ops: tuple[str, ...] = OPS,
    faces: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
) -> list[Check]:
    """The checks for `device`: all faces that run on it (or `faces`), quick ones or all, of `ops`.

    `dtypes` ("bfloat16", ...): which, of those that a face has; by default all, of a quick plan one.
    """
    for name, asked, known in (("op", ops, OPS), ("face", faces, FACES), ("dtype", dtypes, tuple(DTYPES))):
        if unknown := [value for value in asked if value not in known]:
            raise ValueError(f"{name} {unknown[0]!r} is not one of {', '.join(known)}")
    found: list[Check] = []
    for face in FACES:
        if (faces and face not in faces) or (face != "aten" and backends.why_missing(face, device) is not None):
            continue
        large = device.type == "cuda" or face == "cpu"  # an interpreter takes minutes for a real shape
        for dtype in _dtypes(face, device, quick, dtypes):
            if face == "aten":
                found += _panes(dtype, quick, device.type == "cuda") if "panes" in ops else ()
                continue
            if "bn_relu_dropout" in ops:
                found += _norms(face, dtype, quick, large)
            if face != "cuda" and "conv1d" in ops:
                found += _convs(face, dtype, quick, large, device)
            if face != "cuda" and "conv1d.fused" in ops:
                found += _fused(face, dtype, quick, large, device)
    return found


def _dtypes(face: str, device: torch.device, quick: bool, wanted: tuple[str, ...]) -> tuple[str, ...]:
    if face == "cpu":
        return tuple(dtype for dtype in ("float32",) if not wanted or dtype in wanted)
    if wanted:
        return tuple(dict.fromkeys(wanted))
    if face == "aten" and device.type == "cpu":
        return ("float32",)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return ("float16",) if quick else ("float16", "float32")
    return ("bfloat16",) if quick else ("bfloat16", "float16", "float32")


def _panes(dtype: str, quick: bool, large: bool) -> Iterator[Check]:
    for shape in (QUICK_GRAM if quick else SMALL_GRAM + REAL_GRAM) if large else SMALL_GRAM:
        yield Check("panes", "aten", "panes", "default", shape, dtype)


def _norms(face: str, dtype: str, quick: bool, large: bool) -> Iterator[Check]:
    shapes = QUICK_NORM if quick else SMALL_NORM + (REAL_NORM if large else ())
    for shape in shapes if large else shapes[:3]:
        if not large and shape.c > 64:
            continue
        yield Check("bn_relu_dropout", face, "stats", "default", shape, dtype)
        for variant in ("batch", "residual") if quick else NORM_VARIANTS:
            yield Check("bn_relu_dropout", face, "forward", "default", shape, dtype, variant)
            yield Check("bn_relu_dropout", face, "backward", "default", shape, dtype, variant)


def _conv_shapes(quick: bool, large: bool, face: str) -> tuple[Conv, ...]:
    if not large:
        return SMALL_CONV[:2] if quick else SMALL_CONV
    if face == "cpu":
        return QUICK_CONV if quick else (*SMALL_CONV, QUICK_CONV[1])
    return QUICK_CONV if quick else SMALL_CONV + REAL_CONV


def _convs(face: str, dtype: str, quick: bool, large: bool, device: torch.device) -> Iterator[Check]:
    triton = face == "triton"
    for function in CONV if triton else ("forward", "dgrad", "wgrad"):
        for shape in _conv_shapes(quick, large, face):
            if shape.stride == 1 or not function.startswith("dgrad"):
                yield Check("conv1d", face, function, "default", shape, dtype)
                if triton and not quick and function in CLEAN_FUNCTIONS and shape in SMALL_CONV:
                    yield Check("conv1d", face, function, "default", shape, dtype, UNCLEAN)
        if triton:
            if large:
                yield Check("conv1d", face, function, "default", WAVE_CONV, dtype, WAVE)
            for shape in QUICK_CONV if large and dtype == "float32" else ():
                yield Check("conv1d", face, function, "default", shape, dtype, EXACT)
            yield from _measured("conv1d", function, dtype, quick, device)


def _fused(face: str, dtype: str, quick: bool, large: bool, device: torch.device) -> Iterator[Check]:
    triton = face == "triton"
    for shape in _conv_shapes(quick, large, face):
        variants = FUSED_VARIANTS if triton else FUSED_VARIANTS[:2]
        if triton and not quick and shape in SMALL_CONV:
            variants += (f"plain {UNCLEAN}", f"panes {UNCLEAN}")
        for variant in variants:
            wanted = {"features": shape.c_in <= 64, "log-softmax": shape.c_out <= 128, "panes": shape.stride == 1}
            if wanted.get(variant.split()[0], True):
                yield Check("conv1d.fused", face, "fused", "default", shape, dtype, variant)
    if triton:
        if large:
            yield Check("conv1d.fused", face, "fused", "default", WAVE_CONV, dtype, WAVE)
        for shape in QUICK_CONV if large and dtype == "float32" else ():
            yield Check("conv1d.fused", face, "fused", "default", shape, dtype, f"panes splits {EXACT}")
        yield from _measured("conv1d.fused", "fused", dtype, quick, device)


def _measured(op: str, function: str, dtype: str, quick: bool, device: torch.device) -> Iterator[Check]:
    """The tiles of this GPU's table: all of them, or the most frequent ones."""
    table = tables.for_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    rows = [r for r in (table.rows if table else ()) if r.op == f"conv1d.{function}" and r.dtype == dtype and r.tile]
    if quick:
        count: dict[str, int] = {}
        for row in rows:
            count[row.label()] = count.get(row.label(), 0) + 1
        kept = sorted(count, key=lambda label: -count[label])[:QUICK_TILES]
        rows = [next(r for r in rows if r.label() == label) for label in kept]
    for row in rows:
        frames = max(1, min(1 << row.rows_log2, TABLE_ROWS) * row.stride)
        n = 1 if row.rows_log2 <= 10 else 4
        shape = Conv(n, max(1, frames // n - 3), row.c_in, row.c_out, row.taps, row.stride, row.dilation)
        variants: tuple[str, ...] = ("",)
        if function == "fused":
            variants = ("splits",) if row.tile["splits"] > 1 else ("plain",)
            if not quick and shape.stride == 1:  # a block's last conv takes its panes in with the same tile
                variants += ("panes splits",) if row.tile["splits"] > 1 else ("panes",)
        configuration = f"table 2^{row.rows_log2} {row.label().removeprefix('triton ')}"
        for variant in variants:
            yield Check(op, row.face, function, configuration, shape, dtype, variant, dict(row.tile))


# ---- one check ----


def perform(check: Check, device: torch.device) -> dict[str, Any]:
    """Run `check`; returns its description with status "ok", "wrong", "failed", "no memory" or "environment" (what the
    kernel needs is missing on this machine: the detail says what to do), and its errors.

    `ours` and `theirs` are the errors of the tensor that came nearest to its limit, as a share of that tensor's size,
    and `share` how much of the limit it took.
    """
    started = time.perf_counter()
    row = check.plain() | {"status": "ok", "ours": None, "theirs": None, "share": None, "detail": ""}
    try:
        with _exactly(EXACT in check.variant.split()):
            found = _compare_all(check, device)
    except Exception as error:  # whatever a kernel raises is its verdict
        row |= blame(error)
    else:
        row |= found
    return row | {"seconds": round(time.perf_counter() - started, 3)}


@contextmanager
def _exactly(wanted: bool) -> Iterator[None]:
    """Where it is `wanted`, PyTorch's convs and ours multiply fp32 as it is inside."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    if wanted:
        conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        if wanted:
            conv.fp32_precision = before


# (what an error says, what to do about it) where the machine is at fault, not the kernel
FIXES = (
    ("failed to find c compiler", "Triton builds its launcher in C: install a C compiler (gcc) or name one by CC"),
    ("cannot find ptxas", "Triton's ptxas is missing: install triton anew, or name one by TRITON_PTXAS_PATH"),
    ("is not defined for option 'gpu-name'", "ptxas is older than this GPU: update triton, or unset TRITON_PTXAS_PATH"),
    ("unsupported .version", "ptxas is older than Triton: update triton, or unset TRITON_PTXAS_PATH"),
    ("libcuda.so cannot found", "Triton finds no libcuda.so of the driver: run ldconfig, or set TRITON_LIBCUDA_PATH"),
    ("could not create or locate cache dir", "set TRITON_CACHE_DIR to a folder that can be written"),
    ("no space left on device", "free space in TRITON_CACHE_DIR (default ~/.triton/cache) and TMPDIR, or set them"),
    ("no kernel image is available", "the CUDA library is not built for this GPU: see JASPER_FAST_CUDA_ARCHS"),
    ("busy or unavailable", "another process has the GPU for itself: see nvidia-smi"),
    ("driver version is insufficient", "update the NVIDIA driver"),
)
NO_MEMORY = ("out of memory", "alloc_failed", "cannot allocate memory")
FREE_MEMORY = "another process may hold the memory: see nvidia-smi, and check again when it is free"


def blame(error: BaseException) -> dict[str, str]:
    """Status and detail of what an exception says: of the kernel, or of the machine that it was to run on."""
    text = str(error)
    detail = text if isinstance(error, PlainPyTorchFailed) else _in_a_line(error)
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(m in text.lower() for m in NO_MEMORY):
        return {"status": "no memory", "detail": f"{detail} ({FREE_MEMORY})"}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += " no space left on device"
    fix = next((fix for what, fix in FIXES if what in text.lower()), None)
    if fix is None and isinstance(error, subprocess.SubprocessError):  # what runs a compiler; PTXASError is another
        fix = "Triton builds its launcher in C: it needs gcc, Python's headers (python3-dev) and space in TMPDIR"
    if fix is None and isinstance(error, (OSError, ImportError)):  # kernels touch no files
        fix = "the files of Triton and of its cache must be there for this user to read, run and write"
    if fix is None and isinstance(error, PlainPyTorchFailed):
        fix = "without it there is nothing to compare with"
    if fix is None:
        return {"status": "failed", "detail": detail}
    return {"status": "environment", "detail": f"{detail} ({fix})"}


class PlainPyTorchFailed(RuntimeError):
    """The call beside the kernel's failed; if by the kernel's doing, the device says so when it is next waited for."""


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _compare_all(check: Check, device: torch.device) -> dict[str, Any]:
    cases = [case(check, device, seed) for seed in (1, 2)]
    worst: dict[str, Any] = {"share": -1.0}
    first: dict[str, Tensor] = {}
    floor = _floor(check, device)
    for drawn in cases:
        outputs = _ours(check, drawn)
        got = {name: out.detach().clone() for name, out in outputs.items()}
        first = first or got
        try:
            low, ref = drawn.low(), drawn.reference()
        except Exception as error:
            raise PlainPyTorchFailed(f"plain PyTorch: {_in_a_line(error)}") from error
        if missing := ref.keys() ^ got.keys():
            return {"status": "wrong", "detail": f"results differ: {', '.join(sorted(missing))}"}
        for name in ref:
            compared = _compare(got[name], low[name], ref[name], floor)
            if not compared["share"] <= 1.0:  # a NaN is wrong too
                return compared | {"status": "wrong", "detail": f"{name}: {compared['detail']}"}
            worst = max(worst, compared, key=lambda found: found["share"])
    for _ in range(AGAIN.get(check.variant, 1)):
        for name, out in _ours(check, cases[0]).items():
            if not torch.equal(out, first[name]):
                return {"status": "wrong", "detail": f"{name}: other results for the same inputs when called again"}
    return worst | {"detail": ""}


def _ours(check: Check, drawn: Case) -> dict[str, Tensor]:
    if check.tile is None:
        return drawn.ours()
    with tables.forced(f"conv1d.{check.function}", check.tile):
        return drawn.ours()


def _floor(check: Check, device: torch.device) -> float:
    """The error that results may have whatever PyTorch's is, as a share of their size."""
    dtype = DTYPES[check.dtype]
    rounds = dtype == torch.float32 and device.type == "cuda" and check.op in ("conv1d", "conv1d.fused")
    if rounds and backends.face("conv1d", check.face).takes_tf32():
        return TF32
    return FLOOR.get(dtype, 1.0) * torch.finfo(dtype).eps


def _compare(got: Tensor, low: Tensor, ref: Tensor, floor: float) -> dict[str, Any]:
    if got.shape != ref.shape:
        return {"share": float("inf"), "detail": f"shape {tuple(got.shape)}, expected {tuple(ref.shape)}"}
    if not got.is_floating_point():
        same = torch.equal(got, ref.to(got.dtype))
        return {"share": 0.0 if same else float("inf"), "ours": 0.0, "theirs": 0.0, "detail": "other integers"}
    worst: dict[str, Any] = {}
    for name, norm in (("max", _max), ("rms", _rms)):
        size = norm(ref)
        ours, theirs = norm(got.double() - ref), norm(low.double() - ref)
        allowed = 2 * theirs + floor * size
        share = 0.0 if ours == 0 else ours / allowed if allowed > 0 else float("inf")
        detail = f"{name} error {ours:.2e}, PyTorch's {theirs:.2e}, allowed {allowed:.2e}"
        scale = size or 1.0
        found = {"share": share, "ours": ours / scale, "theirs": theirs / scale, "detail": detail}
        if not share <= 1.0:
            return found
        worst = max(worst, found, key=lambda f: f.get("share", -1.0))
    return worst


def _max(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


@dataclass(frozen=True)
class Case:
    """One set of inputs, ready: results of the face under test, of plain PyTorch at its precision, and in fp64.

    `inputs` are all tensors that these read, by name: values copied into them are the next inputs. `ours` of
    bn_relu_dropout takes the name of another face, which gets the same inputs.
    """

    ours: Callable[..., dict[str, Tensor]]
    low: Callable[[], dict[str, Tensor]]
    reference: Callable[[], dict[str, Tensor]]
    inputs: dict[str, Tensor]


def case(check: Check, device: torch.device, seed: int, *, timed: bool = False) -> Case:
    """The inputs of `check` drawn from `seed`; `timed`: without padding, and a Triton conv's weight packed before."""
    draw = _Draw(device, DTYPES[check.dtype], seed, timed, check.variant == WAVE)
    if check.op == "bn_relu_dropout":
        return _norm_case(check, draw)
    if check.op == "panes":
        return _panes_case(check, draw)
    return _fused_case(check, draw) if check.function == "fused" else _conv_case(check, draw)


class _Draw:
    """Random tensors on a device, the same for the same seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int, timed: bool, busy: bool = False) -> None:
        self.device, self.dtype, self.timed, self.busy = device, dtype, timed, busy
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return x.to(dtype or self.dtype)

    def activation(self, n: int, c: int, t: int) -> Tensor:
        """(N, C, T) in NTC memory."""
        return self.normal(n, t, c).transpose(1, 2)

    def weight(self, *shape: int) -> Tensor:
        """fp32, but of values that the activations' dtype holds, so that packing rounds nothing."""
        return self.normal(*shape, scale=(shape[1] * shape[2]) ** -0.5).float()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def lengths(self, n: int, t: int) -> Tensor:
        """Full, a third, none, one frame, and so on; all full for a timing; full to half where all is to be busy."""
        if self.timed:
            return torch.full((n,), t, device=self.device)
        if self.busy:
            return torch.tensor([t - i * t // (2 * n) for i in range(n)], device=self.device)
        return torch.tensor([(t, t // 3, 0, min(1, t))[i % 4] for i in range(n)], device=self.device)


def _beyond(x: Tensor, lengths: Tensor, value: float) -> Tensor:
    """`x` (N, C, T) with `value` at t >= length, in NTC memory."""
    t = torch.arange(x.shape[2], device=x.device)
    return ntc(x.masked_fill((t >= lengths[:, None])[:, None], value))


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


def _conv_case(check: Check, draw: _Draw) -> Case:
    s, function = check.shape, check.function
    x, dy = draw.activation(s.n, s.c_in, s.t), draw.activation(s.n, s.c_out, s.t_out)
    weight, lengths = draw.weight(s.c_out, s.c_in, s.k), draw.lengths(s.n, s.t)
    mean, beta = (draw.normal(s.c_in, dtype=torch.float32, scale=0.3) for _ in range(2))
    rstd, gamma = (draw.uniform(s.c_in) + 0.5 for _ in range(2))
    seed = torch.tensor([1234567], device=draw.device)
    y = _off_the_edge(draw.activation(s.n, s.c_in, s.t), mean, rstd, gamma, beta)
    z = y
    if function == "dgrad_bn":
        z = backends.face("bn_relu_dropout", "reference").forward(y, mean, rstd, gamma, beta, None, lengths, seed, 0.2)
    zero, clean = _beyond(x, lengths, 0.0), _told_clean(check)
    given = zero if clean else _beyond(x, lengths, float("nan"))
    told = {"clean": True} if clean else {}
    pack = {"packed": backends.face("conv1d", check.face).pack(weight, draw.dtype).data} if draw.timed else {}

    def results(face: str, x: Tensor, dy: Tensor, weight: Tensor, *norm: Tensor) -> dict[str, Tensor]:
        impl, more = backends.face("conv1d", face), {} if face == "reference" else pack
        how = {} if face == "reference" else told
        if function == "forward":
            return {"y": impl.forward(x, weight, s.stride, s.padding, s.dilation, lengths, **more, **how)}
        if function == "forward_stats":
            out = impl.forward_stats(x, weight, s.stride, s.padding, s.dilation, lengths, **more, **how)
            return dict(zip(("y", "mean", "m2"), out, strict=True))
        if function == "dgrad":
            return {"dx": impl.dgrad(dy, weight, s.t, s.stride, s.padding, s.dilation, lengths, **more)}
        if function == "dgrad_bn":
            out = impl.dgrad_bn(dy, weight, s.padding, s.dilation, *norm, lengths, 0.2, **more)
            return dict(zip(("g", "dbeta", "dgamma"), out, strict=True))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return {"dw": impl.wgrad(x, dy, s.k, s.stride, s.padding, s.dilation, lengths, dtype=wide, **how)}

    def low() -> dict[str, Tensor]:
        aten, bn = backends.face("conv1d", "aten"), backends.face("bn_relu_dropout", "reference")
        if function.startswith("forward"):
            out = aten.forward(zero, weight, s.stride, s.padding, s.dilation)
            return {"y": out} | (dict(zip(("mean", "m2"), bn.stats(out), strict=True)) if function != "forward" else {})
        if function == "wgrad":
            return {"dw": aten.wgrad(zero, dy, s.k, s.stride, s.padding, s.dilation, dtype=torch.float32)}
        dx = _beyond(aten.dgrad(dy, weight, s.t, s.stride, s.padding, s.dilation), lengths, 0.0)
        if function == "dgrad":
            return {"dx": dx}
        norm = (y, None, mean, rstd, gamma, beta)
        dbeta, dgamma = bn.backward_reduce(dx, *norm, lengths, seed, 0.2)
        g = bn.backward_apply(dx, *norm, None, None, lengths, seed, 0.2, True)[1]
        return {"g": g, "dbeta": dbeta, "dgamma": dgamma}

    tensors = {"dy": dy, "weight": weight, "y": y, "z": z, "mean": mean, "rstd": rstd}
    return Case(
        lambda: results(check.face, given, *tensors.values()),
        low,
        lambda: results("reference", *_wide(zero, *tensors.values())),
        tensors | pack | {"gamma": gamma, "beta": beta, "x": zero, "given": given, "lengths": lengths, "seed": seed},
    )


def _told_clean(check: Check) -> bool:
    """Whether the kernel is told that x is zero in its padding; the others are given NaN there."""
    return check.face == "triton" and check.function in CLEAN_FUNCTIONS and UNCLEAN not in check.variant.split()


def _fused_case(check: Check, draw: _Draw) -> Case:
    s, variant, words = check.shape, check.variant, check.variant.split()
    x, weight = draw.normal(s.n, s.t, s.c_in), draw.weight(s.c_out, s.c_in, s.k)
    bias, lengths = draw.normal(s.c_out, dtype=torch.float32, scale=0.3), draw.lengths(s.n, s.t)
    x2 = weight2 = None
    if "panes" in words:
        c2 = PANES if s.c_in >= PANES else SMALL_PANES
        x2, weight2 = draw.normal(s.n, s.t, c2), draw.weight(s.c_out, c2, 1)
    out_lengths = torch.div(lengths + 2 * s.padding - s.dilation * (s.k - 1) - 1, s.stride, rounding_mode="floor") + 1
    out_lengths = out_lengths.clamp_(0, s.t_out)
    relu = variant != "log-softmax"
    conv = {"stride": s.stride, "padding": s.padding, "dilation": s.dilation}

    def masked(x: Tensor | None, value: float) -> Tensor | None:
        return None if x is None else _beyond(x.transpose(1, 2), lengths, value).transpose(1, 2)

    impl, clean = backends.face("conv1d", check.face), _told_clean(check) and variant != "features"
    padding = 0.0 if clean else float("nan")
    given = masked(x, padding)
    more: dict[str, Any] = {"in_lengths": lengths, "out_lengths": out_lengths}
    if variant == "features":  # fp32 and (N, C, T), as the network's first kernel reads them, padding as users leave it
        given = given.float().transpose(1, 2).contiguous().transpose(1, 2)
        more = {"in_lengths": lengths, "lengths_out": torch.empty_like(lengths)}
    if clean:
        more |= {"clean": True}
    if variant == "log-softmax":
        more |= {"log_softmax": True}
    if "splits" in words:
        more |= {"workspace": impl.Workspace(x.device)}
    if x2 is not None:
        more |= {"x2": masked(x2, padding), "packed2": impl.pack(weight2.to(x.dtype))}
    pack = impl.pack(weight.to(x.dtype))

    def ours() -> dict[str, Tensor]:
        out = impl.fused(given, pack, bias=bias, relu=relu, **conv, **more)
        return {"z": out} | ({"lengths": more["lengths_out"]} if variant == "features" else {})

    def low() -> dict[str, Tensor]:
        aten = backends.face("conv1d", "aten")
        z = aten.forward(masked(x, 0.0).transpose(1, 2), weight, s.stride, s.padding, s.dilation).transpose(1, 2)
        z = z if x2 is None else z + F.linear(masked(x2, 0.0), weight2[:, :, 0].to(x.dtype))
        return finish(z + bias.to(x.dtype))

    def reference() -> dict[str, Tensor]:
        impl = backends.face("conv1d", "reference")
        wide_x, wide_w, wide_b, wide_x2, wide_w2 = _wide(masked(x, 0.0), weight, bias, masked(x2, 0.0), weight2)
        return finish(impl.fused(wide_x, wide_w, bias=wide_b, x2=wide_x2, weight2=wide_w2, **conv))

    def finish(z: Tensor) -> dict[str, Tensor]:
        z = z.relu() if relu else (z if z.dtype == torch.float64 else z.float()).log_softmax(2)
        z = _beyond(z.transpose(1, 2), out_lengths, 0.0).transpose(1, 2)
        return {"z": z} | ({"lengths": out_lengths} if variant == "features" else {})

    inputs = {"x": x, "given": given, "weight": weight, "packed": pack.data, "bias": bias, "lengths": lengths}
    return Case(ours, low, reference, inputs | {"out_lengths": out_lengths})


def _norm_case(check: Check, draw: _Draw) -> Case:
    (n, c, t), function, variant = check.shape, check.function, check.variant
    mean, beta = (draw.normal(c, dtype=torch.float32, scale=0.3) for _ in range(2))
    rstd, gamma = (draw.uniform(c) + 0.5 for _ in range(2))
    mean_g, mean_gy = (draw.normal(c, dtype=torch.float32, scale=0.1) for _ in range(2))
    lengths = None if variant == "no lengths" else draw.lengths(n, t)
    residual = draw.activation(n, c, t) if variant == "residual" else None
    y = draw.activation(n, c, t)
    halo = 2 if variant == "halo" else None
    if halo is not None:
        y = _beyond(y, lengths + halo, 0.0)
    if residual is None:  # with one, z tells where the ReLU was open
        y = _off_the_edge(y, mean, rstd, gamma, beta)
        y = y if halo is None else _beyond(y, lengths + halo, 0.0)
    dz = draw.activation(n, c, t)
    poisoned = dz if lengths is None else _beyond(dz, lengths, float("nan"))
    p = 0.0 if variant in ("no dropout", "evaluation") else 0.2
    seed = torch.tensor([987654321], device=draw.device) if p else None
    with_means = variant != "evaluation"

    # z as the forward gave it to backward, the same for all
    z = None
    if residual is not None:
        z = backends.face("bn_relu_dropout", "reference").forward(
            y, mean, rstd, gamma, beta, residual, lengths, seed, p
        )

    def results(face: str, y: Tensor, dz: Tensor, residual, z, *vectors: Tensor) -> dict[str, Tensor]:
        impl = backends.face("bn_relu_dropout", face)
        norm, means = vectors[:4], vectors[4:] if with_means else (None, None)
        if function == "backward":
            sums = impl.backward_reduce(dz, y, z, *norm, lengths, seed, p)
            more = {} if halo is None else {"halo": halo}
            dy, dres = impl.backward_apply(dz, y, z, *norm, *means, lengths, seed, p, residual is not None, **more)
            both = dict(zip(("dbeta", "dgamma"), sums, strict=True)) | {"dy": dy}
            return both | ({} if dres is None else {"dres": dres})
        found = {}
        if function in ("stats", "stats_forward"):
            found |= zip(("mean", "m2"), impl.stats(y), strict=True)
        if function in ("forward", "stats_forward"):
            found["z"] = impl.forward(y, *norm, residual, lengths, seed, p)
        return found

    tensors = (residual, z, mean, rstd, gamma, beta, mean_g, mean_gy)
    names = ("residual", "z", "mean", "rstd", "gamma", "beta", "mean_g", "mean_gy")
    named = {"y": y, "dz": dz, "poisoned": poisoned, "lengths": lengths, "seed": seed, **dict(zip(names, tensors))}
    return Case(
        lambda face=check.face: results(face, y, poisoned, *tensors),
        lambda: results("reference", y, dz, *tensors),
        lambda: results("reference", *_wide(y, dz, *tensors)),
        {name: t for name, t in named.items() if t is not None},
    )


def _panes_case(check: Check, draw: _Draw) -> Case:
    """The definition is a 1x1 conv and batch norm a pane; of two block outputs, which a ReLU has made."""
    from jasper_fast import ops

    (n, c, t), eps = check.shape, 1e-3
    widths, c_out = (c, max(8, c // 2)), c
    xs = [_beyond(draw.activation(n, width, t).relu(), draw.lengths(n, t), 0.0) for width in widths]
    weights = [draw.weight(c_out, width, 1) for width in widths]
    gammas = [draw.uniform(c_out) + 0.5 for _ in widths]
    betas = [draw.normal(c_out, dtype=torch.float32, scale=0.3) for _ in widths]
    up = draw.activation(n, c_out, t)

    def ours(xs: list[Tensor], weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor]):
        return ops.panes(xs, [ops.gram(x) for x in xs], weights, gammas, betas, eps=eps)

    def plain(xs: list[Tensor], weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor]):
        out, means, variances = 0.0, [], []
        for x, weight, gamma, beta in zip(xs, weights, gammas, betas, strict=True):
            y = F.linear(x.transpose(1, 2), weight.flatten(1).to(x.dtype)).transpose(1, 2)
            out = out + F.batch_norm(y, None, None, gamma, beta, training=True, eps=eps)
            variance, mean = torch.var_mean(y.detach().to(gamma.dtype), (0, 2))
            means, variances = [*means, mean], [*variances, variance]
        return out, torch.stack(means), torch.stack(variances)

    def results(panes: Callable, wide: bool) -> dict[str, Tensor]:
        """Sum, means, variances, and the gradients of everything, through the Gram matrices too."""
        leaves = [[(x.double() if wide else x.clone()).requires_grad_() for x in of] for of in named.values()]
        out, mean, var = panes(*leaves)
        grads = torch.autograd.grad(out, [x for of in leaves for x in of], up.to(out.dtype))
        names = [f"d{name} {k}" for name in named for k in range(len(xs))]
        return {"out": out.detach(), "mean": mean, "var": var} | dict(zip(names, grads, strict=True))

    named = {"x": xs, "weight": weights, "gamma": gammas, "beta": betas}
    inputs = {f"{name} {k}": x for name, of in named.items() for k, x in enumerate(of)}
    return Case(
        lambda: results(ours, False), lambda: results(plain, False), lambda: results(plain, True), inputs | {"up": up}
    )


def _off_the_edge(y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """`y` (N, C, T) moved where the ReLU's input lies within roundings of zero: two right answers may differ there."""
    a = (gamma * rstd)[:, None].double()
    pre = (y.double() - mean[:, None]) * a + beta[:, None]
    target = torch.where(pre < 0, -0.2, 0.2)
    moved = (target - beta[:, None]) / a + mean[:, None]
    return ntc(torch.where(pre.abs() < 0.02, moved, y.double()).to(y.dtype))
