"""Timing on a simulated GPU, by events, by the wall clock and on the host. Also tests that the flush of the
cache only reads, and how sleeps are counted while the clock rate rises."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, CUDA, softplus_case, timed
from standins import spied, wrap

from jasper_fast.bench.harness import clocks
from jasper_fast.bench.harness.case import Contender
from jasper_fast.bench.report import terminal

measured_rate = clocks.cycles_per_second.__wrapped__  # the original, which the fixture `device` replaces


class Gpu:
    """A simulated device with a queue. Only the simulated actions advance the host clock, `now`."""

    rate = 1e9  # cycles of a sleep per second

    def __init__(self) -> None:
        self.now = self.free_at = 0.0
        self.slept: list[float] = []

    def launch(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles / self.rate)
        self.launch(cycles / self.rate)

    def wait(self, *_: object) -> None:
        self.now = max(self.now, self.free_at)


@pytest.fixture
def device(monkeypatch) -> Gpu:
    made = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = max(made.free_at, made.now)

        def synchronize(self) -> None:
            made.now = max(made.now, self.at)

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    for owner, name, stand_in in (
        (torch.cuda, "Event", Event),
        (torch.cuda, "_sleep", made.sleep),
        (torch.cuda, "synchronize", made.wait),
        (torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=20 << 20)),
        (clocks, "cycles_per_second", lambda _: made.rate),
        (clocks, "time", SimpleNamespace(perf_counter=lambda: made.now, monotonic=time.monotonic)),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    wrap(monkeypatch, torch, "empty", lambda empty, *shape, device=None, **more: empty(*shape, **more))
    return made


def small_op(device: Gpu, launches: int, host: float, kernel: float):
    """Returns a function that launches kernels. A launch takes `host` seconds, and a kernel `kernel` seconds."""

    def run() -> None:
        for _ in range(launches):
            device.now += host
            device.launch(kernel)

    return run


def test_events_time_the_device_and_not_python(device):
    ticker = clocks.CudaClock(CUDA)
    run = small_op(device, 3, host=100e-6, kernel=10e-6)
    assert [ticker.sample(run, 1) for _ in range(3)] == pytest.approx([30e-6] * 3)
    assert ticker.host(run) == pytest.approx(300e-6)
    assert max(device.slept) < 1.1e-3


def test_the_flush_of_the_cache_only_reads(device, monkeypatch):
    ticker = clocks.CudaClock(CUDA)
    assert ticker.flush.nbytes == 40 << 20
    bits = ticker.flush.view(torch.int32).random_()
    before, version, seen = bits.clone(), bits._version, []
    reads = spied(monkeypatch, torch, "sum", lambda flush, *_, out: flush is ticker.flush)
    ticker.sample(lambda: seen.append(len(reads)), 3)
    assert reads == [True] * 3 and seen[-3:] == [1, 2, 3]
    assert torch.equal(bits, before)
    assert bits._version == version, "the same values were written again"


def test_a_long_host_time_is_part_of_the_answer(device):
    ticker = clocks.CudaClock(CUDA)
    run = small_op(device, 100, host=1e-3, kernel=10e-6)
    assert 80e-3 < ticker.sample(run, 1) <= 100e-3 and device.slept == [ticker.LONGEST]
    heavy = small_op(device, 100, host=1e-4, kernel=10e-3)  # its kernels take longer than its launches
    assert ticker.sample(heavy, 1) == pytest.approx(1.0, rel=1e-3)


def test_waiting_time_is_of_one_run_at_a_time(device):
    ticker = clocks.WallClock(CUDA)
    run = small_op(device, 1, host=1e-3, kernel=5e-3)
    assert ticker.sample(run, 4) == pytest.approx(6e-3), "queued runs would take 5.25 ms each"
    assert ticker.min_sample == 0.0 and clocks.WallClock(CPU).min_sample > 0
    assert ticker.host(run) == pytest.approx(1e-3) and clocks.WallClock(CPU).host(run) is None


def test_rows_carry_the_host_s_time_and_still_make_a_table(device, capsys):
    case = softplus_case({"eager": F.softplus})
    runs = {"jasper_fast": (1e-3, 10e-6), "eager": (2e-3, 40e-6)}
    contenders = [
        Contender(c.name, lambda c=c: dataclasses.replace(c.build(), run=small_op(device, 1, *runs[c.name])))
        for c in case.contenders
    ]
    _, rows = timed(dataclasses.replace(case, contenders=contenders), CUDA)
    assert [r["host_s"] for r in rows] == pytest.approx([1e-3, 2e-3])
    assert [r["time_s"]["median"] for r in rows] == pytest.approx([10e-6, 40e-6]) and rows[0]["clock"] == "events"
    assert rows[1]["ratio"]["median"] == pytest.approx(4.0)
    terminal.show(rows, [])
    assert "host" in capsys.readouterr().out


def test_sleeps_are_counted_at_the_clock_that_the_device_rises_to(device, monkeypatch):
    """An idle GPU starts at a fifth of its highest clock. A sleep counted at that rate would be too short."""
    rates = iter([2e8, 4e8, 1e9, 9e8, 8e8])
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: cycles > 1000 and device.launch(cycles / next(rates)))
    assert measured_rate(CUDA) == pytest.approx(1e9)
