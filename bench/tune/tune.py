"""Finds the fastest implementations of conv1d and bn_relu_dropout, and tiles of Triton's convs, on this GPU.

`--backend auto` chooses from the resulting table.

`python -m bench tune` measures, and `python -m bench tune --install RESULT` puts the result into the committed table of
its GPU. The same tuner (`jasper_fast.tuning`) runs at first use and in `jasper-fast tune`. In this subcommand it times
every distinct conv of Jasper 10x5 and every width of its bn_relu_dropout, at several batches. The most valuable batches
come first (`BATCHES` in bench/cases/cells.py), and in a batch the shapes with the most work, in case the run is
interrupted.

All kernels are compiled in advance, in parallel. Each contender is first compared with fp64. A contender that is wrong,
spills registers or does not compile gets a row that says so, and is never chosen. On a GPU the timed call is a CUDA
graph, on a batch with as much padding as a batch of speech. The measured choices are saved in this user's cache, and
dispatch uses them immediately. After each cell the result file is written, and `--resume` continues it.

With TRITON_INTERPRET=1 and `--device cpu` the same code runs on tiny shapes in Triton's interpreter, as a test. Such a
result cannot be installed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jasper_fast.bench.cases.cells import OPS, plan
from jasper_fast.bench.harness import options
from jasper_fast.bench.harness.console import console, say
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.tune.table import case_id, install, put_table, rows_of, shape_of, summary
from jasper_fast.dispatch import backends, tuned, verdicts
from jasper_fast.options import add, option

OUT_OF_TIME = 4  # exit status if the budget is used up
OPTIONS = (
    option(
        "--device",
        type=options.device,
        help="device to tune: cuda, cuda:1, or cpu for Triton's interpreter (default: the GPU)",
    ),
    option("--dtype", choices=("fp32", "fp16", "bf16"), help="type of the activations (default: bf16, on a CPU fp32)"),
    option("--ops", default="all", help=f"ops to tune: all, or some of {','.join(OPS)} (default: all)"),
    option("--seconds", type=options.seconds, help="the longest time for timing one shape (default: 1.5)"),
    option(
        "--budget",
        type=options.seconds,
        default=540.0,
        metavar="SECONDS",
        help=f"stop after SECONDS with exit status {OUT_OF_TIME}; --resume continues (default: 540)",
    ),
    options.OUT,
    option("--resume", action="store_true", help="continue the last interrupted run on this machine and commit"),
    option(
        "--install",
        type=Path,
        metavar="RESULT",
        help="measure nothing; put the rows of a result file into the committed table of its GPU",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand, and fixed values for those of other subcommands that `Run` needs."""
    add(parser, {"": OPTIONS})
    parser.set_defaults(threads=None, quick=False, backend="triton", rivals="default")


def main(args: argparse.Namespace, start: Callable[[argparse.Namespace], Run]) -> int:
    """Runs the subcommand and returns the exit status.

    The exit status is 0 if all is measured or installed, 1 if the result of --install is unusable or the tuning process
    fails, and 4 if the budget is used up.
    """
    if args.install:
        return install(args.install)
    ops = OPS if args.ops == "all" else tuple(args.ops.split(","))
    if unknown := [op for op in ops if op not in OPS]:
        raise SystemExit(f"--ops {unknown[0]}: not one of all, {', '.join(OPS)}")
    on_cpu = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).type == "cpu"
    if on_cpu:
        args.quick = True
    elif args.dtype is None:
        args.dtype = "bf16"
    if reason := backends.why_missing("triton", "cpu" if on_cpu else "cuda"):
        raise SystemExit(reason)
    end = time.monotonic() + args.budget
    return tune(start(args), ops, end - time.monotonic(), args.seconds)


def tune(run: Run, ops: tuple[str, ...], budget: float, seconds: float | None = None) -> int:
    """Tunes the cells until all are done or the budget is used up; returns the exit status.

    The result file is written after each cell.
    """
    cells, device = plan(run.device, run.dtype, ops), tuned.indexed(run.device)
    measured = {row["id"].rsplit(" / ", 1)[0] for row in run.results.data["rows"]}
    todo = [cell for cell in cells if case_id(cell) not in measured]
    written, done = 0, len(cells) - len(todo)

    def on_cell(session: tuned.Session, doing: str) -> None:
        nonlocal written, done
        for cell, found in list(session.done.items())[written:]:
            rows = rows_of(cell, found)
            run.results.add(rows)
            put_table(run)
            written, done = written + 1, done + 1
            timed = f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} timed"
            say(f"tune {done} of {len(cells)}: {cell.op} {shape_of(cell)}, {timed}")
        if doing.startswith("compiling"):
            console.print(f"tune: {doing}")

    try:
        with verdicts.locked(tuned.PATIENCE, tuned.LOCK):
            session = tuned.tune(device, todo, budget, on_cell=on_cell, keeps=device.type == "cuda", seconds=seconds)
        status = OUT_OF_TIME if session.out_of_time else 0
    except tuned.CannotTune as error:
        say(str(error))
        status = 1
    run.results.data |= {"finished": status == 0, "seconds": round(time.monotonic() - run.started, 1)}
    put_table(run)
    summary(run, done, len(cells))
    return status
