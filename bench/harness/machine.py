"""Describes what is needed to repeat a result: the hardware, the versions, the commit and the command."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from jasper_fast.bench.harness import nvml, paths
from jasper_fast.kernels import likeness, native

ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")
# Matches the distributions whose versions are recorded, such as cupy-cuda13x and nvidia-cudnn-frontend.
PACKAGES = re.compile(
    r"(torch|pytorch-triton|triton|numpy)$|(cuda|cupy|nvidia|onnx|openvino|tensorrt|torch-tensorrt)(-|script|runtime|$)"
)


def describe(device: torch.device) -> dict:
    """Returns the hardware, versions, commit and command of this run, ready for JSON."""
    return {
        "name": name(device),
        "device": str(device),
        "cpu": _cpu(),
        "gpu": _gpu(device),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages(),
        "compilers": compilers(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "commit": commit(),
        "dirty": _git("status", "--porcelain", "--untracked-files=no") not in ("", None),
        "environment": {
            k: v for k, v in os.environ.items() if re.match(r"(OMP|MKL|JASPER_FAST|TORCH|CUDA|TRITON)_", k)
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
    }


def name(device: torch.device) -> str:
    """Returns the short name of the machine: its GPU, or its CPU and the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = _cpu()
    return f"{cpu['name']}, {cpu['cores']} cores"


def command() -> str:
    """Returns the command line as one would type it in the root of the repository, without torchrun."""
    if "bench" in Path(sys.argv[0]).parts:
        return " ".join(filter(None, [paths.COMMAND, shlex.join(sys.argv[1:])]))
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def commit() -> str | None:
    """Returns the commit of the checkout. Without a .git folder it returns $JASPER_FAST_COMMIT, or None."""
    return _git("rev-parse", "--short=10", "HEAD") or os.environ.get("JASPER_FAST_COMMIT") or None


def clocks(device: torch.device) -> dict:
    """Returns the clock rates, temperature, power and load, as far as this machine reports them."""
    if device.type == "cuda":
        return nvml.read(device)
    mhz = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.MULTILINE)
    millidegrees = _read("/sys/class/thermal/thermal_zone0/temp").strip()
    return {
        **({"cpu_mhz": [round(float(m)) for m in mhz]} if mhz else {}),
        **({"temperature_c": int(millidegrees) / 1000} if millidegrees.lstrip("-").isdigit() else {}),
        **({"load_average": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}),
    }


@functools.cache
def packages() -> dict[str, str]:
    """Returns the versions of installed packages that affect results: PyTorch, Triton, rivals, NVIDIA's libraries."""
    found: dict[str, str] = {}
    # Distributions are listed in the order of sys.path. If two have the same name, Python imports the first.
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if PACKAGES.match(name):
            found.setdefault(name, distribution.version)
    return dict(sorted(found.items()))


@functools.cache
def compilers() -> dict[str, str]:
    """Returns the versions of the compilers: the ptxas that Triton runs, nvcc, the C++ compiler of torch.compile."""
    found = {}
    with contextlib.suppress(ImportError, OSError, RuntimeError):  # there is no Triton, or no ptxas
        from triton import knobs

        found["ptxas"] = knobs.nvidia.ptxas.version
    nvcc = _run(
        shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"), "--version"
    )
    if version := re.search(r"release [\d.]+, V([\d.]+)", nvcc or ""):
        found["nvcc"] = version[1]
    cxx = os.environ.get("CXX") or next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if cxx and (version := _run(*shlex.split(cxx), "--version")):
        found["c++"] = version.splitlines()[0]
    return found


def _cpu() -> dict:
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": native.cpu_name(),
        "cores": cores,
        "isa": [f for f in ISA_FLAGS if f in have],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
    }


def _gpu(device: torch.device) -> dict | None:
    if device.type != "cuda":
        return None
    p = torch.cuda.get_device_properties(device)
    return {
        "name": p.name,
        "capability": f"sm_{p.major}{p.minor}",
        "sm_count": p.multi_processor_count,
        "bandwidth": likeness.header(likeness.traits(device.index or 0))["bandwidth"],
        "memory_gib": round(p.total_memory / 2**30, 1),
        "l2_mib": round(p.L2_cache_size / 2**20, 1),
        "driver": nvml.driver(),
        "cuda_of_driver": nvml.cuda_driver(),
        "clocks_at_start": clocks(device),
    }


def _git(*args: str) -> str | None:
    return _run("git", "-C", str(paths.CHECKOUT), *args) if paths.CHECKOUT else None


def _run(*args: str) -> str | None:
    try:
        return subprocess.run(args, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # the program is missing, fails or takes too long


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
