"""One check: the kernel called on two sets of inputs, then on the first again, and held against fp64.

Results must be within the tolerance of tests and benchmarks (twice the error of plain PyTorch at the same precision,
plus a floor of roundings), and the same bits when they are asked for again; padding holds NaN where a kernel must not
read it. Kernels are called as dispatch calls them: Triton's convs are told that x is zero in its padding (`clean`), as
the ops and the engine do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jasper_fast.dispatch import backends
from jasper_fast.dispatch.verdict import PlainPyTorchFailed, blame, in_a_line
from jasper_fast.kernels import tables
from jasper_fast.selfcheck.cases import Case, case
from jasper_fast.selfcheck.checks import DTYPES, EXACT, WAVE, Check

FLOOR = {torch.float32: 40.0}  # roundings; sums of ten thousand products in another order differ by twenty in fp32
# Where PyTorch's convs may round fp32 to TF32, ours do, and by cutting off: by up to one such rounding an element, of
# which two thirds are the same for all. cuDNN may take a kernel that does not, so its error says nothing of ours.
TF32 = 4 * 2.0**-10
AGAIN = {WAVE: 2}  # times that a check asks for the first results again; one elsewhere


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
            raise PlainPyTorchFailed(f"plain PyTorch: {in_a_line(error)}") from error
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
