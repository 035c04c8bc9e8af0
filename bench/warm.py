"""Compiles what `python -m bench gpu` is about to run, in several processes, while it checks kernels.

Triton compiles a kernel in seconds, one after another, in the process that first launches it, and keeps it on disk for
all others. So each of these processes runs our contender of some of the cases once. What fails here fails again, and is
told, where it is measured.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import harness
from bench.harness import Case, Run
from bench.machine import ROOT

SPARE = 5.0  # seconds before the deadline at which those that still compile are ended


@dataclass
class Collector(Run):
    """A run that measures nothing: it keeps the cases that it is asked to measure."""

    found: list[Case] = field(default_factory=list)

    def cases(self, title: str, cases: Sequence[Case]) -> list[dict]:
        """Keep them."""
        self.found += cases
        return []


@contextlib.contextmanager
def compilers(run: Run, titles: Sequence[str]) -> Iterator[None]:
    """While the body runs, and as long after it as the deadline allows, others compile for the parts `titles`."""
    count = max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    name = str(run.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "bench.warm", str(run.device), name, run.backend, *titles]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    children = [subprocess.Popen([*command, "--take", f"{i},{count}"], cwd=ROOT, **quiet) for i in range(count)]
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
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: nobody waits for it
                child.wait(max(0.0, end - time.monotonic()))


def main(arguments: list[str] | None = None) -> int:
    """One of the processes."""
    from bench import gpu

    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("device", "dtype", "backend"):
        parser.add_argument(name)
    parser.add_argument("titles", nargs="+")
    parser.add_argument("--take", default="0,1", metavar="I,N", help="every Nth case from the Ith on")
    args = parser.parse_args(arguments)
    results, device = harness.Results(Path(os.devnull), {}), torch.device(args.device)
    if device.index is not None:  # an engine's streams and graphs are the current device's
        torch.cuda.set_device(device)
    run = Collector(device, getattr(torch, args.dtype), args.backend, False, results)
    for part in gpu.plan(run):
        if part.title in args.titles:
            part.measure(run)
    first, step = (int(v) for v in args.take.split(","))
    for case in run.found[first::step]:
        with contextlib.suppress(Exception):
            case.contenders[0].build().run()
            harness.synchronize(run.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
