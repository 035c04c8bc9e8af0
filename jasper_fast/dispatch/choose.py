"""Which face of an op runs: `backend=` resolved by op, device, dtype and shape, once for each."""

from __future__ import annotations

import functools
import warnings

import torch

from jasper_fast.dispatch import backends, verdicts
from jasper_fast.dispatch.backends import NORM, PANES, BackendMissing
from jasper_fast.dispatch.verdict import GOOD
from jasper_fast.kernels import tables


@torch.compiler.assume_constant_result
def resolve(backend: str, device: torch.device | str, op: str | None = None, dtype: torch.dtype | None = None) -> str:
    """The face that runs for `backend` on `device`: raises BackendMissing for a named one that cannot run.

    `op`: of "auto", the op that is to run in `dtype`: fp64 takes "reference", and on a GPU the op's verdict decides
    (see `dispatch.verdicts`; without a dtype those in all); None asks for no verdict.
    """
    return _resolve(backend, device, op, dtype)


@functools.cache
def _resolve(backend: str, device: torch.device | str, op: str | None, dtype: torch.dtype | None) -> str:
    backends.check(backend)
    device = torch.device(device)
    if backend != "auto":
        if reason := backends.why_missing(backend, device):
            raise BackendMissing(backends.named(backend, reason))
        return backend
    first, reasons = None, []
    for name in {"cpu": ("cpu",), "cuda": ("triton", "cuda")}.get(device.type, ()):
        reason = backends.why_missing(name, device)
        first = first or (name if reason is None else None)
        reasons += [] if reason is None else [backends.named(name, reason)]
    if first is None:
        if reasons:
            said = f"jasper_fast runs plain PyTorch on {device.type}: {'; '.join(reasons)}"
            warnings.warn(said, RuntimeWarning, stacklevel=3)
        return "reference"
    if op is not None and dtype is not None and dtype not in tables.DTYPES:  # fp64, say, which no kernel takes
        return "reference"
    if op is None or device.type != "cuda":
        return first
    dtypes = tables.DTYPES if dtype is None else (dtype,)
    return first if all(_trusted(op, first, device, of, PLAIN) for of in dtypes) else "reference"


@torch.compiler.assume_constant_result
def norm_face(
    backend: str, device: torch.device, dtype: torch.dtype, channels: int, rows_log2: int | None = None
) -> str:
    """The face that runs bn_relu_dropout, forward and backward, on (N, `channels`, T) in `dtype` on `device`.

    On a GPU "auto" takes what the GPU's table says is faster for both together at 2**rows_log2 rows N*T (None: at the
    most measured), if it can run here and its verdict is good. Else, and without a row, it is as `resolve` says.
    """
    return _norm_face(backend, device, dtype, channels, rows_log2)


@functools.cache
def _norm_face(backend, device, dtype, channels, rows_log2) -> str:
    device = torch.device(device)
    if backend == "auto" and device.type == "cuda":
        rows = None if rows_log2 is None else 1 << rows_log2
        fastest = tables.fastest(tables.NORM_OPS, device, dtype, **tables.shape_of_norm(channels), rows=rows)
        if fastest == "reference":
            return fastest
        next_one = "backend='auto' goes on to its Triton kernel"
        if (
            fastest == "cuda"
            and resolve(backend, device) != "cuda"
            and backends.why_missing("cuda", device) is None
            and _trusted(NORM, "cuda", device, dtype, next_one)
        ):
            return fastest
    return resolve(backend, device, NORM, dtype)


def conv_calls(*, stats: bool = False, dx: bool = False, dw: bool = False, norm: bool = False) -> tuple[str, ...]:
    """The ops that one use of a conv calls: forward, with statistics; gradients of x, with `norm`'s reduction; of w."""
    forward, dgrad = "forward_stats" if stats else "forward", "dgrad_bn" if norm else "dgrad"
    return tuple(f"conv1d.{op}" for op, used in ((forward, True), (dgrad, dx), ("wgrad", dw)) if used)


@torch.compiler.assume_constant_result
def conv_face(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    strided_dx: bool = False,
    calls: tuple[str, ...] = ("conv1d.forward",),
    shape: tuple[int, int, int, int, int] | None = None,
    rows_log2: int | None = None,
) -> str:
    """The face that runs a conv in `dtype` on `device`: ours where it has the dtype and the gradients, else "aten".

    The CPU kernels take 16 bits too, except where the CPU has AMX for them: ATen's convs use it, ours do not.
    strided_dx: the gradient of x at a stride is asked for, which only ATen has. On a GPU "auto" stays with cuDNN, in
    channels-last memory, unless the GPU's table has `shape` (c_in, c_out, taps, stride, dilation) and says that the
    `calls` together are faster in Triton at 2**rows_log2 rows (None: the most measured), and the verdict on it is good.
    """
    return _conv_face(backend, device, dtype, strided_dx, calls, shape, rows_log2)


@functools.cache
def _conv_face(backend, device, dtype, strided_dx, calls, shape, rows_log2) -> str:
    device = torch.device(device)
    face = resolve(backend, device)
    if strided_dx:
        return "aten"
    if face == "cpu":
        return "aten" if dtype == torch.float64 or _has_amx(dtype) else "cpu"
    if face != "triton" or dtype == torch.float64:
        return "aten"
    if backend == "auto":
        if shape is None:
            return "aten"
        sizes, rows = dict(zip(tables.SHAPE, shape, strict=True)), None if rows_log2 is None else 1 << rows_log2
        if tables.fastest(calls, device, dtype, **sizes, rows=rows) != "triton":
            return "aten"
        return "triton" if _trusted("conv1d", "triton", device, dtype, LIBRARY) else "aten"
    return "triton"


@functools.cache
def fused_face(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The face that serves a whole network at inference in `dtype`: "triton", "cpu" or "aten".

    On a GPU "auto" takes Triton where the GPU's table says that its sub-blocks are the faster ones in all, and the
    verdict on them is good.
    """
    device = torch.device(device)
    if backend != "auto" or device.type != "cuda" or resolve(backend, device) != "triton":
        return conv_face(backend, device, dtype)
    if tables.fastest_overall("conv1d.fused", device, dtype) != "triton":
        return "aten"
    return "triton" if _trusted("conv1d.fused", "triton", device, dtype, LIBRARY) else "aten"


@torch.compiler.assume_constant_result
def pane_form(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """How panes="auto" takes the panes' statistics in training: "gram" or "plain" (see jasper_fast.ops).

    "gram" on a GPU, where the plain form's passes over pane outputs are what costs, if its verdict is good (a `backend`
    asked for by name is not checked); "plain" elsewhere: on CPUs it is faster.
    """
    return _pane_form(backend, device, dtype)


@functools.cache
def _pane_form(backend, device, dtype) -> str:
    device = torch.device(device)
    if device.type != "cuda":
        return "plain"
    if backend != "auto" or dtype not in tables.DTYPES:
        return "gram"
    instead = "panes='auto' takes the plain form instead, which makes more passes over memory"
    return "gram" if _trusted(PANES, "aten", device, dtype, instead) else "plain"


def _has_amx(dtype: torch.dtype) -> bool:
    """Whether this CPU's matrix unit takes `dtype`."""
    known = {torch.bfloat16: torch.cpu._is_amx_tile_supported, torch.float16: torch.cpu._is_amx_fp16_supported}
    return dtype in known and known[dtype]()


# what "auto" does about a verdict that is not good
PLAIN = "backend='auto' takes plain PyTorch for it instead, which is slower"
LIBRARY = "backend='auto' takes PyTorch's own conv instead, which is slower here"


def _trusted(op: str, face: str, device: torch.device, dtype: torch.dtype, instead: str) -> bool:
    """Whether the verdict on a GPU kernel is good; a warning, once for each, where it is not."""
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    found = verdicts.verdict(op, face, device, tables.DTYPES[dtype])
    if found.status == GOOD:
        return True
    if (op, face, device, dtype) not in _warned:
        _warned.add((op, face, device, dtype))
        warnings.warn(verdicts.why_not(found, device, instead), RuntimeWarning, stacklevel=4)
    return False


_warned: set[tuple[str, str, torch.device, torch.dtype]] = set()


def forget() -> None:
    """Drops every choice made so far: after a verdict or a table has changed."""
    for cached in (_resolve, _norm_face, _conv_face, _pane_form, fused_face):
        cached.cache_clear()
    _warned.clear()
    verdicts.forget()
    tables.forget()
