"""The process that tunes: `python -m jasper_fast.tuning.child`, which `dispatch.tuned` starts and listens to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import IO, Any

import torch

from jasper_fast.dispatch import children, tuned
from jasper_fast.tuning import work


def child(source: IO[str] = sys.stdin, tell: Callable[[str, Any], object] = children.tell) -> int:
    """Reads the cells to tune as JSON from `source`, and writes each result to the standard output as soon as it is
    known; returns the exit status."""
    wanted = json.loads(source.read())
    device = torch.device(wanted["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # cuDNN contends with its fastest algorithm
    how = {name: wanted[name] for name in ("budget", "without", "seconds") if wanted.get(name) is not None}
    with tuned.off():
        work.Tuner(device, tell, **how).run(wanted["cells"])
    return 0


if __name__ == "__main__":
    sys.exit(child())
