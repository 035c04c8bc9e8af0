"""Which tile and which face: `python -m bench tune` measures, `--install RESULT` makes it the table of this GPU.

The tuner is that of first uses (`jasper-fast tune`): here over every distinct conv of Jasper 10x5 and every width of
its bn_relu_dropout, at the batches that a table answers for, those of the most work first, so that a run cut off has
the most valuable rows. All kernels are compiled ahead in parallel; each contender is held against fp64 first; what is
wrong, spills or does not compile is a row that says so and is never chosen. On a GPU a contender is a CUDA graph of one
call over a batch with the padding of speech, and what is measured is this user's choice at once. The result file holds
the table as far as it has come; `--resume` goes on.

With TRITON_INTERPRET=1 and `--device cpu` the same code runs on tiny shapes in Triton's interpreter: a stand-in, whose
result cannot be installed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from jasper_fast.bench.cases.cells import OPS, plan
from jasper_fast.bench.harness import options, paths
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.tune.table import case_id, install, put_table, rows_of, say, shape_of, summary
from jasper_fast.dispatch import backends, tuned, verdicts

OUT_OF_TIME = 4  # exit status
BUDGET = 540.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument(
        "--device", type=options.device, default=None, help="cuda, cuda:1, or cpu for the stand-in (default: the GPU)"
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default=None, help="default: bf16; fp32 on a CPU")
    parser.add_argument("--ops", default="all", help=f"all, or some of {','.join(OPS)}")
    parser.add_argument("--seconds", type=options.seconds, default=None, help="to time a shape in (1.5 at most)")
    parser.add_argument(
        "--budget", type=options.seconds, default=BUDGET, metavar="SECONDS",
        help=f"when to stop ({BUDGET:.0f}), with exit status {OUT_OF_TIME}; --resume goes on",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=paths.OUT, metavar="DIR",
        help="folder for the JSON file (default: build/bench)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="continue the last interrupted run on this machine and commit"
    )
    parser.add_argument(
        "--install", type=Path, metavar="RESULT", help="only put the rows of a result into the table of its GPU"
    )
    parser.set_defaults(threads=None, quick=False, backend="triton", rivals="default")


def main(args: argparse.Namespace, start: Callable[[argparse.Namespace], Run]) -> int:
    """Run the subcommand; returns its exit status.

    0: all is measured; 1: an unusable result, or no process that tunes; 4: out of time, --resume goes on.
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
    """Work through the cells until they are done or the budget is spent; the file is written after each."""
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
