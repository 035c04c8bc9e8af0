"""Finds the fastest implementation and tile of each op on this GPU, for the table by which `--backend auto` chooses.

`python -m bench tune` measures, and `python -m bench tune --install RESULT` puts the result into the committed table of
its GPU. The same tuner (`jasper_fast.tuning`) runs at first use and in `jasper-fast tune`. In this subcommand it times
every distinct conv of Jasper 10x5 and every width of its bn_relu_dropout, at several batches. The shapes with the most
work come first, so that an interrupted run has the most valuable rows.

All kernels are compiled in advance, in parallel. Each contender is first compared with fp64. A contender that is wrong,
spills registers or does not compile gets a row that says so, and is never chosen. On a GPU a contender is a CUDA graph
of one call, on a batch with as much padding as a batch of speech. Dispatch uses the measured choices immediately, for
this user. The result file has the rows measured so far, and `--resume` continues.

With TRITON_INTERPRET=1 and `--device cpu` the same code runs on tiny shapes in Triton's interpreter, as a test. Such a
result cannot be installed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jasper_fast.bench.cases.cells import OPS, plan
from jasper_fast.bench.harness import options, paths
from jasper_fast.bench.harness.console import console, say
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.tune.table import case_id, install, put_table, rows_of, shape_of, summary
from jasper_fast.dispatch import backends, tuned, verdicts

OUT_OF_TIME = 4  # exit status if the budget is used up
BUDGET = 540.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand."""
    parser.add_argument(
        "--device",
        type=options.device,
        default=None,
        help="device to tune: cuda, cuda:1, or cpu for Triton's interpreter (default: the GPU)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default=None,
        help="type of the activations (default: bf16, on a CPU fp32)",
    )
    parser.add_argument("--ops", default="all", help=f"ops to tune: all, or some of {','.join(OPS)} (default: all)")
    parser.add_argument(
        "--seconds", type=options.seconds, default=None, help="the longest time for timing one shape (default: 1.5)"
    )
    parser.add_argument(
        "--budget", type=options.seconds, default=BUDGET, metavar="SECONDS",
        help=f"stop after SECONDS with exit status {OUT_OF_TIME}; --resume continues (default: {BUDGET:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=paths.OUT, metavar="DIR",
        help="folder for the JSON file (default: build/bench)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="continue the last interrupted run on this machine and commit"
    )
    parser.add_argument(
        "--install",
        type=Path,
        metavar="RESULT",
        help="measure nothing; put the rows of a result file into the committed table of its GPU",
    )
    parser.set_defaults(threads=None, quick=False, backend="triton", rivals="default")


def main(args: argparse.Namespace, start: Callable[[argparse.Namespace], Run]) -> int:
    """Runs the subcommand and returns the exit status.

    The exit status is 0 if all is measured, 1 if the result of --install is unusable or the tuning process fails, and 4
    if the budget is used up. In that case --resume continues.
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
    have = {row["id"].rsplit(" / ", 1)[0] for row in run.results.data["rows"]}
    todo, status, written = [cell for cell in cells if case_id(cell) not in have], 0, 0

    def on_cell(session: tuned.Session, doing: str) -> None:
        nonlocal written
        for cell, found in list(session.done.items())[written:]:
            rows = rows_of(cell, found)
            run.results.add(rows)
            put_table(run)
            written += 1
            done = f"tune {len(cells) - len(todo) + written} of {len(cells)}"
            say(
                f"{done}: {cell.op} {shape_of(cell)}, {sum(row['status'] == 'ok' for row in rows)} of {len(rows)} timed"
            )
        if doing.startswith("compiling"):
            console.print(f"tune: {doing}")

    try:
        with verdicts.locked(tuned.PATIENCE, tuned.LOCK):
            how = {"on_cell": on_cell, "keeps": device.type == "cuda", "seconds": seconds}
            session = tuned.tune(device, todo, budget, **how)
        status = OUT_OF_TIME if session.out_of_time else 0
    except tuned.CannotTune as error:
        say(str(error))
        status = 1
    run.results.data["finished"] = status == 0
    run.results.data["seconds"] = round(time.monotonic() - run.started, 1)
    put_table(run)
    summary(run, len(cells) - len(todo) + written, len(cells))
    return status
