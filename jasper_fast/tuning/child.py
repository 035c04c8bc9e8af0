"""The process that tunes: `dispatch.tuned` starts `python -m jasper_fast.tuning.child` and reads its output."""

import json
import sys
from collections.abc import Callable
from typing import IO, Any

import torch

from jasper_fast.dispatch import children, tuned
from jasper_fast.tuning import work


def child(source: IO[str] = sys.stdin, tell: Callable[[str, Any], object] = children.tell) -> int:
    """Tunes the cells that `source` lists as JSON, and returns the exit status. Each result is written to the standard
    output as soon as it is known."""
    wanted = json.loads(source.read())
    device = torch.device(wanted["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # lets cuDNN use its fastest algorithm
    how = {name: wanted[name] for name in ("budget", "without", "seconds") if wanted.get(name) is not None}
    with tuned.off():
        work.Tuner(device, tell, **how).run(wanted["cells"])
    return 0


if __name__ == "__main__":
    sys.exit(child())
