"""Builds the contenders of a case, compares them with fp64 and warms them up.

A contender that fails gets a row with the reason, and the run continues.
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence

from jasper_fast.bench.harness import correct, cudnn_search, devices
from jasper_fast.bench.harness.case import Answer
from jasper_fast.bench.harness.errors import DeviceLost, first_line
from jasper_fast.bench.harness.measurement import Measurement

LONG = 1.0  # a first run on a CPU that takes this many seconds is warm-up enough, so there is no second one


def prepare(m: Measurement) -> None:
    """Builds the contenders, drops the wrong ones, and warms up the rest."""
    m.build()
    check(m, m.case.seeds)
    for name in list(m.runners):
        with m.caught(name):
            started = time.perf_counter()
            m.runners[name].run()
            # On a GPU there is always a second run, because our engine captures its CUDA graph in it.
            if time.perf_counter() - started < LONG or m.device.type == "cuda":
                m.runners[name].run()
    gc.collect()


def check(m: Measurement, seeds: Sequence[int]) -> None:
    """Compares every runner with fp64 on fresh inputs and drops the wrong ones.

    A timed contender is also checked after the timing, on another input, so one that returns an answer to earlier
    inputs is found wrong. Contenders run before the fp64 answer is computed, and from the second contender on, `poison`
    fills freed memory with NaN. So an element that a contender never writes cannot be right by chance. If the inputs or
    the fp64 answer cannot be computed (for lack of memory, for instance), no contender gets a number.
    """
    case = m.case
    for seed in seeds:
        got: dict[str, Answer] = {}
        with answerable(m):
            case.refill(seed)
        for name in list(m.runners):
            with m.caught(name):
                if got:
                    correct.poison(next(iter(got.values())))
                got[name] = {k: v.detach().clone() for k, v in m.runners[name].outputs().items()}
        if not got:
            return
        with answerable(m):
            low = case.low() if case.low else None
            ref = case.reference()
        for name in list(m.runners):
            with m.caught(name):
                rule = m.runners[name].rule
                answers = got[name], low, ref
                wrong = rule.judge(*answers, rule.found) if rule else case.complaints(*answers)
                if seed == seeds[-1]:
                    wrong += m.runners[name].extra()
                if wrong:
                    m.fail(name, "wrong", "; ".join(wrong[:4]))


@contextlib.contextmanager
def answerable(m: Measurement) -> Iterator[None]:
    """A context that computes inputs or the fp64 answer. If that fails, no contender of the case gets a number. Raises
    DeviceLost if the device no longer works."""
    try:
        with cudnn_search.off():
            yield
        devices.synchronize(m.device)
    except Exception as error:
        for name in list(m.runners):
            m.fail(name, "failed", f"the inputs or the fp64 answer cannot be made: {first_line(error)}")
        if why := devices.lost(m.device):
            raise DeviceLost(f"inputs or fp64 answer of {m.case.label()}: {why}") from error
