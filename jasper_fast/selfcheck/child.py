"""The process that runs kernels: `python -m jasper_fast.selfcheck.child`, which `dispatch.probe` starts and watches.

It prints a line with the plan, then for each check one line when it begins and one with the result, and finally `end`.
If a kernel breaks the CUDA context, the line `fatal` takes the place of that check's result and ends the output.
"""

import json
import sys
from typing import IO

import torch

from jasper_fast.dispatch import children, verdict
from jasper_fast.selfcheck import checks, perform


def child(source: IO[str] = sys.stdin) -> int:
    """Reads a request for checks as JSON from `source`, runs them, and reports on the standard output."""
    wanted = json.loads(source.read())
    device = torch.device(wanted["device"])
    todo = checks.plan(device, **{name: wanted[name] for name in ("quick", "ops", "faces", "dtypes")})
    # Fill new memory with NaN, so that an element that a kernel forgets to write does not show an earlier result.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    probe = torch.ones(64, 64, device=device)
    if not torch.equal(probe @ probe, torch.full_like(probe, 64.0)):
        raise SystemExit(f"PyTorch itself multiplies matrices wrongly on {device}")
    children.tell("plan", [check.plain() for check in todo])
    done = set(wanted["done"])
    for check in [check for check in todo if check.id not in done]:
        children.tell("begin", check.id)
        row = perform.perform(check, device)
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as error:  # this kernel broke the CUDA context, so every later check would fail too
            blamed = verdict.blame(error)
            died = {"status": "died", "detail": str(error).splitlines()[0]}
            children.tell("fatal", row | (died if blamed["status"] == "failed" else blamed))
            return 1
        children.tell("result", row)
    children.tell("end", None)
    return 0


if __name__ == "__main__":
    sys.exit(child())
