"""Makes a mistake in a copy of the CUDA sources, and runs checks of the copy in a separate process."""

import faulthandler
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cuda_host
from fuzz import sanitize

SEEDS = (0, 3)  # each seed runs the threads in another order; with 0 they run one after the other
SECONDS = 120  # time limit of the checks: over a hundred times what they take


def chosen(mutants: Sequence[str]) -> list[str]:
    """Returns every eighth mutant, because each takes seconds to compile, or all of them under `make mutants`."""
    return list(mutants)[:: 1 if os.environ.get("JASPER_FAST_MUTANTS") == "all" else 8]


def mutated(mutant: tuple[str, str, str], folder: Path) -> Path:
    """Copies csrc/cuda into `folder`/csrc, and makes the mistake (file, correct text, wrong text) in the copy. Returns
    `folder`/csrc."""
    file, old, new = mutant
    folder = folder / "csrc"
    shutil.copytree(cuda_host.CSRC / "cuda", folder / "cuda")
    source = folder / "cuda" / file
    text = source.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
    source.write_text(text.replace(old, new))
    return folder


def outcome(check: Callable[[], None]) -> str | None:
    """Runs `check` in a process of its own; returns the error, or None if it passes."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        faulthandler.disable()  # a crash must not print a traceback
        try:
            check()
            there.send(None)
        except BaseException as error:  # whatever it raised is sent to the parent process
            there.send(f"{type(error).__name__}: {str(error)[:500]}")

    child = context.Process(target=run)
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(SECONDS) else "hung"
    except EOFError:
        child.join()
        return f"died with status {child.exitcode}"
    finally:
        child.kill()
        child.join()


def races(code: str) -> str:
    """Runs Python `code`, which loads a library built with ThreadSanitizer, in a process of its own.

    Returns the sanitizer's reports, or "" if there are none.
    """
    environment = sanitize.environment("thread") | {"JASPER_FAST_LIB": "", "OMP_NUM_THREADS": "1"}
    command = ["setarch", platform.machine(), "-R", sys.executable, "-c", code]
    paths = os.pathsep.join([str(cuda_host.ROOT), str(cuda_host.ROOT / "tests")])
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": paths}, timeout=600)
    if "WARNING: ThreadSanitizer" in done.stderr:
        return done.stderr
    assert done.returncode == 0, done.stderr[-4000:]
    return ""
