"""One check: calls a kernel on two sets of inputs, compares the results with fp64, and repeats the first call.

Results must be within the tolerance of tests and benchmarks (`tolerance.py`: twice the error of plain PyTorch at the
same precision, plus a floor). The repeated call must return the same bits. Padding that a kernel must not read holds
NaN. Kernels are called as dispatch calls them. For example, `clean` promises Triton's convs that the padding of x is
zero.
"""

import contextlib
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from jasper_fast.dispatch import backends
from jasper_fast.dispatch.verdict import PlainPyTorchFailed, blame, in_a_line
from jasper_fast.kernels import precision, tables
from jasper_fast.selfcheck.cases import Case, case
from jasper_fast.selfcheck.checks import EXACT, WAVE, Check
from jasper_fast.selfcheck.tolerance import Compared, Tolerance, compare

FLOOR = 40.0  # in fp32 roundings: sums of 10,000 products in two orders differ by about 20 of them
# The floor (relative error) for fp32 convs where PyTorch may use TF32. Our kernels truncate inputs to TF32, so each is
# too small by up to one unit of TF32 (2**-10). A product of two inputs is too small by about 0.7 units on average, and
# this bias does not average out in a sum. PyTorch's error cannot set the limit, because cuDNN may choose a kernel
# without TF32.
TF32 = 4 * 2.0**-10


def perform(check: Check, device: torch.device) -> dict[str, Any]:
    """Runs `check` and returns its description with its status and errors.

    The status is "ok", "wrong", "failed", "no memory" or "environment". "environment" means that this machine
    lacks something that the kernel needs, and `detail` says what to do. `ours` and `theirs` are the relative errors of
    our and plain PyTorch's result in the tensor that came nearest to its limit (if the status is "wrong", in the first
    wrong tensor). `share` is our error divided by that limit.
    """
    started = time.perf_counter()
    row = check.plain() | {"status": "ok", "ours": None, "theirs": None, "share": None, "detail": ""}
    try:
        with precision.fp32("ieee" if EXACT in check.variant.split() else None):
            found = _compare_all(check, device)
    except Exception as error:  # whatever a kernel raises is the result of its check
        found = blame(error)
    return row | found | {"seconds": round(time.perf_counter() - started, 3)}


def _compare_all(check: Check, device: torch.device) -> dict[str, Any]:
    cases = [case(check, device, seed) for seed in (1, 2)]
    worst = Compared(-1.0)
    first: dict[str, Tensor] = {}
    tolerance = Tolerance(floor=_floor(check, device))
    for drawn in cases:
        got = {name: out.detach().clone() for name, out in _ours(check, drawn).items()}
        first = first or got
        try:
            low, ref = drawn.low(), drawn.reference()
        except Exception as error:
            raise PlainPyTorchFailed(f"plain PyTorch: {in_a_line(error)}") from error
        if missing := ref.keys() ^ got.keys():
            return {"status": "wrong", "detail": f"results differ: {', '.join(sorted(missing))}"}
        for name in ref:
            compared = compare(got[name], low[name], ref[name], tolerance)
            if not compared.right:
                return asdict(compared) | {"status": "wrong", "detail": f"{name}: {compared.detail}"}
            worst = max(worst, compared, key=lambda found: found.share)
    for _ in range(2 if check.variant == WAVE else 1):
        for name, out in _ours(check, cases[0]).items():
            if not torch.equal(out, first[name]):
                return {"status": "wrong", "detail": f"{name}: a second call on the same inputs gave other results"}
    return asdict(worst) | {"detail": ""}


def _ours(check: Check, drawn: Case) -> dict[str, Tensor]:
    with tables.forced(f"conv1d.{check.function}", check.tile) if check.tile else contextlib.nullcontext():
        return drawn.ours()


def _floor(check: Check, device: torch.device) -> float:
    """Returns the error, in fp32 roundings, that is allowed even if PyTorch's own error is zero."""
    rounds = check.dtype == "float32" and device.type == "cuda" and check.op in ("conv1d", "conv1d.fused")
    if rounds and backends.face("conv1d", check.face).takes_tf32():
        return TF32 / torch.finfo(torch.float32).eps
    return FLOOR
