"""The most valuable benchmarks on a GPU in nine minutes: `python -m bench gpu`. Later calls with `--resume` measure the
rest of the plan.

Each case is written to disk as soon as it is measured, and `--resume` continues after the last one. Every part has its
own share of the time, so that no part uses up the time of later ones. Time that is left at the end goes to the parts
that were cut off. If a part fails, the run continues with the next one, in a new process if the GPU is no longer usable
in this one. After two failures a part is not tried again.

The run begins with a preflight (compiler, headers, disk, driver, clocks, memory), the most important tests, the
self-check and tuning. Later parts run with the tuned tiles and skip kernels that the self-check found bad. On a GPU
`--backend auto` means Triton here, because the results of this command are used to decide what `auto` chooses
elsewhere. With `--device cpu` a short plan runs with the small Jasper and small shapes, to test the command.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from jasper_fast.bench.gpu import agenda
from jasper_fast.bench.harness import devices, interruption, paths, result_file
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.errors import DeviceLost, OutOfTime, first_line
from jasper_fast.bench.harness.run import Run

BUDGET = 540.0
CASE = 3.0  # the most seconds for a case, which only slow rounds exceed (see Effort)
GOOD = 10.0  # a part is started only if at least this many seconds are left
PATIENCE = 60.0  # a part may last this many seconds longer than its time, because a call into C++ cannot be interrupted
UNTIL = "BENCH_GPU_UNTIL"  # environment variable: when the budget ends, as a `time.time()`


def main(run: Run, budget: float = BUDGET) -> None:
    """Carries out the plan until it is done or the budget is used up. The budget begins with the start of the run."""
    end = run.started + budget
    if UNTIL in os.environ:  # another process began this run; use the rest of its budget
        end = time.monotonic() + float(os.environ.pop(UNTIL)) - time.time()
    run = replace(run, effort=run.effort.at_most(CASE))
    if run.device.type == "cuda" and run.backend == "auto":
        run.backend = "triton"
    run.results.data["backend"] = run.backend
    parts, faults = (run.results.data.setdefault(name, {}) for name in ("parts", "faults"))
    begun = set()

    def ended(part: agenda.Part, how: str, gone: bool) -> None:
        parts[part.title] = how
        if how.startswith("failed"):
            faults[part.title] = faults.get(part.title, 0) + 1
        console.print(f"gpu: {part.title}: {how}, {end - time.monotonic():.0f} s left")
        run.results.write()
        if gone:
            go_on_elsewhere(run, end)

    # First every part gets its share of the time. Then the time that is left goes to parts that were cut off, or that
    # failed in an earlier process.
    for again in (False, True):
        for part in agenda.plan(run):
            how, failed = parts.get(part.title), faults.get(part.title, 0)
            if how == "finished" or failed >= result_file.TRIES:
                continue
            if (part.title in begun and how != "cut off") if again else failed:
                continue
            left = end - time.monotonic()
            if left < GOOD:
                parts.setdefault(part.title, "no time left")
                continue
            begun.add(part.title)
            share = left if again else min(left, part.seconds * budget / BUDGET)
            give_up = functools.partial(ended, part, "failed: a kernel or a compiler does not return", True)
            with outlasted(give_up, share):
                how, gone = _measure(run, part, share)
            ended(part, how, gone)
            devices.tidy(run.device)
    run.results.write()


def _measure(run: Run, part: agenda.Part, seconds: float) -> tuple[str, bool]:
    """Measures a part; returns how it ended, and whether the device was lost."""
    run, gone = replace(run, deadline=time.monotonic() + seconds), False
    try:
        with interruption.interrupted_after(seconds):
            part.measure(run)
        how = "cut off" if run.out_of_time() else "finished"
    except OutOfTime:
        how = "cut off"
    except DeviceLost as error:
        how, gone = f"failed: {error}", True
    except (Exception, SystemExit) as error:
        how = f"failed: {first_line(error)}"
    interruption.interrupted_after.no_more()
    if how == "cut off":
        end_compilers()
    if why := devices.lost(run.device):  # the device reported an error only now
        return how if how.startswith("failed") else f"failed: {why}", True
    return how, gone


def end_compilers() -> None:
    """Ends the compiling processes of torch.compile, which are started again when needed.

    The work that an interrupted part has queued in these processes would disturb the timing of the next parts.
    """
    compilers = sys.modules.get("torch._inductor.async_compile")
    if compilers is None:
        return
    for pool in list(compilers._pool_set):
        if (process := getattr(pool, "process", None)) is not None:
            process.kill()  # otherwise the shutdown would wait for the queued work, for up to five minutes
    compilers.shutdown_compile_workers()


def go_on_elsewhere(run: Run, end: float) -> None:
    """Replaces this process by the same command with --resume, and so does not return.

    After an illegal memory access a process can no longer use the GPU. All results are on disk.
    """
    console.print("gpu: the device no longer works in this process; continuing in a new one")
    path = os.pathsep.join(map(str, filter(None, [paths.CHECKOUT, os.environ.get("PYTHONPATH")])))
    env = os.environ | {UNTIL: str(time.time() + end - time.monotonic()), "PYTHONPATH": path}
    sys.stdout.flush()
    sys.stderr.flush()
    for entry in os.listdir("/proc/self/fd"):  # driver files that stay open would keep the old context alive
        with contextlib.suppress(OSError):  # the descriptor of this listing is closed already
            if int(entry) > 2:
                os.set_inheritable(int(entry), False)
    signal.setitimer(signal.ITIMER_REAL, 0)  # timers survive exec
    arguments = [*run.arguments, *(["--resume"] if "--resume" not in run.arguments else [])]
    os.execve(sys.executable, [sys.executable, "-m", "jasper_fast.bench", *arguments], env)


@contextlib.contextmanager
def outlasted(give_up: Callable[[], None], seconds: float) -> Iterator[None]:
    """A context that calls `give_up` in a thread if it lasts PATIENCE longer than `seconds`.

    If a kernel never ends, a call into C++ waits for it forever, and no signal can interrupt this call.
    """
    timer = threading.Timer(seconds + PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
