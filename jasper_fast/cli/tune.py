"""`jasper-fast tune`: measure which kernels are fastest for a model on this GPU, and save the choice.

Measures on this GPU which implementation and tile of each op is fastest at the shapes of a model, and saves the choice
on disk for backend="auto". The first use of a model makes the same measurements. This command makes them in advance,
for all batches that you name. Our own implementations are compared with fp64 before they are timed. Shapes that were
measured before are skipped. If the command is interrupted, the finished shapes are kept, and the same command
continues. JASPER_FAST_TUNE=0 turns off the tuning at first use, but not this command.
"""

import argparse
import importlib.resources
import sys
import time
from typing import Any

from jasper_fast.cli import common
from jasper_fast.options import option

END = """\
exit status: 0 if all shapes are measured, 4 if the budget ran out first, 2 for a wrong command or if tuning failed.

example: jasper-fast tune --dtype bf16 --batches 1:2 1:16.7 32:16.7 --for inference --budget 120"""
BATCHES = ["32:16.7", "1:2", "1:16.7", "8:16.7", "16:16.7"]
OUT_OF_TIME = 4
FRAMES = 100  # feature frames per second


def batch(text: str) -> tuple[int, int]:
    """Parses "32:16.7", that is 32 utterances of 16.7 s, as (utterances, feature frames)."""
    try:
        n, seconds = text.split(":")
        found = int(n), round(float(seconds) * FRAMES)
    except (ValueError, OverflowError):
        found = 0, 0
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not utterances:seconds, such as 32:16.7")
    return found


OPTIONS = {
    "": [
        common.DEVICE,
        option("--model", metavar="YAML", help="configuration of the model (Jasper 10x5 dense residual)"),
        option("--dtype", choices=tuple(common.DTYPES), default="fp16", help="dtype of the activations (fp16)"),
        option("--batches", nargs="+", type=batch, metavar="N:SECONDS", default=[batch(b) for b in BATCHES],
               help=f"batches: utterances, and padded length in seconds ({' '.join(BATCHES)})"),
        option("--for", dest="mode", choices=("training", "inference", "both"), default="both",
               help="what the model will be used for (both)"),
        option("--budget", type=common.positive(float), default=600.0, metavar="SECONDS",
               help="most seconds to spend (600)"),
    ],
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    import torch

    from jasper_fast.dispatch import backends, tuned, verdicts
    from jasper_fast.kernels import tables
    from jasper_fast.training import runs

    device = tuned.indexed(common.device_of(arguments.device))
    if device.type != "cuda":
        raise common.UsageError("tune needs a CUDA GPU: on a CPU kernels are not chosen by measurement")
    if reason := backends.why_missing("triton", device):
        raise common.UsageError(f"there is nothing to choose from: {backends.named('triton', reason)}")
    wanted = cells_of(arguments, getattr(torch, common.DTYPES[arguments.dtype]))
    todo = [cell for cell in wanted if not tables.covered(device, cell)]
    print(f"{len(wanted)} shapes on {verdicts.key(device)['device']}, {len(todo)} of them to measure; results go to "
          f"{tuned.path(device)}")  # fmt: skip
    started = time.monotonic()
    bar = runs.training_bar(runs.talker(quiet=not sys.stderr.isatty()), 0, len(todo), "starting")
    with verdicts.locked(tuned.PATIENCE, tuned.LOCK), bar as progress:
        session = tuned.tune(
            device,
            todo,
            arguments.budget,
            on_cell=lambda session, doing: progress(len(session.done), doing or "tuning"),
        )
    print(f"{len(session.done)} measured in {time.monotonic() - started:.0f} s, "
          f"{sum(len(of['refused']) for of in session.done.values())} contenders refused")  # fmt: skip
    if session.out_of_time:
        print(f"the budget is spent, {len(todo) - len(session.done)} shapes are left: the same command continues")
    return OUT_OF_TIME if session.out_of_time else 0


def cells_of(arguments: argparse.Namespace, dtype: Any) -> list[Any]:
    """Returns the cells (each an op at a shape) of all batches without duplicates, in the order of the batches."""
    from jasper_fast.nn.cells import cells
    from jasper_fast.nn.config import JasperConfig

    default = importlib.resources.files("jasper_fast.configs") / "jasper10x5dr.yaml"
    config = JasperConfig.from_yaml(arguments.model or default)
    modes = ("training", "inference") if arguments.mode == "both" else (arguments.mode,)
    return list(dict.fromkeys(
        cell for n, t in arguments.batches for mode in modes for cell in cells(config, n, t, dtype, mode)
    ))  # fmt: skip
