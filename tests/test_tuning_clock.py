"""How the tuner times its contenders: in turns, as CUDA graphs, with an emptied L2 cache before each call."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from jasper_fast.tuning import timing


def fake_cuda() -> SimpleNamespace:
    """Returns a stand-in for torch.cuda. Its `log` lists what happens, in order; each entry counts as one second."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(log)
            log.append("event")

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at - 1)  # milliseconds: one second for each entry in between

    @contextlib.contextmanager
    def stream(stream):
        log.append("side")
        yield

    new_stream = lambda device: SimpleNamespace(wait_stream=lambda other: None)  # noqa: E731
    of_graph = ("capture_begin", "capture_end", "replay")
    return SimpleNamespace(
        log=log,
        Event=Event,
        CUDAGraph=lambda: SimpleNamespace(**{name: lambda name=name, **_: log.append(name) for name in of_graph}),
        Stream=new_stream,
        current_stream=new_stream,
        stream=stream,
        synchronize=lambda device: log.append("wait"),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1 << 10),
        is_available=lambda: False,
    )


def test_a_gpus_clock_times_a_captured_call_and_not_what_empties_the_cache(monkeypatch):
    fake = fake_cuda()
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
