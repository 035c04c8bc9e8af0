"""Compiles kernels for `python -m bench gpu` in advance: `ahead` starts several processes with this module.

Triton compiles a kernel when a process launches it. This takes seconds, and Triton saves the result on disk, from where
other processes load it. So each process of this module runs jasper_fast once for some of the cases. Errors are ignored,
because they occur again when the case is measured and are reported then.
"""

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


def main(device: str, dtype: str, backend: str, first: str, step: str, *titles: str) -> None:
    """Compiles the kernels of every `step`-th case of the parts `titles`, beginning with case number `first`."""
    run = Collector(
        torch.device(device),
        getattr(torch, dtype),
        backend,
        quick=False,
        results=result_file.Results(Path(os.devnull), {}),
    )
    if run.device.index is not None:
        torch.cuda.set_device(run.device)  # an engine makes streams and graphs on the current device
    for part in agenda.plan(run):
        if part.title in titles:
            part.measure(run)
    for case in run.found[int(first) :: int(step)]:
        with contextlib.suppress(Exception):
            case.contenders[0].build().run()
            devices.synchronize(run.device)


if __name__ == "__main__":
    main(*sys.argv[1:])
