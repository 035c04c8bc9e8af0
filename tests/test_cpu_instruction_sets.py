"""Runs tests of the CPU faces with each instruction set that is lower than the machine's best.

The other test files run with the best one. A process chooses its instruction set when it loads the library, so each set
needs a process of its own.
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jasper_fast.kernels import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native.cpu_available(), reason=str(native.explain()["cpu"])),
]
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
FILES = ("bn_cpu", "bn_relu_dropout", "conv1d", "conv1d_16bit", "depthwise", "panes")
# Selects tests of the CPU face's results. Tests of autograd and of arguments are left out: they run no other kernels.
WORDS = "(bn_cpu or conv1d or cpu) and not (is_conv1d or librarys or arguments or engine or aten or opcheck or triton)"
CHILD = """
import sys
import pytest
from jasper_fast.kernels import native
level, *arguments = sys.argv[1:]
assert native.cpu().isa() == level
sys.exit(pytest.main(arguments))
"""


def run(level: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs pytest with these arguments in a process with instruction set `level`."""
    env = os.environ | {"JASPER_FAST_ISA": level, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, level, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    best = native.cpu().isa()
    if LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip(f"the other tests run with {best}, the best that this machine has")
    done = run(level, *(f"tests/test_{name}.py" for name in FILES), "-k", WORDS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run("sse9")
    assert done.returncode != 0
    assert "JASPER_FAST_ISA=sse9" in done.stderr
    assert "generic, avx2, avx512 or avx512_bf16" in done.stderr
