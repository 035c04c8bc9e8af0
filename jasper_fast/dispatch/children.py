"""The two ends of a child process that runs kernels: the child reports line by line, and the parent listens.

A kernel that crashes or never ends must not take the user's process or its CUDA context with it. So kernels that are
not yet known to be good run in a process of their own. It reads its task as JSON from standard input, and writes a line
for each thing that it begins or finds.
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

MARK = "jasper-fast-child "  # begins each line of the protocol, because kernels may print other lines
START_SECONDS = 120.0  # time for starting Python, importing torch and opening the device
# a failing kernel never ends its process by one of these
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def tell(kind: str, value: object) -> None:
    """In the child: writes one line of the protocol."""
    sys.stdout.write(f"\n{MARK}{json.dumps([kind, value])}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    told: all its messages were received. how: its end in words; last: the last line of its standard error. hung: it was
    silent for too long. code: its exit status.
    """

    told: bool
    hung: bool
    code: int
    how: str
    last: str

    @property
    def from_outside(self) -> bool:
        """Whether something outside the process ended it."""
        return not self.hung and -self.code in FROM_OUTSIDE


def talk(argv: Sequence[str], wanted: object, hear: Callable[[str, Any], bool], seconds: float) -> Ended:
    """Starts `argv`, sends it `wanted` as JSON, and calls `hear(kind, value)` for each line until that returns True.

    The process may be silent for `seconds`, and for START_SECONDS before its first line. Any exception raised in here
    kills the process and its descendants at once.
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
            with contextlib.suppress(BrokenPipeError):  # the process died at once; its exit status is read below
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
        finally:  # after any other exception, such as an interrupt, the caller must not wait
            code = _end(process, before=10.0 if ended else 0.0, after=30.0 if ended or hung else 5.0)
        last = _last_line(errors)
    if hung:
        how = f"was silent for {seconds if spoke else START_SECONDS:.0f} s"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return Ended(told, hung, code, how, last)


def _lines(stream: IO[str], start: float, each: float) -> Iterator[tuple[str, Any]]:
    """The messages of a process until it ends; raises TimeoutError if it is silent for too long."""
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
    """Waits `before` seconds for a process to end, then kills it and waits `after` seconds; returns the exit status."""
    try:
        return process.wait(timeout=before)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(timeout=after)
        except subprocess.TimeoutExpired:  # stuck in the driver, where no signal reaches it: do not wait longer
            return -signal.SIGKILL


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""
