"""The errors that end a contender, a run or a process."""


class Absent(Exception):
    """A contender is not installed, or cannot run on this machine or in this case. The message says why."""


class OutOfTime(BaseException):
    """The time of the run is over. It is a BaseException, so that no rival's `except Exception` catches it."""


class DeviceLost(BaseException):
    """A kernel broke the GPU for this process. It is a BaseException, so that no `except Exception` catches it."""


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an exception's message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"
