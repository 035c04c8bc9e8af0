"""A process that runs kernels and says what it does, a line at a time; and the one that started it and listens.

A kernel that crashes, or that never ends, must not take the user's process or its CUDA context with it. So kernels that
are not known to be good run in a process of their own, which gets what it is to do as JSON on its standard input and
tells what it begins and what it finds.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MARK = "jasper-fast-child "  # begins a line of the protocol: a kernel may print what it likes
START_SECONDS = 120.0  # for the interpreter, torch and the device
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # never the end of a kernel that failed


def tell(kind: str, value: object) -> None:
    """In the child: one line of the protocol."""
    sys.stdout.write(f"\n{MARK}{json.dumps([kind, value])}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Ended:
    """How a process ended. told: it was heard to the end of what it had to say; else `how`, in words, and the `last`
    line of its standard error; hung: it was silent for too long; code: its exit status."""

    told: bool
    hung: bool
    code: int
    how: str
    last: str

    @property
    def from_outside(self) -> bool:
        """Whether something else than its own doing ended it."""
        return not self.hung and -self.code in FROM_OUTSIDE


def talk(argv: Sequence[str], wanted: object, hear: Callable[[str, Any], bool], seconds: float) -> Ended:
    """Starts `argv`, gives it `wanted` as JSON, and calls `hear(kind, value)` for each line until that returns True.

    `seconds`: how long it may be silent, after START_SECONDS for its first line. Whatever is raised in here ends the
    process, and all that it started, at once.
    """
    env = dict(os.environ)
    home = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [home, env.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=env,
            start_new_session=True,
        )  # fmt: skip
        spoke, hung, ended, told = False, False, False, False
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: what follows says so
                process.stdin.write(json.dumps(wanted))
                process.stdin.close()
            for kind, value in _lines(process.stdout, START_SECONDS, seconds):
                spoke = True
                if hear(kind, value):
                    ended = told = True
                    break
            ended = True
        except TimeoutError:
            hung = True
        finally:  # where something else was raised, its receiver has no time to lose
            code = _end(process, before=10.0 if ended else 0.0, after=30.0 if ended or hung else 5.0)
        last = _last_line(errors)
    if hung:
        how = f"gave no sign for {seconds if spoke else START_SECONDS:.0f} s"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return Ended(told, hung, code, how, last)


def _lines(stream: IO[str], start: float, each: float) -> Iterator[tuple[str, Any]]:
    """What a process tells; raises TimeoutError when it is silent for too long, and stops where it ends."""
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    limit = start
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        if line.startswith(MARK):
            limit = each
            yield json.loads(line.removeprefix(MARK))


def _end(process: subprocess.Popen, before: float, after: float) -> int:
    """Waits `before` seconds for the end of a process, then makes it, and waits `after` seconds; its exit status."""
    try:
        return process.wait(timeout=before)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(timeout=after)
        except subprocess.TimeoutExpired:  # stuck in the driver: nothing kills it, and nobody waits for it
            return -signal.SIGKILL


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""
