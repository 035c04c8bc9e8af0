"""Checks before a run that the machine has what the run needs, and prints how to get each missing item."""

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from jasper_fast.bench.harness import nvml
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.run import Run
from jasper_fast.kernels import files, native

DISK, MEMORY = 2.0, 16.0  # GiB that must be free; on a small GPU 80 % of its memory is enough


class Finding(NamedTuple):
    """An item that is needed: whether it is there, what was found, and the remedy if it is missing."""

    what: str
    there: bool
    found: str
    remedy: str

    def line(self) -> str:
        """Returns the finding as one line of text."""
        about = f"{self.what}: {self.found}"
        return f"ok: {about}" if self.there else f"MISSING: {about}. Do: {self.remedy}"


def findings(device: torch.device) -> Iterator[Finding]:
    """Yields a finding for each item that a run on `device` needs."""
    yield _compiler()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    yield Finding("Python's headers", headers.is_file(), str(headers), "install python3-dev (Triton compiles C code)")
    yield from _folders()
    if device.type == "cuda":
        yield from _gpu(device)
        why = native.explain()["cuda"]
        yield Finding(
            "the CUDA library",
            why is None,
            (why or "built").splitlines()[0],
            "CUDA_HOME=/usr/local/cuda python setup.py build_native",
        )


def _compiler() -> Finding:
    """Returns the finding about the C compiler, which Triton needs to build its launcher."""
    name = os.environ.get("CC") or next((c for c in ("gcc", "clang", "cc") if shutil.which(c)), "")
    path = shutil.which(name.split()[0]) if name else None
    return Finding("a C compiler", path is not None, path or name or "none", "install gcc, or name a compiler in CC")


def _folders() -> Iterator[Finding]:
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    for what, folder, variable in (
        ("kernels", triton, "TRITON_CACHE_DIR"),
        ("choices", files.cache(), "JASPER_FAST_CACHE"),
        ("compilers", Path(tempfile.gettempdir()), "TMPDIR"),
    ):
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free, writable = shutil.disk_usage(there).free / 2**30, os.access(there, os.W_OK)
        yield Finding(
            f"disk for {what}",
            writable and free >= DISK,
            f"{folder}, {free:.1f} GiB free" + ("" if writable else ", not writable"),
            f"set {variable} to a writable folder with {DISK:.0f} GiB free",
        )


def _gpu(device: torch.device) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield Finding(
            "a GPU",
            False,
            f"torch {torch.__version__}, {built}",
            "install a torch for CUDA, and a driver that supports it (see nvidia-smi)",
        )
        return
    newest, built = nvml.cuda_driver(), torch.version.cuda
    yield Finding(
        "the driver",
        # A driver also runs programs that were built for a newer minor version of the same major version of CUDA.
        newest is None or built is None or int(newest.split(".")[0]) >= int(built.split(".")[0]),
        f"supports CUDA {newest or 'unknown'}, torch is built for {built}",
        "update the NVIDIA driver, or install a torch for an older CUDA",
    )
    free, whole = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    yield Finding(
        "free memory",
        free >= min(MEMORY, 0.8 * whole),
        f"{free:.1f} of {whole:.1f} GiB",
        "end the processes that use the GPU (see nvidia-smi)",
    )
    clocks = nvml.read(device)
    limits = ", ".join(clocks.get("held_by") or ())
    speed = f"{clocks.get('sm_mhz', 'unknown')} MHz, {clocks.get('temperature_c', 'unknown')} degrees"
    yield Finding(
        "clocks",
        not limits,
        f"{speed}: {limits}" if limits else speed,
        "let the GPU cool; nvidia-smi -q -d PERFORMANCE says what limits its clock",
    )


def main(run: Run) -> None:
    """Prints a line for each item and adds them to the result.

    A missing item does not end the run, because other parts may still work.
    """
    found = list(findings(run.device))
    for one in found:
        console.print(f"preflight: {one.line()}", soft_wrap=True, style=None if one.there else "red")
    run.results.data["preflight"] = [one._asdict() for one in found]
    run.results.write()
