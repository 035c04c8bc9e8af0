"""Compiles kernels for `python -m bench gpu` in advance: `ahead` starts several processes with this module.

Triton compiles a kernel in the process that first launches it, which takes seconds, and saves it on disk for other
processes. So each of these processes runs our contender once for some of the cases. Errors are ignored here. They occur
again when the case is measured, and are reported then.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from jasper_fast.bench.gpu import agenda
from jasper_fast.bench.harness import devices, result_file
from jasper_fast.bench.harness.case import Case
from jasper_fast.bench.harness.run import Run


@dataclass
class Collector(Run):
    """A run that collects its cases and measures nothing."""

    found: list[Case] = field(default_factory=list)

    def cases(self, title: str, cases: Sequence[Case]) -> list[dict]:
        """Adds the cases to `found`."""
        self.found += cases
        return []


def main(arguments: list[str] | None = None) -> int:
    """Compiles the kernels of some cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("device", "dtype", "backend"):
        parser.add_argument(name)
    parser.add_argument("titles", nargs="+")
    parser.add_argument("--take", default="0,1", metavar="I,N", help="compile every Nth case from the Ith on")
    args = parser.parse_args(arguments)
    results, device = result_file.Results(Path(os.devnull), {}), torch.device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # an engine makes streams and graphs on the current device
    run = Collector(device, getattr(torch, args.dtype), args.backend, False, results)
    for part in agenda.plan(run):
        if part.title in args.titles:
            part.measure(run)
    first, step = (int(v) for v in args.take.split(","))
    for case in run.found[first::step]:
        with contextlib.suppress(Exception):
            case.contenders[0].build().run()
            devices.synchronize(run.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
