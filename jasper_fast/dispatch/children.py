"""Runs kernels in a child process: starts it, sends it a task, and receives its messages.

A kernel that crashes or never ends would break the user's process and its CUDA context. So kernels that are not yet
known to be good run in a child process. It reads its task as JSON from standard input, and writes a line to standard
output for each piece of work that it begins and each result.
"""

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MARK = "jasper-fast-child "  # begins each line of the protocol, because kernels may print other lines
START_SECONDS = 120.0  # time for starting Python, importing torch and opening the device
# A process that ends by one of these signals was ended from outside, not by a failing kernel.
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def tell(kind: str, value: object) -> None:
    """Writes one message to the parent process; called in the child."""
    print(f"\n{MARK}{json.dumps([kind, value])}", flush=True)


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    told: whether it sent its last message. hung: whether it was silent for too long. code: its exit status, or minus
    the number of the signal that ended it. how: how it ended, in words. last: the last line of its standard error,
    after a colon, or "" if it wrote none.
    """

    told: bool
    hung: bool
    code: int
    how: str
    last: str

    @property
    def from_outside(self) -> bool:
        """Whether a signal from outside ended the process."""
        return not self.hung and -self.code in FROM_OUTSIDE


def talk(argv: Sequence[str], wanted: object, hear: Callable[[str, Any], bool], seconds: float) -> Ended:
    """Starts `argv`, sends it `wanted` as JSON, and calls `hear(kind, value)` on each message until it returns True.

    The process may be silent for at most `seconds` between messages, and for START_SECONDS before the first message.
    Any exception in this function kills the process and its descendants immediately.
    """
    home = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    # The task is a file, because writing a long task to a pipe would wait for a process that does not read it.
    temporary = functools.partial(tempfile.TemporaryFile, "w+", encoding="utf-8", errors="replace")
    with temporary() as task, temporary() as errors:
        json.dump(wanted, task)
        task.seek(0)
        process = subprocess.Popen(
            argv, stdin=task, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=env,
            start_new_session=True,
        )  # fmt: skip
        spoke, hung, ended, told = False, False, False, False
        try:
            for kind, value in _lines(process.stdout, START_SECONDS, seconds):
                spoke = True
                if told := hear(kind, value):
                    break
            ended = True
        except queue.Empty:
            hung = True
        finally:  # after another exception, such as a KeyboardInterrupt, the process is killed without waiting
            code = _end(process, before=10.0 if ended else 0.0, after=30.0 if ended or hung else 5.0)
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    if hung:
        how = f"was silent for {seconds if spoke else START_SECONDS:.0f} s"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return Ended(told, hung, code, how, f": {lines[-1][:300]}" if lines else "")


def _lines(stream: IO[str], start: float, each: float) -> Iterator[tuple[str, Any]]:
    """Yields the messages of a process until it ends. Raises queue.Empty if it is silent for too long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        with stream:
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    limit = start
    while (line := lines.get(timeout=limit)) is not None:
        if line.startswith(MARK):
            limit = each
            yield json.loads(line.removeprefix(MARK))


def _end(process: subprocess.Popen, before: float, after: float) -> int:
    """Waits `before` seconds for a process to end, then kills it and waits `after` seconds. Returns the exit status."""
    try:
        return process.wait(timeout=before)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            return process.wait(timeout=after)
        except subprocess.TimeoutExpired:  # It is stuck in the driver, where no signal reaches it. Do not wait longer.
            return -signal.SIGKILL
