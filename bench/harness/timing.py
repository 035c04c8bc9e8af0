"""Contenders on the same inputs, checked, then timed in turns: A B A B ... so that drift hits all alike.

A `Case` is one question (an op at a shape, a model at a batch). Its contenders are built, compared with fp64 on two
different inputs, warmed up, timed in rounds, and compared once more; a contender that is absent, refused, fails or is
wrong becomes a row that says so and carries no number. A run may come back to its cases minutes later (`Run.revisit`):
a ratio's interval then spans what each visit alone would have said, because a machine's mood outlasts a visit.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from jasper_fast.bench.harness import checking
from jasper_fast.bench.harness.case import Case, Effort
from jasper_fast.bench.harness.clocks import CudaClock, Gauge, WallClock, clock, clocks_during
from jasper_fast.bench.harness.ratios import ratio, ratio_of_visits, summary


def measure(
    case: Case, device: torch.device, effort: Effort, on_round: Callable[[float], None] = lambda share: None
) -> list[dict]:
    """Time a prepared case; returns one row a contender, of this visit and of earlier ones together."""
    ticker = clock(device, case.wall)
    samples, inner, host = _rounds(case, ticker, case.effort(effort), on_round)
    case.hurried |= max(map(len, samples.values()), default=effort.min_rounds) < effort.min_rounds
    checking.check(case, (3,))  # what was right before the timing must still be right after it
    case.visits.append({name: s for name, s in samples.items() if name in case.runners})
    return rows(case, case.visits, inner, device, host)


def _rounds(
    case: Case, ticker: WallClock | CudaClock, effort: Effort, on_round: Callable[[float], None]
) -> tuple[dict, dict, dict]:
    names = list(case.runners)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gauge = Gauge(ticker.device, case.readings)
    inner: dict[str, int] = {}
    host: dict[str, float] = {}
    for name in names:
        with checking.caught(case, name):
            once = ticker.sample(case.runners[name].run, 1)
            inner[name] = max(1, int(ticker.min_sample / max(once, 1e-9)))
            if (told := ticker.host(case.runners[name].run)) is not None:
                host[name] = told
    names = [n for n in names if n in case.runners]
    was_enabled, started, done = gc.isenabled(), time.perf_counter(), 0
    gc.disable()
    try:
        while names and done < effort.max_rounds:
            order = names if done % 2 == 0 else names[::-1]  # A B, B A: no one always runs on another's caches
            for name in order:
                with checking.caught(case, name):
                    samples[name].append(ticker.sample(case.runners[name].run, inner[name]))
            names = [n for n in names if n in case.runners]
            done += 1
            gauge.look()
            spent = time.perf_counter() - started
            on_round(min(1.0, max(spent / effort.seconds, done / effort.max_rounds)))
            enough = done >= effort.min_rounds and done % 4 == 0 and _settled(case, samples, names, effort.target)
            least = effort.min_rounds if spent <= 3 * effort.seconds else 3 if spent <= 9 * effort.seconds else 1
            late = spent > effort.seconds and done >= least
            if enough or late:
                break
            if done % 8 == 0:
                gc.collect(0)
        gauge.look(last=True)
    finally:
        if was_enabled:
            gc.enable()
    return samples, inner, host


def _settled(case: Case, samples: dict[str, list[float]], names: Sequence[str], target: float) -> bool:
    if case.ours not in names or len(names) < 2:
        return False
    intervals = (ratio(samples[n], samples[case.ours], resamples=200) for n in names if n != case.ours)
    return all((r["high"] - r["low"]) / 2 <= target * r["median"] for r in intervals)


def rows(
    case: Case,
    visits: Sequence[Mapping[str, Sequence[float]]],
    inner: Mapping[str, int],
    device: torch.device,
    host: Mapping[str, float] = MappingProxyType({}),
) -> list[dict]:
    """One row a contender, in the case's order, from its samples in each visit; a contender without any says why.

    `host`: seconds that a run holds the host, where that is not the measured time itself.
    """
    names = {name for visit in visits for name in visit}
    samples = {name: [t for visit in visits for t in visit.get(name, ())] for name in names}
    made = []
    for contender in case.contenders:
        name = contender.name
        row = {
            "id": f"{case.id} / {name}",
            "bench": case.bench,
            "key": case.key,
            "contender": name,
            "ours": name == case.ours,
        }
        row |= {
            "dtype": case.dtype,
            "flops": case.flops,
            "bytes": case.nbytes,
            "clock": "wall" if case.wall or device.type != "cuda" else "events",
        }
        if name in case.failed:
            status, why = case.failed[name]
            made.append(row | {"status": status, "why": why})
            continue
        time_s = summary(samples[name], inner[name])
        row |= {"status": "ok", "time_s": time_s}
        if case.hurried:
            row["hurried"] = True
        if case.readings:
            row["clocks"] = clocks_during(case.readings)
        if name in host:
            row["host_s"] = host[name]
        if case.flops:
            row["flops_per_s"] = case.flops / time_s["median"]
        if case.nbytes:
            row["bytes_per_s"] = case.nbytes / time_s["median"]
        if case.items:
            row["items_per_s"] = case.items / time_s["median"]
        if name != case.ours and case.ours in samples and case.ours not in case.failed:
            row["ratio"] = ratio_of_visits(visits, name, case.ours)
        made.append(row)
    return made
