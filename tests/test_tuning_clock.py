"""How the tuner times its contenders: in turns, as CUDA graphs, with an emptied L2 cache before each call."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from jasper_fast.tuning import timing


class FakeCuda:
    """A stand-in for torch.cuda. `log` lists what happens, in order; each entry counts as one second."""

    def __init__(self) -> None:
        self.log: list[str] = []
        fake = self

        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                self.at = len(fake.log)
                fake.log.append("event")

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at - 1)  # milliseconds: one second for each entry in between

        self.Event = Event
        logged = {
            name: lambda name=name, **_: self.log.append(name) for name in ("capture_begin", "capture_end", "replay")
        }
        self.CUDAGraph = lambda: SimpleNamespace(**logged)
        self.is_available = lambda: False

    def Stream(self, device):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append("side")
        yield

    def synchronize(self, device):
        self.log.append("wait")

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 10)


def test_a_gpus_clock_times_a_captured_call_and_not_what_empties_the_cache(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(timing.torch, "cuda", fake)
    ticker = timing.Events(torch.device("cpu"))
    assert ticker._other.numel() == 1 << 25
    ticker._other = SimpleNamespace(zero_=lambda: fake.log.append("flush"))
    run = ticker.prepare(lambda: fake.log.append("call"))
    assert fake.log == ["side", "call", "wait", "capture_begin", "call", "capture_end", "replay", "wait"]
    fake.log.clear()
    assert ticker.seconds(run, 2) == pytest.approx(2.0)
    assert fake.log == ["flush", "event", "replay", "event"] * 2 + ["wait"]


def test_the_slow_are_timed_once_and_the_rest_in_turns():
    asked: list[str] = []
    times = {"a": 3.0, "b": 2.0, "c": 2.1}
    ticker = SimpleNamespace(seconds=lambda run, count: asked.append(run) or times[run] * count)
    found = timing.fastest_first({name: name for name in times}, ticker, seconds=1e9)
    assert list(found) == ["b", "c", "a"] and [len(of) for of in found.values()] == [7, 7, 1]
    assert asked[6:10] == ["c", "b", "b", "c"]
    short = timing.fastest_first({name: name for name in times}, ticker, seconds=1.0)
    assert len(short["b"]) == 3, "if the time is spent, the timing ends after three rounds"
