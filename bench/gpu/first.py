"""What `python -m bench gpu` does before it measures: the most important tests on the device, and tuning."""

import os
import subprocess
import sys
import time
from pathlib import Path

from jasper_fast.bench.cases import cells
from jasper_fast.bench.harness import paths
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.errors import OutOfTime
from jasper_fast.bench.harness.run import Run
from jasper_fast.dispatch import choose, tuned, verdicts
from jasper_fast.kernels import tables

# of each op one file; what runs on a device alone
TESTS = ("test_bn_relu_dropout.py", "test_conv1d.py", "test_conv1d_triton.py", "test_engine.py")
LEAST = 5.0  # seconds that are worth starting with


class TestsFailed(RuntimeError):
    """A test failed on this device; the message is pytest's last line."""


def tests(run: Run, *, files: tuple[str, ...] = TESTS, chosen: str = "triton or cuda") -> None:
    """Runs the quick tests of the ops on the device until one fails; prints a line if no tests are installed."""
    folder = paths.CHECKOUT and Path(paths.CHECKOUT) / "tests"
    left = seconds_left(run)
    try:
        import pytest  # noqa: F401
    except ImportError:
        folder = None
    if not folder or not folder.is_dir():
        console.print("gpu: no tests here (they need a checkout, and pip install pytest)")
        return
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*argv, *(str(folder / name) for name in files)],
            cwd=folder.parent, env=env, capture_output=True, text=True, timeout=left,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    last = (done.stdout.strip().splitlines() or ["nothing was run"])[-1]
    run.results.data["tests"] = {"status": done.returncode, "told": last}
    console.print(f"gpu: tests: {last}", markup=False)
    if done.returncode:
        named = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise TestsFailed("; ".join([*named[:3], last]))


def tune(run: Run, ops: tuple[str, ...] = cells.OPS) -> None:
    """Tunes faces and tiles in the run's dtype as far as the time goes; the later parts run with these choices."""
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
    """Seconds until the part's time is spent."""
    return 600.0 if run.deadline is None else max(0.0, run.deadline - time.monotonic())
