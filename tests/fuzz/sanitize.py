"""Run tests of the ops with the CPU library and the emulated CUDA kernels under AddressSanitizer, UBSan and TSan.

    python tests/fuzz/sanitize.py [address] [thread]

Python and torch are not instrumented, so the runtime of the sanitizer is loaded before them. tests/fuzz/suppressions/
lists which of their reports are ignored, and why. The leak check is off, because Python does not free its memory at
exit.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPRESSIONS = ROOT / "tests" / "fuzz" / "suppressions"
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
# For both sanitizers: tests of everything that kernels do with memory, but none that start a process with the usual
# library.
TESTS = {
    "address": (
        [
            "tests/test_bn_relu_dropout.py",
            "tests/test_cuda_emulated.py",
            "tests/test_panes.py",
            "tests/test_prefix_beam.py",
            "tests/test_lm_train.py",
        ],
        "cpu or emulated or definition or cleared",
    ),
    "thread": (
        ["tests/test_bn_relu_dropout.py", "tests/test_cuda_emulated.py", "tests/test_cuda_ptx.py"],
        "cpu or cut or any_order",
    ),
}
LEVELS = {"address": ("",), "thread": ("",)}  # JASPER_FAST_ISA; "" is the best of this machine


def environment(kind: str, level: str) -> dict[str, str]:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    where = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
             for name in (RUNTIME[kind], "libstdc++.so.6")]  # fmt: skip
    return os.environ | {
        # libstdc++ too: the runtime looks for __cxa_throw when it starts, before torch brings it
        "LD_PRELOAD": " ".join(where),
        "JASPER_FAST_LIB": str(ROOT / "build" / "sanitize" / kind),
        "JASPER_FAST_SANITIZE": kind,
        "JASPER_FAST_ISA": level,
        "OMP_NUM_THREADS": "1" if kind == "address" else "3",
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"halt_on_error=1:ignore_noninstrumented_modules=1:suppressions={SUPPRESSIONS / 'thread.txt'}",
    }


def main() -> None:
    start, failed = time.monotonic(), []
    for kind in sys.argv[1:] or RUNTIME:
        subprocess.run([sys.executable, str(ROOT / "csrc/build.py"), "--sanitize", kind], check=True)
        tests, chosen = TESTS[kind]
        for level in LEVELS[kind]:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
            if kind == "thread":  # without address randomisation, with which this runtime may fail to start
                command = ["setarch", platform.machine(), "-R", *command]
            code = subprocess.call([*command, *tests], cwd=ROOT, env=environment(kind, level))
            print(f"sanitize: {kind}, instruction set {level or 'of this machine'}: {'failed' if code else 'clean'}")
            failed += [kind] if code else []
    print(f"sanitize: {time.monotonic() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
