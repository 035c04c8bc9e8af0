"""What ends a contender, a run or a process."""


class Absent(Exception):
    """A rival that this machine does not have; the message says how to get it."""


class OutOfTime(BaseException):
    """The run's time is spent; no rival's error handling may swallow it."""


class DeviceLost(BaseException):
    """A kernel has left the GPU such that this process runs nothing more; no error handling may swallow it."""


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"
