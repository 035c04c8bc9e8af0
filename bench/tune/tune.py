"""Chooses tiles and faces: `python -m bench tune` measures them, `--install RESULT` puts the result into the table.

It measures every distinct conv of Jasper 10x5 and every width of its bn_relu_dropout, by op and by the power of two of
the rows. Those with the largest share of the network's work come first, so an interrupted run has the most valuable
rows. The contenders for a conv are the tiles that the kernels propose and ATen's own conv; for bn_relu_dropout they are
its faces. Each is first compared with fp64. One that is wrong, spills or does not compile gets a row that says so and
is never chosen. Slow ones are dropped after three rounds; the others are timed in turns. On a GPU a contender is a CUDA
graph of one call, so host time does not count. All tiles of a case are compiled in advance, in threads. The result file
holds the table so far. `--resume` continues, and skips a configuration that ended the process.

With TRITON_INTERPRET=1 and `--device cpu` the same code runs on tiny shapes in Triton's interpreter: a stand-in, whose
result cannot be installed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from jasper_fast.bench.harness import checking, devices, options, paths, timing
from jasper_fast.bench.harness.case import Case, Effort
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.errors import DeviceLost, OutOfTime, first_line
from jasper_fast.bench.harness.interruption import interrupted_after
from jasper_fast.bench.harness.measurement import LOST as LOST_ROW
from jasper_fast.bench.harness.measurement import Measurement, Row
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.tune.builders import AHEAD, Trial, compile_ahead
from jasper_fast.bench.tune.cases import LIBRARY, OPS, Layer, make_case, plan
from jasper_fast.bench.tune.table import install, put_table, say, summary
from jasper_fast.dispatch import backends
from jasper_fast.kernels import tables

LOST, OUT_OF_TIME, TERMINATED = 3, 4, 128 + signal.SIGTERM  # exit statuses
BUDGET = 1800.0
LONGEST_START = 120.0  # seconds from the start of the process to this module; if more, /proc is not usable
LOADED = time.monotonic()
SECONDS = 1.5  # per case
FIRST_ROUNDS = Effort(seconds=0.3, min_rounds=3, max_rounds=3, target=0.0)
SLOW = 1.3  # a contender this many times slower than the fastest is dropped after the first rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument(
        "--device", type=options.device, default=None, help="cuda, cuda:1, or cpu for the stand-in (default: the GPU)"
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default=None, help="default: bf16; fp32 on a CPU")
    parser.add_argument("--ops", default="all", help=f"all, or some of {','.join(OPS)}")
    parser.add_argument(
        "--seconds", type=options.seconds, default=SECONDS, help=f"time to spend on each case ({SECONDS})"
    )
    parser.add_argument(
        "--budget", type=options.seconds, default=BUDGET, metavar="SECONDS",
        help=f"when this process stops ({BUDGET:.0f}), with exit status {OUT_OF_TIME}; --resume continues",
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

    0: all is measured; 1: an unusable result; 3: a kernel lost the device; 4: out of time; 143: ended by SIGTERM. After
    the last three the results so far are on disk, and --resume continues.
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
    return tune(start(args), ops, args.budget, args.seconds)


def tune(run: Run, ops: tuple[str, ...], budget: float, seconds: float) -> int:
    """Works through the cases until they are done or the budget, counted from the start of the process, is used up."""
    run.deadline = born() + budget
    run.effort = dataclasses.replace(run.effort, seconds=seconds)
    trial = Trial(run.results.path.with_suffix(".trying"))
    note_killer(run, trial)
    todo = plan(run.device, ops)
    try:
        with terminated(trial):
            status = work(run, todo, trial)
    except Terminated:
        status = TERMINATED
    if status != LOST:
        trial.forget()
    done = sum(finished(run, make_case(run, *what, trial)) for what in todo)
    run.results.data["finished"] = done == len(todo)
    run.results.data["seconds"] = round(time.monotonic() - run.started, 1)
    put_table(run)
    summary(run, done, len(todo))
    return status


def work(run: Run, todo: list[tuple[str, Layer, tuple[int, int]]], trial: Trial) -> int:
    """Measures what is not measured yet and writes the file after every case; returns the exit status."""
    for number, (op, layer, batch) in enumerate(todo, 1):
        case = make_case(run, op, layer, batch, trial)
        if finished(run, case):
            continue
        left = run.deadline - time.monotonic()
        if left <= 0:
            return OUT_OF_TIME
        trial.case, trial.key, trial.facts = case.id, case.key, {}
        console.print(f"tune {number} of {len(todo)}: {case.label()}, {left:.0f} s left")
        try:
            with interrupted_after(left):
                rows = attempt(run, case, trial)
        except OutOfTime:
            interrupted_after.no_more()
            return OUT_OF_TIME
        except KeyboardInterrupt:  # by the user, not by the configuration that was being tried
            trial.forget()
            raise
        except DeviceLost as error:
            say(f"{error}: this process cannot continue; --resume skips the configuration that caused it")
            return LOST
        trial.forget()
        run.results.add(rows)
        put_table(run)
    return 0


def attempt(run: Run, case: Case, trial: Trial) -> list[Row]:
    """The rows of a case. If it cannot be measured at all (no memory for its inputs, say), they say so."""
    m = Measurement(case, run.device)
    try:
        return measure(run, m, trial)
    except DeviceLost:
        accuse(m, trial)
        raise
    except Exception as error:  # a failure of one case does not affect the others
        if told := devices.lost(run.device):
            accuse(m, trial)
            raise DeviceLost(f"{case.label()}: {told}") from error
        why = first_line(error)
    failed = Measurement(case, run.device, failed=dict.fromkeys(case.names, ("failed", why)))
    return [row | {"tune": c.row} for row, c in zip(failed.rows({}, {}), case.contenders, strict=True)]


def measure(run: Run, m: Measurement, trial: Trial) -> list[Row]:
    """Checks all contenders and times them, the slow ones only in the first rounds; returns their rows."""
    killers = {row["contender"] for row in run.results.data["rows"] if row["id"].startswith(f"{m.case.id} / ")}
    m.case = m.case.only([name for name in m.case.names if name not in killers])
    described = {c.name: c.row for c in m.case.contenders}
    if AHEAD not in killers:
        compile_ahead(run, m.case, trial)
    checking.prepare(m)
    first = timing.measure(m, FIRST_ROUNDS)
    times = {row["contender"]: row["time_s"]["median"] for row in first if row["status"] == "ok"}
    for name, spent in times.items():
        if spent > SLOW * min(times.values()) and name != LIBRARY:
            del m.runners[name]
    m.case = m.case.only(list(m.runners))
    rows = {row["contender"]: row for row in (*first, *(timing.measure(m, run.effort) if m.runners else ()))}
    m.runners.clear()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # the graphs' memory
    for name, row in rows.items():
        facts = trial.facts.get(name, {})
        row["tune"] = described[name] | {k: facts.get(k) for k in ("registers", "shared", "spilled")}
    return list(rows.values())


def finished(run: Run, case: Case) -> bool:
    """Whether the result has all rows of a case."""
    return run.results.has(case.id, case.names)


# ------------------------------------------------------------------ the process: its start, its end, and what ends it


def born() -> float:
    """When this process started, on the monotonic clock. A parent process counts from there, and imports take
    seconds."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return LOADED
    started = time.monotonic() - age
    return started if LOADED - LONGEST_START < started <= LOADED else LOADED


class Terminated(BaseException):
    """SIGTERM as a BaseException, so that no error handling swallows it."""


@contextlib.contextmanager
def terminated(trial: Trial) -> Iterator[None]:
    """SIGTERM raises Terminated between two lines of Python. It clears the trial at once, because the parent may kill
    this process before a compiler or a kernel returns to Python."""

    def stop(*_: object) -> None:
        raise Terminated

    def watch() -> None:
        while (told := os.read(reader, 1)) and told[0] != signal.SIGTERM:
            pass
        if told:
            trial.forget()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = signal.signal(signal.SIGTERM, stop)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(writer)
        thread.join()
        os.close(reader)


def accuse(m: Measurement, trial: Trial) -> None:
    """Notes which configuration lost the device: it may not be the last one that was tried for the first time."""
    for name, (_, why) in m.failed.items():
        if why.startswith(LOST_ROW) or "CUDA error" in why:
            trial.begin(name)
            return


def note_killer(run: Run, trial: Trial) -> None:
    """A configuration that was being tried when an earlier process ended gets a failed row and is not tried again."""
    if not trial.path.is_file():
        return
    tried = json.loads(trial.path.read_text())
    why = "an earlier process ended, or lost the device, when it first ran this"
    row = {"id": f"{tried['case']} / {tried['contender']}", "bench": "tune", "key": tried["key"], "ours": False}
    row |= {"contender": tried["contender"], "dtype": tables.DTYPES[run.dtype], "flops": 0, "bytes": 0}
    run.results.add([row | {"clock": "", "status": "failed", "why": why}])
    trial.forget()
