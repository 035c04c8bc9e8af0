"""What samples say: quantiles, ratios pair by pair, and intervals that claim no more than their number allows."""

import functools
import math
import random
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95
PERCENTILES = (0.05, 0.20, 0.50, 0.80, 0.90, 0.95, 0.99)
SAMPLES = {"p20": 5, "p80": 5, "p90": 10, "p95": 20, "p99": 100}  # fewer, and the quantile is the extreme itself


def ratio(rival: Sequence[float], ours: Sequence[float], resamples: int = 2000, seed: int = 0) -> dict:
    """Rival time / our time, pair by pair: the median and its bootstrap 95 % interval (rounds drawn again in short
    runs of neighbours, because neighbouring rounds share the machine's mood)."""
    pairs = [r / o for r, o in zip(rival, ours, strict=False)]
    low, high = interval(pairs, resamples, seed)
    told = {"confidence": confidence(len(pairs)), "pairs": len(pairs)}
    return {"median": statistics.median(pairs), "low": low, "high": high} | told


def interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The interval of the median, CONFIDENCE where `confidence` says so: the bootstrap's, values drawn again in short
    runs of neighbours, and at least that of their ranks, because the bootstrap of a dozen values is too sure (0.83 of
    the truths in six independent values, 0.89 in twelve)."""
    rng, n = random.Random(seed), len(values)
    block = max(1, round(n ** (1 / 3)))
    medians = []
    for _ in range(resamples):
        drawn: list[float] = []
        while len(drawn) < n:
            start = rng.randrange(n)
            drawn += [values[(start + i) % n] for i in range(block)]
        medians.append(statistics.median(drawn[:n]))
    medians.sort()
    low, high = (medians[min(resamples - 1, int(q * resamples))] for q in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    ordered, rank = sorted(values), rank_of_interval(n)
    return min(low, ordered[rank]), max(high, ordered[n - 1 - rank])


@functools.cache
def rank_of_interval(n: int) -> int:
    """From how many values in, at both ends, the sorted values still hold the median with CONFIDENCE; 0 at least."""
    outside, rank = 2 * 0.5**n, 0  # the chance that the truth lies beyond the values at `rank`
    while outside + 2 * math.comb(n, rank + 1) * 0.5**n <= 1 - CONFIDENCE:
        rank += 1
        outside += 2 * math.comb(n, rank) * 0.5**n
    return rank


def confidence(n: int) -> float:
    """What an interval from `n` values can claim: all of them lie on one side of the true median in 2 of 2^n cases."""
    return min(CONFIDENCE, 1 - 2 * 0.5**n)


def ratio_of_visits(visits: Sequence[Mapping[str, Sequence[float]]], rival: str, ours: str) -> dict:
    """The ratio over all pairs of all visits; its interval spans those of the visits."""
    pairs = [(v[rival], v[ours]) for v in visits if v.get(rival) and v.get(ours)]
    parts = [ratio(*pair) for pair in pairs]
    if len(parts) == 1:
        return parts[0]
    pooled = [r / o for pair in pairs for r, o in zip(*pair, strict=False)]
    span = {"low": min(p["low"] for p in parts), "high": max(p["high"] for p in parts)}
    told = {"confidence": confidence(len(pooled)), "pairs": len(pooled), "visits": len(parts)}
    return {"median": statistics.median(pooled), **span, **told}


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def samples_for(q: float) -> int:
    """Samples from which the q-quantile is another than the least or greatest of them."""
    return math.ceil(round(1 / min(q, 1 - q), 6))


def summary(samples: Sequence[float], inner: int) -> dict:
    """Quantiles of the samples in seconds, a sample being the mean of `inner` runs; the interval of the median with its
    confidence; and in `too_few_for` the quantiles that so few samples tell only as their extremes."""
    names = {q: f"p{round(100 * q):02d}" for q in PERCENTILES}
    low, high = interval(samples, 500)
    return {
        "median": statistics.median(samples),
        "mean": statistics.fmean(samples),
        "min": min(samples),
        "median_low": low,
        "median_high": high,
        "confidence": confidence(len(samples)),
        **{name: quantile(samples, q) for q, name in names.items()},
        "too_few_for": [name for q, name in names.items() if len(samples) < samples_for(q)],
        "samples": len(samples),
        "inner": inner,
    }
