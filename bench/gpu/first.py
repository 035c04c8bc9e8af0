"""What `python -m bench gpu` does before it measures: it runs the most important tests on the device, and it tunes."""

import importlib.util
import os
import subprocess
import sys
import time

from jasper_fast.bench.cases import cells
from jasper_fast.bench.harness import paths
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.errors import OutOfTime
from jasper_fast.bench.harness.run import Run
from jasper_fast.dispatch import choose, tuned, verdicts
from jasper_fast.kernels import tables

# The test files of the ops whose speed matters most, and of the engine.
TESTS = ("test_bn_relu_dropout.py", "test_conv1d.py", "test_conv1d_triton.py", "test_engine.py")
LEAST = 5.0  # tuning gets at least this many seconds


class TestsFailed(RuntimeError):
    """A test failed on this device. The message names up to three failed tests and ends with pytest's last line."""


def tests(run: Run, *, files: tuple[str, ...] = TESTS, chosen: str = "triton or cuda") -> None:
    """Runs the quick tests in `files` on the device until one fails.

    `chosen` is pytest's expression for the names of tests. Outside a checkout, or without pytest, no test runs and a
    line says so.
    """
    folder = paths.CHECKOUT and paths.CHECKOUT / "tests"
    if not folder or not folder.is_dir() or importlib.util.find_spec("pytest") is None:
        console.print("gpu: no tests here; they need a checkout and pytest (pip install pytest)")
        return
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen,
             *(str(folder / name) for name in files)],
            cwd=folder.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=seconds_left(run),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    last = (done.stdout.strip().splitlines() or ["pytest printed nothing"])[-1]
    run.results.data["tests"] = {"status": done.returncode, "told": last}
    console.print(f"gpu: tests: {last}")
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise TestsFailed("; ".join([*failed[:3], last]))


def tune(run: Run, ops: tuple[str, ...] = cells.OPS) -> None:
    """Tunes implementations and tiles in the run's dtype until the part's time is over. Later parts use the result."""
    device = tuned.indexed(run.device)
    todo = [cell for cell in cells.plan(run.device, run.dtype, ops) if not tables.covered(device, cell)]
    with verdicts.locked(tuned.PATIENCE, tuned.LOCK):
        session = tuned.tune(device, todo, max(LEAST, seconds_left(run)), keeps=device.type == "cuda")
    refused = {" ".join(map(str, cell)): of["refused"] for cell, of in session.done.items() if of["refused"]}
    run.results.data["tuned"] = {"cells": len(session.done), "of": len(todo), "refused": refused}
    console.print(f"gpu: tuned {len(session.done)} of {len(todo)} shapes")
    choose.forget()
    if session.out_of_time:
        raise OutOfTime


def seconds_left(run: Run) -> float:
    """Returns the seconds until the part's time is over, or 600 if it has no limit."""
    return 600.0 if run.deadline is None else max(0.0, run.deadline - time.monotonic())
