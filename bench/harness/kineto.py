"""torch.profiler without the lines that its library Kineto writes to the terminal at every start and stop."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

from torch.profiler import ProfilerActivity, profile

MARK = b"USDT:"  # begins each of those lines


@contextlib.contextmanager
def without_marks() -> Iterator[None]:
    """Keeps Kineto's MARK lines off the terminal. Everything else that is written to stderr in the body appears after
    it.

    A log level cannot do this: MARK lines rank above errors, so a level that hides them hides errors too.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            heard.seek(0)
            with open(2, "wb", closefd=False) as out:
                out.writelines(line for line in heard if not line.startswith(MARK))


@contextlib.contextmanager
def recorded(activities: Sequence[ProfilerActivity], profile_memory: bool = False) -> Iterator[profile]:
    """Runs torch.profiler around the body; only its errors reach the terminal."""
    trace = profile(activities=activities, profile_memory=profile_memory)
    with without_marks():
        trace.start()
    try:
        yield trace
    finally:
        with without_marks():
            trace.stop()
