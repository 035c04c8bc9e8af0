"""Times contenders in turns on the same inputs (A B, B A, ...), so that a machine that slows down affects all alike.

A `Case` is an op at a shape, or a model at a batch. Its contenders are built, compared with fp64 on one or two inputs,
warmed up, timed in rounds, and compared with fp64 once more. A contender that is absent, refused, fails or is wrong
gets a row with the reason and without a number. A run may time its cases again minutes later (`Run.revisit`), because a
machine can be slow or fast for longer than the timing of a case. The interval of a ratio then covers both intervals.
"""

import gc
import time
from collections.abc import Callable, Sequence

from jasper_fast.bench.harness import checking
from jasper_fast.bench.harness.case import Effort
from jasper_fast.bench.harness.clocks import Clock, Gauge, clock
from jasper_fast.bench.harness.measurement import Measurement, Row
from jasper_fast.bench.harness.ratios import ratio


def measure(m: Measurement, effort: Effort, on_round: Callable[[float], None] = lambda share: None) -> list[Row]:
    """Times a prepared case. Returns one row per contender, from all samples, those of earlier visits included."""
    effort = m.case.effort(effort)
    ticker = clock(m.device, m.case.wall)
    inner, host = _inner_runs(m, ticker)
    samples = _rounds(m, ticker, inner, effort, on_round)
    m.hurried |= max(map(len, samples.values()), default=effort.min_rounds) < effort.min_rounds
    checking.check(m, (3,))  # results must still be right after the timing
    m.visits.append({name: s for name, s in samples.items() if name in m.runners})
    return m.rows(inner, host)


def _inner_runs(m: Measurement, ticker: Clock) -> tuple[dict[str, int], dict[str, float]]:
    """Returns, for each contender, the number of runs per sample and, on a GPU, the seconds for which a run occupies
    the host."""
    inner, host = {}, {}
    for name in list(m.runners):
        with m.caught(name):
            run = m.runners[name].run
            inner[name] = max(1, int(ticker.min_sample / max(ticker.sample(run, 1), 1e-9)))
            if (seconds := ticker.host(run)) is not None:
                host[name] = seconds
    return inner, host


def _rounds(
    m: Measurement, ticker: Clock, inner: dict[str, int], effort: Effort, on_round: Callable[[float], None]
) -> dict[str, list[float]]:
    """Takes samples of the contenders in turns, until the ratios are precise enough or the time is over; returns
    them."""
    gauge, names = Gauge(m.device, m.readings), list(m.runners)
    samples: dict[str, list[float]] = {name: [] for name in names}
    was_enabled, started, done = gc.isenabled(), time.perf_counter(), 0
    gc.disable()
    try:
        while names and done < effort.max_rounds:
            for name in names if done % 2 == 0 else names[::-1]:  # A B, B A, so that the order is fair
                with m.caught(name):
                    samples[name].append(ticker.sample(m.runners[name].run, inner[name]))
            names = [n for n in names if n in m.runners]
            done += 1
            gauge.look()
            spent = time.perf_counter() - started
            on_round(min(1.0, max(spent / effort.seconds, done / effort.max_rounds)))
            enough = done >= effort.min_rounds and done % 4 == 0 and _settled(m, samples, names, effort.target)
            least = effort.min_rounds if spent <= 3 * effort.seconds else 3 if spent <= 9 * effort.seconds else 1
            if enough or (spent > effort.seconds and done >= least):
                break
            if done % 8 == 0:
                gc.collect(0)
        gauge.look(last=True)
    finally:
        if was_enabled:
            gc.enable()
    return samples


def _settled(m: Measurement, samples: dict[str, list[float]], names: Sequence[str], target: float) -> bool:
    ours = m.case.ours
    if ours not in names or len(names) < 2:
        return False
    intervals = (ratio(samples[n], samples[ours], resamples=200) for n in names if n != ours)
    return all((r["high"] - r["low"]) / 2 <= target * r["median"] for r in intervals)
