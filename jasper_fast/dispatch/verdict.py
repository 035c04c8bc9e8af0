"""Makes verdicts on kernels from the results of checks, and tells errors of a kernel from errors of the machine."""

import datetime
import errno
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

GOOD, BAD, UNCHECKED = "good", "bad", "unchecked"
# Each op has a verdict per face and dtype.
OPS = ("bn_relu_dropout", "conv1d", "conv1d.fused", "depthwise", "panes", "novograd", "ctc")
FACES = ("cpu", "triton", "cuda", "aten")  # "aten" is for the panes, which use ATen's matrix products
FAULTS = ("wrong", "failed", "died", "hung")  # statuses of a check that are the kernel's fault
OPEN = ("no memory", "environment", "skipped")  # statuses of a check that could not be made


@dataclass(frozen=True)
class Verdict:
    """What the self-check found for one op on one face in one dtype ("bfloat16").

    status: "good", "bad", or "unchecked" if the check itself could not run (no memory, no compiler). quick: only the
    quick check was made, which takes seconds. checked: the number of checks that passed. failure: the first fault and
    its kernel, or why a check could not run.
    """

    op: str
    face: str
    dtype: str
    status: str
    quick: bool
    checked: int
    failure: str = ""
    date: str = ""


class PlainPyTorchFailed(RuntimeError):
    """Plain PyTorch, with which a kernel is compared, failed. This does not count against the kernel. If the kernel
    caused it, the next synchronisation with the device raises the kernel's error, and that counts."""


# (text of an error, what to do about it), for errors that are the machine's fault
FIXES = (
    ("failed to find c compiler", "Triton compiles its launcher in C: install a C compiler (gcc), or set CC to one"),
    ("cannot find ptxas", "Triton's ptxas is missing: reinstall triton, or set TRITON_PTXAS_PATH to one"),
    ("is not defined for option 'gpu-name'", "ptxas is older than this GPU: update triton, or unset TRITON_PTXAS_PATH"),
    ("unsupported .version", "ptxas is older than Triton: update triton, or unset TRITON_PTXAS_PATH"),
    ("libcuda.so cannot found", "Triton finds no libcuda.so of the driver: run ldconfig, or set TRITON_LIBCUDA_PATH"),
    ("could not create or locate cache dir", "set TRITON_CACHE_DIR to a folder that can be written"),
    ("no space left on device", "free space in TRITON_CACHE_DIR (default ~/.triton/cache) and TMPDIR, or set them"),
    ("no kernel image is available", "the CUDA library is not built for this GPU: see JASPER_FAST_CUDA_ARCHS"),
    ("busy or unavailable", "another process uses the GPU exclusively: see nvidia-smi"),
    ("driver version is insufficient", "update the NVIDIA driver"),
)
# fixes by the type of the error, used if no text in FIXES fits
FIXES_OF_KINDS = (
    (subprocess.SubprocessError,  # the C compiler failed; if ptxas fails, it is a PTXASError
     "Triton compiles its launcher in C: it needs gcc, Python's headers (python3-dev) and space in TMPDIR"),
    ((OSError, ImportError),  # not the kernel's fault: a kernel uses no files
     "this user must be allowed to read and run the files of Triton, and to write its cache"),
    (PlainPyTorchFailed, "without its result the kernel cannot be checked"),
)  # fmt: skip
NO_MEMORY = ("out of memory", "alloc_failed", "cannot allocate memory")
FREE_MEMORY = "another process may use the memory: look at nvidia-smi, and try again when memory is free"


def blame(error: BaseException) -> dict[str, str]:
    """Returns status and detail of a check that raised `error`. The status says whether the kernel is at fault."""
    text = str(error)
    detail = text if isinstance(error, PlainPyTorchFailed) else in_a_line(error)
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(m in text.lower() for m in NO_MEMORY):
        return {"status": "no memory", "detail": f"{detail} ({FREE_MEMORY})"}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += " no space left on device"
    fixes = [fix for what, fix in FIXES if what in text.lower()]
    fixes += [fix for kind, fix in FIXES_OF_KINDS if isinstance(error, kind)]
    if not fixes:
        return {"status": "failed", "detail": detail}
    return {"status": "environment", "detail": f"{detail} ({fixes[0]})"}


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def group_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the key of the verdict to which a row belongs: op, face and dtype."""
    return row["op"], row["face"], row["dtype"]


def judge(rows: Sequence[dict[str, Any]], quick: bool) -> list[Verdict]:
    """Makes one verdict for each op, face and dtype among `rows`."""
    found: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        found.setdefault(group_of(row), []).append(row)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = []
    for group, of in found.items():
        faults = [row for row in of if row["status"] in FAULTS]
        open_ = [row for row in of if row["status"] in OPEN]
        status = BAD if faults else UNCHECKED if open_ else GOOD
        checked = sum(row["status"] == "ok" for row in of)
        failure = failure_of([*faults, *open_][0]) if faults or open_ else ""
        made.append(Verdict(*group, status, quick, checked, failure, now))
    return made


def failure_of(row: dict[str, Any]) -> str:
    """Describes a failed row in words: the kernel, its inputs, and what happened."""
    what = " ".join(filter(None, (row["function"], row["variant"], row["configuration"], row["shape"], row["dtype"])))
    return f"{row['op']} {what} {row['status']}: {row['detail']}"
