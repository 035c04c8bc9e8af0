"""A case's contenders built, compared with fp64 and warmed up; a failure is a row, never the end of the run."""

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence

from jasper_fast.bench.harness import correct, cudnn_search, devices
from jasper_fast.bench.harness.case import Answer
from jasper_fast.bench.harness.errors import DeviceLost, first_line
from jasper_fast.bench.harness.measurement import Measurement

LONG = 1.0  # seconds of a run that a CPU is warm after


def prepare(m: Measurement) -> None:
    """Build the contenders, refuse the wrong ones, warm up the rest."""
    m.build()
    check(m, m.case.seeds)
    on_gpu = m.device is not None and m.device.type == "cuda"
    for name in list(m.runners):
        with m.caught(name):
            started = time.perf_counter()
            m.runners[name].run()
            if time.perf_counter() - started < LONG or on_gpu:  # there a graph is captured in the second run
                m.runners[name].run()
    gc.collect()


def check(m: Measurement, seeds: Sequence[int]) -> None:
    """Compare every runner with fp64 on fresh inputs; a wrong one loses its place.

    Two seeds at least in all: an answer left over from the first inputs is wrong for the second. Contenders run before
    the reference and after `poison`, so no correct answer lies about in freed memory for them to leave unwritten.
    Without an answer to compare with (no memory for it, say) none of the contenders gets a number.
    """
    case = m.case
    for seed in seeds:
        got: dict[str, Answer] = {}
        low = ref = None
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
                judge = m.runners[name].rule.judge if m.runners[name].rule else case.complaints
                wrong = judge(got[name], low, ref)
                if seed == seeds[-1]:
                    wrong += m.runners[name].extra()
                if wrong:
                    m.fail(name, "wrong", "; ".join(wrong[:4]))


@contextlib.contextmanager
def answerable(m: Measurement) -> Iterator[None]:
    """Without inputs, or an answer to compare with, no contender of the case has a number; the other cases go on."""
    try:
        with cudnn_search.off():
            yield
        m.wait()
    except Exception as error:
        for name in list(m.runners):
            m.fail(name, "failed", f"nothing to compare it with: {first_line(error)}")
        if told := devices.lost(m.device):
            raise DeviceLost(f"the reference of {m.case.label()}: {told}") from error
