"""What stops a measurement, or a compiler, whose time is spent."""

import signal

from jasper_fast.bench.harness.errors import OutOfTime

AGAIN = 20.0  # seconds from one interruption to the next, where the first was lost


class interrupted_after:
    """Raise OutOfTime in the main thread after `seconds`, between two lines of Python: it stops compilers too.

    And every AGAIN seconds from then on, until the body ends: Python drops what is raised in a destructor or a weak
    reference's callback, and a compiler's process is full of them. `no_more` is for who has caught it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @staticmethod
    def no_more() -> None:
        """Ends it where one came just as the body had ended."""
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
