"""Times runs by the wall clock or by GPU events, and reads the machine's clock rates meanwhile."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from jasper_fast.bench.harness import devices, machine

THROTTLED = 0.05  # a row is throttled if its clock rate is more than this share below the highest rate of the run


class WallClock:
    """Measures the time on the host from a call until the device has done its work, which is the time that a user
    waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # On a CPU a sample is the mean of as many runs as fit into 2 ms, but at least one. On a GPU it is one run.
        self.min_sample = 2e-3 if device.type == "cpu" else 0.0

    def sample(self, run: Callable[[], object], inner: int) -> float:
        """Returns the seconds of one run, as the mean of `inner` runs."""
        devices.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(inner):
            run()
            devices.synchronize(self.device)
        return (time.perf_counter() - start) / inner

    def host(self, run: Callable[[], object]) -> float | None:
        """Returns the seconds until `run` returns to the host, when a GPU may still be working; None on a CPU."""
        return None if self.device.type == "cpu" else host_seconds(run, self.device)


class CudaClock:
    """Measures the device time between two events, with the L2 cache flushed before each run.

    The flush only reads, because data that it wrote would go back to memory during the timed run. The device sleeps
    before the first event while the host launches the whole run. Without the sleep the device would wait for Python
    between small ops. The sleep is somewhat longer than the host's time in an earlier run, but at most LONGEST. If the
    host takes longer than that, its time is part of the result, as it is for a user.
    """

    min_sample = 0.0
    SPARE, LONGEST = 0.3e-3, 10e-3  # seconds

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(size, 32 << 20) // 4, dtype=torch.float32, device=device)
        self.sink = torch.empty((), dtype=torch.float32, device=device)
        # `host(run)` returns the seconds until `run` returns to the host. It measures only once for each `run`.
        self.host = functools.cache(functools.partial(host_seconds, device=device))

    def sample(self, run: Callable[[], object], inner: int) -> float:
        """Returns the seconds of one run, as the mean of `inner` runs."""
        cycles = round(min(1.5 * self.host(run) + self.SPARE, self.LONGEST) * cycles_per_second(self.device))
        total = 0.0
        for _ in range(inner):
            torch.sum(self.flush, 0, out=self.sink)
            torch.cuda._sleep(cycles)
            total += device_seconds(run)
        return total / inner


def device_seconds(run: Callable[[], object]) -> float:
    """Returns the seconds of a run on the GPU, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(run: Callable[[], object], device: torch.device, short: float = 20e-3) -> float:
    """Returns the seconds until `run` returns to the host, on a device that is idle when it starts.

    This time includes the launches and any waits inside `run`. The value is the median of three runs, or of fewer
    if one of them takes longer than `short`, because that run is then the last.
    """
    seen: list[float] = []
    while len(seen) < (3 if max(seen, default=0.0) < short else 1):
        devices.synchronize(device)
        start = time.perf_counter()
        run()
        seen.append(time.perf_counter() - start)
    devices.synchronize(device)
    return statistics.median(seen)


@functools.cache
def cycles_per_second(device: torch.device) -> float:
    """Returns the rate at which `torch.cuda._sleep` counts.

    The rate follows the GPU's clock, which on an idle GPU is a fifth of its highest and rises under load. So the rate
    is measured several times, and the highest is returned. With a lower rate, sleeps would be too short.
    """
    torch.cuda._sleep(1000)  # loads the kernel
    return max(4e6 / device_seconds(lambda: torch.cuda._sleep(4_000_000)) for _ in range(5))


class Gauge:
    """Reads clocks, temperature and power between the rounds of a case."""

    EVERY = 0.25  # least seconds between two readings; the last one may come sooner

    def __init__(self, device: torch.device, readings: list[dict]) -> None:
        self.device, self.readings, self.last = device, readings, -math.inf

    def look(self, last: bool = False) -> None:
        """Takes a reading if the previous one is older than EVERY seconds, or if `last` is true."""
        now = time.monotonic()
        if (last or now - self.last >= self.EVERY) and (found := machine.clocks(self.device)):
            self.readings.append(found)
            self.last = now


def clocks_during(readings: Sequence[dict]) -> dict:
    """Returns a summary of the readings of a case: the median and the lowest clock in MHz, the highest temperature,
    power and load, and all reasons for a lowered clock."""
    rates = [rate for reading in readings if (rate := mhz(reading)) is not None]
    found = {"mhz": statistics.median(rates), "mhz_lowest": min(rates)} if rates else {}
    for name in ("temperature_c", "power_w", "load_average"):
        if values := [reading[name] for reading in readings if name in reading]:
            found[name] = max(values)
    held = sorted({why for reading in readings for why in reading.get("held_by", ())})
    return found | ({"held_by": held} if held else {}) | {"readings": len(readings)}


def mhz(reading: dict) -> float | None:
    """Returns the clock at which the work ran: that of the GPU's multiprocessors, or that of the fastest CPU core, as
    other cores may be idle."""
    return reading.get("sm_mhz", max(reading.get("cpu_mhz", ()), default=None))


def mark_throttled(rows: Iterable[dict], limits: dict) -> None:
    """Writes into each row with a known clock rate whether it was more than THROTTLED below the highest of the run."""
    rows = [row for row in rows if "mhz" in row.get("clocks", {})]
    highest = max([mhz(limits.get("clocks", {})) or 0.0, *(row["clocks"]["mhz"] for row in rows)])
    for row in rows:
        row["throttled"] = row["clocks"]["mhz"] < (1 - THROTTLED) * highest


Clock = WallClock | CudaClock


def clock(device: torch.device, wall: bool) -> Clock:
    """Returns the clock that times runs on `device`: by events on a GPU, unless `wall`, and otherwise by the wall
    clock."""
    return CudaClock(device) if device.type == "cuda" and not wall else WallClock(device)
