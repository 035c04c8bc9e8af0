"""Interrupts a measurement or a compiler when its time is over."""

import signal

from jasper_fast.bench.harness.errors import OutOfTime

AGAIN = 20.0  # seconds until the exception is raised again


class interrupted_after:
    """A context that raises OutOfTime in the main thread after `seconds`.

    A signal handler raises it, so it also interrupts compilers that are written in Python. It is raised again every
    AGAIN seconds until the context ends, because Python drops an exception that is raised in a destructor or in the
    callback of a weak reference. A caller that has caught the exception calls `no_more`.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @staticmethod
    def no_more() -> None:
        """Stops the timer. A caller needs this if the exception came just after the body had ended."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            raise OutOfTime

        self.before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        self.no_more()
        signal.signal(signal.SIGALRM, self.before)
