"""A case's contenders built, compared with fp64 and warmed up; a failure is a row, never the end of the run."""

import contextlib
import gc
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from jasper_fast.bench.harness import correct, cudnn_search, devices
from jasper_fast.bench.harness.case import Case
from jasper_fast.bench.harness.errors import Absent, DeviceLost, first_line
from jasper_fast.bench.harness.result_file import LOST

LONG = 1.0  # seconds of a run that a CPU is warm after


def prepare(case: Case) -> None:
    """Build the contenders, refuse the wrong ones, warm up the rest."""
    for contender in case.contenders:
        if contender.name not in case.failed:
            with caught(case, contender.name):
                case.runners[contender.name] = contender.build()
    check(case, case.seeds)
    on_gpu = case.device is not None and case.device.type == "cuda"
    for name in list(case.runners):
        with caught(case, name):
            started = time.perf_counter()
            case.runners[name].run()
            if time.perf_counter() - started < LONG or on_gpu:  # there a graph is captured in the second run
                case.runners[name].run()
    gc.collect()


def check(case: Case, seeds: Sequence[int]) -> None:
    """Compare every runner with fp64 on fresh inputs; a wrong one loses its place.

    Two seeds at least in all: an answer left over from the first inputs is wrong for the second. Contenders run before
    the reference and after `poison`, so no correct answer lies about in freed memory for them to leave unwritten.
    Without an answer to compare with (no memory for it, say) none of the contenders gets a number.
    """
    for seed in seeds:
        got: dict[str, Mapping[str, Tensor]] = {}
        low = ref = None
        with answerable(case):
            case.refill(seed)
        for name in list(case.runners):
            with caught(case, name):
                if got:
                    correct.poison(next(iter(got.values())))
                got[name] = {k: v.detach().clone() for k, v in case.runners[name].outputs().items()}
        if not got:
            return
        with answerable(case):
            low = case.low() if case.low else None
            ref = case.reference()
        for name in list(case.runners):
            with caught(case, name):
                wrong = correct.complaints(got[name], low, ref, case.tolerance)
                if seed == seeds[-1]:
                    wrong += case.runners[name].extra()
                if wrong:
                    case.failed[name] = ("wrong", "; ".join(wrong[:4]))
                    del case.runners[name]


@contextlib.contextmanager
def caught(case: Case, name: str):
    """A contender's failure is its own row, never the end of the run; the device's loss is the end of this process."""
    try:
        yield
        if case.device is not None:
            devices.synchronize(
                case.device
            )  # a fault shows here, in the row of who launched the kernel, not in the next one's
    except Absent as error:
        case.failed[name] = ("absent", str(error))
        case.runners.pop(name, None)
    except Exception as error:  # whatever a rival raises belongs in its row
        case.failed[name] = ("failed", first_line(error))
        case.runners.pop(name, None)
        if why := devices.lost(case.device):
            case.failed[name] = ("failed", f"{LOST}: {why}")
            raise DeviceLost(f"{name}, {case.label()}: {why}") from error


@contextlib.contextmanager
def answerable(case: Case):
    """Without inputs, or an answer to compare with, no contender of the case has a number; the other cases go on."""
    try:
        with cudnn_search.off():
            yield
        if case.device is not None:
            devices.synchronize(case.device)
    except Exception as error:
        why = first_line(error)
        for name in case.runners:
            case.failed[name] = ("failed", f"nothing to compare it with: {why}")
        case.runners.clear()
        if told := devices.lost(case.device):
            raise DeviceLost(f"the reference of {case.label()}: {told}") from error
