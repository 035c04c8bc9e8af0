"""torch.profiler without the lines that its library Kineto writes to the terminal when no error has happened."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

from torch.profiler import ProfilerActivity, profile

# Matches the lines that Kineto prints whenever profiling starts or stops, and the line that a CUDA build of PyTorch
# prints on a machine without a driver.
MARKS = re.compile(rb"USDT:|ERROR:.*gpuGetDeviceCount failed with code 35$")


@contextlib.contextmanager
def without_marks() -> Iterator[None]:
    """A context that drops Kineto's lines that match MARKS. Other output to stderr appears at the end of the context.

    Kineto's log level cannot do this, because a level that hides these lines also hides errors.
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
                out.writelines(line for line in heard if not MARKS.match(line))


@contextlib.contextmanager
def recorded(activities: Sequence[ProfilerActivity], profile_memory: bool = False) -> Iterator[profile]:
    """A context in which torch.profiler records, without the Kineto lines that match MARKS."""
    trace = profile(activities=activities, profile_memory=profile_memory)
    with without_marks():
        trace.start()
    try:
        yield trace
    finally:
        with without_marks():
            trace.stop()
