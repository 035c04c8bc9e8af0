"""Runs tests of the ops with the CPU library and the emulated CUDA kernels under AddressSanitizer, UBSan and TSan.

    python tests/fuzz/sanitize.py [address] [thread]

Python and torch are not instrumented, so the sanitizer's runtime is preloaded. The files in tests/fuzz/suppressions/
list the reports about Python and torch that are ignored, and why. The leak check is off, because Python does not free
its memory at exit.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPRESSIONS = ROOT / "tests" / "fuzz" / "suppressions"
# What each sanitizer must report about its fault in planted.cpp.
PLANTED = {
    "address": {"address": "AddressSanitizer: heap-buffer-overflow", "undefined": "signed integer overflow"},
    "thread": {"thread": "ThreadSanitizer: data race"},
}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
# The tests that are run, by file and by words in their names. They reach everything that a kernel does with memory. The
# opcheck tests, and the tests of all instruction sets but the lowest, would take most of the time and reach no more.
NAMES = (
    "bn_relu_dropout", "cuda_emulated", "cuda_ptx", "panes", "conv1d", "conv1d_16bit", "depthwise", "prefix_beam",
    "lm_train", "novograd", "cpu_instruction_sets",
)  # fmt: skip
FILES = [f"tests/test_{name}.py" for name in NAMES]
_CONV = "test_conv1d and (test_forward or test_backward or fused_epilogue or any_threads or products_of or transposed)"
TESTS = {
    "address": f"(cpu or emulated or definition or cleared or ({_CONV}) or history) and not opcheck "
    "and (generic or not instruction_set)",
    "thread": "(bn_relu_dropout and cpu) or cut or any_order or (test_panes and cpu and not opcheck and not "
    "instruction_set) or (test_conv1d and (any_threads or fused_epilogue or history)) or number_of_threads",
}


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("c++")


def alone(kind: str) -> list[str]:
    """Returns a command prefix that switches off address randomisation, because TSan's runtime can fail with it."""
    return ["setarch", platform.machine(), "-R"] if kind == "thread" else []


def environment(kind: str) -> dict[str, str]:
    where = [subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True).strip()
             for name in (RUNTIME[kind], "libstdc++.so.6")]  # fmt: skip
    return os.environ | {
        # libstdc++ is preloaded as well: at its start, before torch is loaded, the runtime looks for __cxa_throw.
        "LD_PRELOAD": " ".join(where),
        "JASPER_FAST_LIB": str(ROOT / "build" / "sanitize" / kind),
        "JASPER_FAST_SANITIZE": kind,
        "JASPER_FAST_ISA": "",  # the best instruction set of this machine
        "OMP_NUM_THREADS": "1" if kind == "address" else "3",
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"halt_on_error=1:ignore_noninstrumented_modules=1:suppressions={SUPPRESSIONS / 'thread.txt'}",
    }


def blind(kind: str, folder: Path) -> list[str]:
    """Builds planted.cpp in `folder`; returns those of its faults that the sanitizers of `kind` do not report."""
    flags = runpy.run_path(str(ROOT / "csrc/build.py"))["SANITIZE"][kind].split()
    source, library = Path(__file__).with_name("planted.cpp"), folder / "planted.so"
    how = ["-shared", "-fPIC", "-std=c++20", "-O1", "-g1", "-fvisibility=hidden", "-pthread"]
    subprocess.run([compiler(), *how, *flags, str(source), "-o", str(library)], check=True)
    missed = []
    for fault, report in PLANTED[kind].items():
        command = [*alone(kind), sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).{fault}()"]
        done = subprocess.run(command, env=environment(kind), capture_output=True, text=True)
        missed += [] if done.returncode and report in done.stderr else [f"{fault}: {done.stderr[-2000:]}"]
    return missed


def main() -> None:
    start, failed = time.monotonic(), []
    for kind in sys.argv[1:] or RUNTIME:
        subprocess.run([sys.executable, str(ROOT / "csrc/build.py"), "--sanitize", kind], check=True)
        if missed := blind(kind, ROOT / "build" / "sanitize" / kind):
            sys.exit("sanitize: the sanitizers do not see a planted fault: " + "; ".join(missed))
        print(f"sanitize: {kind}: {' and '.join(PLANTED[kind])}: planted faults are seen")
        pytest = ["pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", TESTS[kind], *FILES]
        code = subprocess.call([*alone(kind), sys.executable, "-m", *pytest], cwd=ROOT, env=environment(kind))
        print(f"sanitize: {kind}: {'failed' if code else 'clean'}")
        failed += [kind] if code else []
    print(f"sanitize: {time.monotonic() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
