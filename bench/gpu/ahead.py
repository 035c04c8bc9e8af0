"""Starts and ends the processes that compile kernels in advance. Each process runs the module `warm`."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from jasper_fast.bench.harness import paths
from jasper_fast.bench.harness.run import Run

SPARE = 5.0  # the compiling processes are ended this many seconds before the deadline


@contextlib.contextmanager
def compilers(run: Run, titles: Sequence[str]) -> Iterator[None]:
    """A context in which other processes compile the kernels of the parts `titles`.

    The end of the context waits for these processes, until shortly before the deadline of the run.
    """
    count = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    command = [sys.executable, "-m", "jasper_fast.bench.gpu.warm", str(run.device), run.dtype_name, run.backend]
    children = [
        subprocess.Popen(
            [*command, str(i), str(count), *titles], cwd=paths.CHECKOUT,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for i in range(count)
    ]  # fmt: skip
    try:
        yield
        for child in children:
            left = None if run.deadline is None else max(0.0, run.deadline - SPARE - time.monotonic())
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(left)
    finally:
        for child in children:
            child.kill()
        end = time.monotonic() + SPARE
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process may hang in the driver
                child.wait(max(0.0, end - time.monotonic()))
