"""Keeps the verdicts of the self-check in the user's cache. `backend="auto"` uses a GPU kernel only if its verdict is
good.

A verdict is for one op on one face in one dtype, because each dtype is compiled to a kernel of its own. It is valid
only for the GPU, driver, torch, Triton and sources with which it was made, and is made again after any change. The
cache is the folder `JASPER_FAST_CACHE`, else `$XDG_CACHE_HOME/jasper_fast`, else `~/.cache/jasper_fast`.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch

from jasper_fast import __version__
from jasper_fast.dispatch import probe
from jasper_fast.dispatch.verdict import BAD, GOOD, UNCHECKED, Verdict
from jasper_fast.kernels import files, native, nvrtc, tables

SCHEMA = 2
LOCK_SECONDS = 300.0
DRIVER = Path("/proc/driver/nvidia/version")


@functools.cache
def key(device: torch.device) -> dict[str, str]:
    """Returns the machine and versions for which a verdict on `device` is valid."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {_cpu()}",
        "driver": driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "interpreted": str(os.environ.get("TRITON_INTERPRET") == "1"),
        "jasper_fast": __version__,
        "sources": sources(),
    }


def driver() -> str:
    """Returns the version of the NVIDIA driver, or "unknown"."""
    if DRIVER.is_file() and (
        found := re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", DRIVER.read_text(errors="replace"))
    ):
        return found.group(1)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


@functools.cache
def sources() -> str:
    """Returns a hash of what is checked (kernels, native libraries, NVRTC's sources, ops) and of the checks.

    Tables are not part of it, because every tile in a table was checked when it was measured.
    """
    package, kernels = Path(__file__).parents[1], Path(tables.__file__).parent
    python = *package.glob("selfcheck/*.py"), *package.glob("ops/*.py"), *kernels.rglob("*.py")
    digest = hashlib.sha256()
    compiled = *native._library_dir().glob("*.so"), *nvrtc.sources().glob("*.cuh")
    for path in sorted({p.resolve() for p in (*python, *compiled)}):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    isa = native.cpu().isa() if native.cpu_available() else "no native library"
    return f"{torch.backends.cpu.get_cpu_capability()}, {isa}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def key_hash(device: torch.device, digits: int) -> str:
    """Returns a hash of `key(device)`, by which files in the cache are named."""
    return hashlib.sha256(json.dumps(key(device), sort_keys=True).encode()).hexdigest()[:digits]


def path(device: torch.device) -> Path:
    """Returns the path of the file with the verdicts for `device`."""
    return files.cache() / "verdicts" / f"{key_hash(device, 24)}.json"


def read(device: torch.device) -> dict[tuple[str, str, str], Verdict]:
    """Reads the saved verdicts for `device`, by (op, face, dtype). Without a file the dict is empty. If the file cannot
    be used, the dict is empty too, and a message says why."""
    file = path(device)
    try:
        return _parse(json.loads(file.read_text(encoding="utf-8")), device)
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        say(f"cannot use {file} ({type(error).__name__}: {error}): checking again")
        return {}


def _parse(data: dict, device: torch.device) -> dict[tuple[str, str, str], Verdict]:
    if data["schema"] != SCHEMA or data["key"] != key(device):
        raise ValueError("its verdicts are of another machine or version")
    found = {}
    for values in data["verdicts"]:
        verdict = Verdict(**values)
        wrong = [f.name for f in fields(Verdict) if type(getattr(verdict, f.name)) is not f.type]
        if wrong or verdict.status not in (GOOD, BAD):
            raise ValueError(f"{', '.join(wrong) or 'status'} of a verdict is invalid")
        found[verdict.op, verdict.face, verdict.dtype] = verdict
    return found


def keep(device: torch.device, verdicts: Iterable[Verdict]) -> None:
    """Saves verdicts in the cache file for `device` and in this process. A good verdict of a quick check never replaces
    another verdict.

    An "unchecked" verdict is kept in this process only. If the cache cannot be written, a message says so.
    """
    kept = read(device)
    for verdict in verdicts:
        name = (verdict.op, verdict.face, verdict.dtype)
        if verdict.status != UNCHECKED and (name not in kept or verdict.status == BAD or not verdict.quick):
            kept[name] = verdict
        _memory[device, *name] = verdict if verdict.status == UNCHECKED else kept[name]
    if not kept:
        return
    data = {"schema": SCHEMA, "key": key(device), "verdicts": [asdict(v) for v in kept.values()]}
    file = path(device)
    try:
        files.write(file, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        say(f"cannot save the verdict in {file} ({error}); set JASPER_FAST_CACHE to a folder that can be written")


@contextmanager
def locked(patience: float = LOCK_SECONDS, name: str = "lock") -> Iterator[bool]:
    """Locks out the other processes that share the cache, so that only one rank of a training run checks or tunes.

    Each `name` is a lock of its own. Yields True with the lock in hand, and also where no lock is possible: the cache
    has no folder, or its file system has no locks. If the lock is not free within `patience` seconds, yields False, and
    the block runs without it.
    """
    import fcntl  # is missing on Windows, where Triton is missing too

    try:
        files.cache().mkdir(parents=True, exist_ok=True)
        file = open(files.cache() / name, "w")  # noqa: SIM115
    except OSError:
        yield True  # Without a cache folder there is no result to wait for. `keep` reports the folder.
        return
    with file:
        until, mine = time.monotonic() + patience, False
        while not mine and time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:  # this file system has no locks, so there is nothing to wait for
                mine = True
        yield mine


_memory: dict[tuple, Verdict] = {}


def forget() -> None:
    """Forgets the verdicts in this process, so that the cache is read again."""
    _memory.clear()
    key.cache_clear()
    sources.cache_clear()


def verdict(op: str, face: str, device: torch.device, dtype: str, check: Callable | None = None) -> Verdict:
    """Returns the verdict on `op` (one of `verdict.OPS`) on `face` in `dtype` ("bfloat16"). If none is saved, makes a
    quick check now.

    The check runs in a child process, takes seconds, and prints one line on the standard error. In tests `check(device,
    op, face, dtype) -> Verdict` replaces it.
    """
    name = (device, op, face, dtype)
    if name not in _memory:
        found = read(device).get((op, face, dtype))
        if found is None:
            with locked():
                found = read(device).get((op, face, dtype))  # another process may have checked it meanwhile
                if found is None:
                    found = (check or _check_now)(device, op, face, dtype)
                    keep(device, [found])
        _memory[name] = found
    return _memory[name]


def _check_now(device: torch.device, op: str, face: str, dtype: str) -> Verdict:
    started = time.monotonic()
    what = f"first use of {op} ({face}, {dtype}) on {key(device)['device']}"
    print(f"jasper_fast: {what}: checking it ...", end="", file=sys.stderr, flush=True)
    found = probe.quick_verdict(device, op, face, dtype)
    print(f" {found.status}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def why_not(found: Verdict, device: torch.device, instead: str) -> str:
    """Returns the warning for a kernel that is not used. `instead` says what "auto" uses in its place."""
    what = f"{found.op} ({found.face}, {found.dtype})"
    fault = "could not be checked" if found.status == UNCHECKED else "is WRONG"
    where = f"on {key(device)['device']}: {found.failure}"
    return f"{what} {fault} {where}. {instead}; `jasper-fast selfcheck` shows every kernel"


def say(text: str) -> None:
    """Prints a message on the standard error."""
    print(f"jasper_fast: {text}", file=sys.stderr)
