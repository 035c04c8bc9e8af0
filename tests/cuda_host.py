"""Builds CUDA kernels as host C++ with the emulation in csrc/cuda/emulate: libraries, and programs for sanitizers.

Both are written to build/emulated; those of a copy of the sources are written beside the copy. Their names contain a
hash of everything that goes into them, so test files and parallel processes share each build.
"""

import fcntl
import functools
import hashlib
import os
import platform
import runpy
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ENGINE = [
    CSRC / "cuda/emulate" / name for name in ("engine.cpp", "grids.cpp", "memory.cpp", "barriers.cpp", "products.cpp")
]
BUILT = ROOT / "build" / "emulated"
# -Wno-restrict: GCC 12 wrongly reports an overlap in "a" + std::string
FLAGS = [
    "-std=c++20", "-fPIC", "-pthread", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-Wno-restrict",
    "-Wno-unknown-warning-option",
]  # fmt: skip


@functools.cache
def toolchain() -> tuple[str, list[str], dict[str, str]]:
    """Returns the host compiler, the flags for CUDA's headers and the sanitizers' flags.

    Skips the test if there is no CUDA toolkit or no compiler.
    """
    build = runpy.run_path(str(CSRC / "build.py"))
    nvcc = build["find_nvcc"]()
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if nvcc is None or compiler is None:
        pytest.skip("needs the CUDA toolkit's headers (nvcc) and a C++ compiler")
    line = subprocess.run([nvcc, "-dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    include = dict.fromkeys(word.strip('"') for word in line.split() if word.strip('"').startswith("-I"))
    include = [flag.replace("-I", "-isystem", 1) for flag in include if flag != "-I."]
    return compiler, [*include, f"-I{CSRC}", f"-I{CSRC / 'cuda'}", f"-I{CSRC / 'cuda/emulate'}"], build["SANITIZE"]


@functools.cache
def digest(folder: Path) -> str:
    """Returns a hash of every source in `folder` that a kernel may include, and of the processor's features.

    The emulation is compiled with -march=native, so it depends on those features.
    """
    text = hashlib.sha256(platform.machine().encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            text.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text.update(next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").encode())
    return text.hexdigest()


def build(
    sources: Sequence[Path],
    defines: Sequence[str] = (),
    sanitize: str | None = None,
    program: bool = False,
    scheduler: Sequence[str] = (),
    folder: Path = CSRC,
) -> Path:
    """Builds these sources with the emulation into a library or a program, unless it exists, and returns its path.

    `defines` are further flags for `sources`, and `scheduler` are further flags for engine.cpp. `sanitize` is "address"
    or "thread"; its default is the value of JASPER_FAST_SANITIZE (see tests/fuzz/sanitize.py). `folder` holds the
    headers of the sources: csrc, or a copy with a mistake in it. What is built from a copy is written beside it.
    """
    compiler, include, sanitizers = toolchain()
    sanitize = sanitize or os.environ.get("JASPER_FAST_SANITIZE") or None
    native = ["-march=native"] if platform.machine().lower() in ("x86_64", "amd64") else []
    checks = [*sanitizers[sanitize].split(), "-g1", "-fno-omit-frame-pointer"] if sanitize else []
    # Of the engine, ThreadSanitizer must see only what the engine reports itself (csrc/cuda/emulate/sanitizers.h).
    seen = ["-DJF_TSAN", "-g1"] if sanitize == "thread" else checks
    engine = [*FLAGS, "-O1" if sanitize else "-O3", *native, *seen]
    kernels = [*FLAGS, "-O1", "-DJF_EMULATE", *checks, *defines]
    into = BUILT if folder == CSRC else folder.parent
    objects = [
        compiled(compiler, ENGINE[0], [*engine, *scheduler, *include]),
        *(compiled(compiler, path, [*engine, *include]) for path in ENGINE[1:]),
        *(compiled(compiler, path, [*kernels, *include], folder, into) for path in sources),
    ]
    link = [compiler, "-pthread", *checks, *([] if program else ["-shared"])]
    name = hashlib.sha256("\0".join([*link, *map(str, objects)]).encode()).hexdigest()[:24]
    target = into / f"{sources[-1].stem}-{name}{'' if program else '.so'}"
    return made(target, [*link, *map(str, objects)])


def compiled(compiler: str, source: Path, flags: list[str], folder: Path = CSRC, into: Path = BUILT) -> Path:
    text = hashlib.sha256("\0".join([compiler, *flags, digest(folder / "cuda")]).encode() + source.read_bytes())
    return made(into / f"{source.stem}-{text.hexdigest()[:24]}.o", [compiler, *flags, "-c", str(source)])


def made(target: Path, command: list[str]) -> Path:
    """Runs `command` with `-o target` unless the target exists. A lock lets only one process at a time build it."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_name(f"part-{target.name}")
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-8000:]}"
            part.rename(target)
    return target


def run_sanitized(program: Path, sanitize: str, *arguments: str) -> str:
    """Runs a program built with `sanitize`; returns its output, reports of the sanitizer included."""
    # no check for leaks, because a launch that fails does not free the stacks of its threads
    options = "detect_leaks=0" if sanitize == "address" else "halt_on_error=1"
    environment = os.environ | {"ASAN_OPTIONS": options, "TSAN_OPTIONS": options}
    environment.pop("LD_PRELOAD", None)
    # setarch -R: ThreadSanitizer's runtime can fail if addresses are randomised
    command = ["setarch", platform.machine(), "-R", str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done.stdout + done.stderr
