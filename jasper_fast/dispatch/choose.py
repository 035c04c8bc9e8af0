"""Chooses the face of an op from `backend=`, op, device, dtype and shape. `forget` drops all cached choices.

A face is one implementation of an op: "reference" (plain PyTorch), "cpu", "triton", "cuda", or "aten" (PyTorch's own
kernel, in place of "reference" for convs). A verdict is the result of checking a kernel on this machine.
"""

import functools
import warnings

import torch

from jasper_fast.dispatch import backends, rules, tuned, verdicts
from jasper_fast.dispatch.backends import CTC, DEPTHWISE, NORM, PANES, BackendMissing
from jasper_fast.dispatch.verdict import GOOD
from jasper_fast.kernels import tables
from jasper_fast.kernels.conv1d import cuda_launch
from jasper_fast.kernels.tables import Cell

CONVS = ("triton", "cuda")  # our faces that have convs for GPUs

# the part of a warning that says what "auto" does if a verdict is not good
PLAIN = "backend='auto' uses plain PyTorch for it instead, which is slower"
LIBRARY = "backend='auto' uses PyTorch's own conv instead, which may be slower"


@torch.compiler.assume_constant_result
def resolve(backend: str, device: torch.device | str, op: str | None = None, dtype: torch.dtype | None = None) -> str:
    """Returns the face that runs for `backend` on `device`. Raises BackendMissing if `backend` names a face that cannot
    run.

    The cuda backend has no depthwise kernel: for that op its face is "triton", or "reference" if Triton cannot run.

    For "auto", `op` and `dtype` say what will run. In fp64 the face is "reference". On a GPU the face is one of ours
    only if its verdict on the op in this dtype is good (see `dispatch.verdicts`), else "reference". If `dtype` is None,
    the verdicts in all dtypes must be good. If `op` is None, dtype and verdicts are ignored.
    """
    return _resolve(backend, device, op, dtype)


@functools.cache
def _resolve(backend: str, device: torch.device | str, op: str | None, dtype: torch.dtype | None) -> str:
    backends.check(backend)
    device = torch.device(device)
    if backend != "auto":
        if reason := backends.why_missing(backend, device):
            raise BackendMissing(backends.named(backend, reason))
        if backend == "cuda" and op == DEPTHWISE:
            return "reference" if backends.why_missing("triton", device) else "triton"
        return backend
    names = {"cpu": ("cpu",), "cuda": ("triton",) if op == DEPTHWISE else CONVS}.get(device.type, ())
    missing = {name: backends.why_missing(name, device) for name in names}
    first = next((name for name, reason in missing.items() if reason is None), None)
    if first is None:
        if missing:
            reasons = "; ".join(backends.named(name, reason) for name, reason in missing.items())
            warnings.warn(f"jasper_fast uses plain PyTorch on {device.type}: {reasons}", RuntimeWarning, stacklevel=3)
        return "reference"
    if op is not None and dtype is not None and dtype not in tables.DTYPES:  # fp64, for instance, has no kernel
        return "reference"
    if op is None or device.type != "cuda":
        return first
    dtypes = tables.DTYPES if dtype is None else (dtype,)
    return first if all(_trusted(op, first, device, of, PLAIN) for of in dtypes) else "reference"


@torch.compiler.assume_constant_result
def depthwise_face(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the face of the depthwise convs in `dtype` on `device`: the one that `resolve` returns, or "aten" if that
    is plain PyTorch or has no kernel for `dtype`. With backend="reference" it is "reference"."""
    face = resolve(backend, device, DEPTHWISE, dtype)
    if backend != "reference" and (face == "reference" or dtype not in tables.DTYPES):
        return "aten"
    return face


@torch.compiler.assume_constant_result
def ctc_face(backend: str, device: torch.device) -> str:
    """Returns the face of the CTC loss in fp32 on `device`: "triton" or "reference". No other face has a CTC loss.

    On a GPU it is "triton" if Triton can run and its verdict is good, except for backend="reference". A verdict is not
    needed for backend="triton". Raises BackendMissing as `resolve` does.
    """
    if resolve(backend, device) not in CONVS or backends.why_missing("triton", device) is not None:
        return "reference"
    return "triton" if backend == "triton" else resolve("auto", device, CTC, torch.float32)


@torch.compiler.assume_constant_result
def norm_face(
    backend: str, device: torch.device, dtype: torch.dtype, channels: int, rows_log2: int | None = None
) -> str:
    """Returns the face that runs bn_relu_dropout, forward and backward, on (N, `channels`, T) in `dtype` on `device`.

    On a GPU "auto" takes the face that was measured to be fastest for forward and backward together at 2**rows_log2
    rows N*T (None: at the largest measured number), if it can run and its verdict is good. If nothing was measured for
    this shape, it may be measured now (see `tuned`). In all other cases `resolve` chooses the face.
    """
    if backend == "auto":
        tuned.catch_up(device)
    return _norm_face(backend, device, dtype, channels, rows_log2, tuned.is_off())


# `off` is only a part of the key of this cache: a choice made while tuning was off must not hold where tuning is on.
@functools.cache
def _norm_face(backend, device, dtype, channels, rows_log2, off) -> str:
    if backend == "auto" and device.type == "cuda":
        rows = None if rows_log2 is None else 1 << rows_log2
        if rows is not None and dtype in tables.DTYPES and resolve(backend, device) != "reference":
            shape = tables.shape_of_norm(channels).values()
            _want(device, dtype, [(op, tuple(shape)) for op in tables.NORM_OPS], rows_log2, "a batch norm")
        fastest = tables.fastest(tables.NORM_OPS, device, dtype, **tables.shape_of_norm(channels), rows=rows)
        if fastest == "reference" or (
            fastest == "cuda"
            and resolve(backend, device) != "cuda"
            and backends.why_missing("cuda", device) is None
            and _trusted(NORM, "cuda", device, dtype, "backend='auto' tries its Triton kernel next")
        ):
            return fastest
    return resolve(backend, device, NORM, dtype)


def rows_log2(rows: int) -> int | None:
    """Returns the exponent of the power of two under which times for `rows` are kept, or None in a traced graph, whose
    batches have no fixed size."""
    return None if torch.compiler.is_compiling() else tables.bucket(rows)


def conv_calls(*, stats: bool = False, dx: bool = False, dw: bool = False, norm: bool = False) -> tuple[str, ...]:
    """Returns the names of the ops that a conv calls.

    stats: forward also computes the statistics for the batch norm after the conv. dx, dw: backward computes the
    gradients of x and of the weight. norm: backward also computes the sums for the batch norm before the conv.
    """
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
    """Returns the face that runs a conv in `dtype` on `device`: ours if it supports the dtype and computes the needed
    gradients, else "aten". With backend="reference" it is "aten" too.

    strided_dx: the gradient of a strided conv's x is needed, which none of our kernels computes. On a CPU 16-bit convs
    run on ATen if the CPU has AMX for the dtype, because ATen's convs use AMX and ours do not.

    On a GPU "auto" compares our faces with cuDNN in channels-last memory. It takes the one on which `calls` together
    take the least time at `shape` (c_in, c_out, taps, stride, dilation) and 2**rows_log2 rows (None: the largest
    measured number). The times are those tuned on this GPU (now, if this is the first use: see `tuned`), else those in
    the tables of this GPU or a similar one, else estimates by `rules`. Our faces are used only if their verdict is
    good. If Triton cannot run, "auto" takes the CUDA face without comparing times; otherwise it takes "aten" if `shape`
    is None.
    """
    if backend == "auto":
        tuned.catch_up(device)
    return _conv_face(backend, device, dtype, strided_dx, calls, shape, rows_log2, tuned.is_off())


@functools.cache
def _conv_face(backend, device, dtype, strided_dx, calls, shape, rows_log2, off) -> str:
    face = resolve(backend, device)
    if face == "cpu" and not strided_dx:
        return "aten" if dtype == torch.float64 or _has_amx(dtype) else "cpu"
    if strided_dx or face not in CONVS or not _takes(face, device, dtype, shape):
        return "aten"
    if backend != "auto":
        return face
    if face == "triton":  # if Triton runs here, times decide between the faces
        if shape is None:
            return "aten"
        if rows_log2 is not None:
            _want(device, dtype, [(op, shape) for op in calls], rows_log2, "a conv")
        faces = tuple(f for f in CONVS if _takes(f, device, dtype, shape) and not backends.why_missing(f, device))
        face = _faster([(op, shape, 1) for op in calls], device, dtype, rows_log2, faces)
    return face if face in CONVS and _trusted("conv1d", face, device, dtype, LIBRARY) else "aten"


def _takes(face: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> bool:
    """Returns whether `face`, one of CONVS, has convs for `dtype` on `device`, and for `shape` if given."""
    return dtype in tables.DTYPES if face == "triton" else cuda_launch.takes(device, dtype, shape)


@functools.cache
def fused_faces(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Returns the faces that may run a whole network at inference in `dtype`: some of "triton", "cuda", "cpu", "aten".

    Returns a single face, except for "auto" on a GPU. In that case it returns "aten" and those of our faces that can
    run and have a good verdict on fused sub-blocks, and `fused_face` chooses one of them for each batch. If Triton
    cannot run, it returns only the CUDA face, or only "aten" if the verdict on the CUDA face is not good.
    """
    first = resolve(backend, device)
    if backend != "auto" or device.type != "cuda" or first not in CONVS:
        return (conv_face(backend, device, dtype),)
    ours = tuple(
        face
        for face in CONVS
        if _takes(face, device, dtype)
        and not backends.why_missing(face, device)
        and _trusted("conv1d.fused", face, device, dtype, LIBRARY)
    )
    return ours if ours and first == "cuda" else (*ours, "aten")


def fused_face(
    device: torch.device,
    dtype: torch.dtype,
    convs: tuple[tuple[tuple[int, ...], int], ...],
    rows_log2: int,
    faces: tuple[str, ...],
) -> str:
    """Returns which of `faces` runs all `convs` of a network fastest on a GPU at 2**rows_log2 rows N*T' (T': frames
    after the strided conv). The times are measured (now, if this is the first use: see `tuned`) or estimated by
    `rules`.

    `convs`: pairs of a shape (c_in, c_out, taps, stride, dilation) and the number of convs with that shape.
    """
    tuned.catch_up(device)
    return _fused_face(device, dtype, convs, rows_log2, faces, tuned.is_off())


@functools.cache
def _fused_face(device, dtype, convs, rows_log2, faces, off) -> str:
    _want(device, dtype, [("conv1d.fused", shape) for shape, _ in convs], rows_log2, "Jasper's inference")
    return _faster([("conv1d.fused", *conv) for conv in convs], device, dtype, rows_log2, faces)


def _faster(calls: list[tuple[str, tuple[int, ...], int]], device, dtype, rows_log2: int | None, faces) -> str:
    """Returns a face from `faces`, or "aten": the one that takes the least measured time for all `calls`.

    A call is (op, shape, count). If no such face was measured, estimates decide between "triton", if it is in `faces`,
    and "aten".
    """
    rows = None if rows_log2 is None else 1 << rows_log2
    times = tables.times(calls, device, dtype, rows) or {}
    if measured := {face: time for face, time in times.items() if face in (*faces, "aten")}:
        return min(sorted(measured), key=measured.__getitem__)
    found = rules.fastest(calls, device, dtype, rows)
    return found if found in faces else "aten"


def _want(device, dtype, ops: list[tuple[str, tuple[int, ...]]], rows_log2: int, what: str) -> None:
    """Tells first-use tuning that "auto" is about to choose a face for `ops`, each (op, shape), on a GPU."""
    tuned.want(device, [Cell(op, tables.DTYPES[dtype], *shape, rows_log2) for op, shape in ops], what)


@torch.compiler.assume_constant_result
def pane_form(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns how panes="auto" computes the batch norm statistics of panes (the 1x1 convs of residual connections) in
    training: "gram", from Gram matrices of their inputs, or "plain", from their outputs.

    On a GPU it is "gram", because the plain form makes expensive passes over the outputs of the panes. With
    backend="auto" its verdict must be good, else it is "plain"; fp64 needs no verdict. On a CPU it is "plain", which is
    faster there.
    """
    if device.type != "cuda":
        return "plain"
    if backend != "auto" or dtype not in tables.DTYPES:
        return "gram"
    instead = "panes='auto' takes the plain form instead, which makes more passes over memory"
    return "gram" if _trusted(PANES, "aten", device, dtype, instead) else "plain"


def _has_amx(dtype: torch.dtype) -> bool:
    """Returns whether this CPU has a matrix unit (AMX) for `dtype`."""
    known = {torch.bfloat16: torch.cpu._is_amx_tile_supported, torch.float16: torch.cpu._is_amx_fp16_supported}
    return dtype in known and known[dtype]()


def _trusted(op: str, face: str, device: torch.device, dtype: torch.dtype, instead: str) -> bool:
    """Returns whether the verdict on a GPU kernel is good. If not, warns once per kernel."""
    device = tuned.indexed(device)
    found = verdicts.verdict(op, face, device, tables.DTYPES[dtype])
    if found.status != GOOD:
        _warn(verdicts.why_not(found, device, instead))
    return found.status == GOOD


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=5)


def forget() -> None:
    """Drops all choices, verdicts and times that this process has cached. Call this after one of them has changed."""
    _drop()
    for cached in (_resolve, fused_faces, _warn):
        cached.cache_clear()
    verdicts.forget()
    tables.forget()
    tuned.forget()


def _drop() -> None:
    """Drops the cached choices that depend on measured times."""
    for cached in (_norm_face, _conv_face, _fused_face):
        cached.cache_clear()


tuned.changed.append(_drop)
