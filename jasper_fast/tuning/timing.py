"""Finds the fastest of several calls by timing them in turns. Clearly slow ones are timed only once."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from jasper_fast.kernels import capture

SAMPLE = 2e-3  # seconds per sample, far above the half microsecond that CUDA events resolve
MOST = 30  # calls per sample, at most
ROUNDS = 7
SECONDS = 1.5  # timing budget for all contenders of a cell together
SLOW = 1.3  # a contender whose time in the first round is over SLOW times the shortest one is not timed again


class Wall:
    """Times calls by the wall clock, on a CPU and on the stand-in device of the tests."""

    def warm(self, call: Callable[[], object]) -> None:
        """Runs `call` for the first time."""
        call()

    def prepare(self, call: Callable[[], object]) -> Callable[[], object]:
        """Returns the function that is timed in place of `call`: `call` itself, or its replay as a CUDA graph."""
        return call

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """Runs a prepared call `times` times and returns the seconds that this takes."""
        started = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - started


class Events(Wall):
    """Times calls by CUDA events, on a GPU. A call is captured as a CUDA graph, so that the host's launches do not
    count. L2 is overwritten before each call, because in a network other layers run in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._other = torch.empty(2 * max(l2, 1 << 24), dtype=torch.int8, device=device)

    def warm(self, call: Callable[[], object]) -> None:
        call()
        torch.cuda.synchronize(self._device)

    def prepare(self, call: Callable[[], object]) -> Callable[[], object]:
        graph, _ = capture.captured(call, self._device)
        graph.replay()
        torch.cuda.synchronize(self._device)
        return graph.replay

    def seconds(self, call: Callable[[], object], times: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for begin, end in pairs:
            self._other.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(self._device)
        return sum(begin.elapsed_time(end) for begin, end in pairs) * 1e-3


def fastest_first(
    runs: Mapping[str, Callable[[], object]],
    ticker: Wall,
    begin: Callable[[str], object] = lambda name: None,
    seconds: float = SECONDS,
) -> dict[str, list[float]]:
    """Times the prepared `runs` and returns their samples (seconds per call), ordered by their medians, fastest first.

    Contenders take turns for ROUNDS rounds. If the calls have taken more than `seconds` by the end of the third round
    or a later one, that round is the last. A contender whose time in the first round is over SLOW times the shortest
    one gets no second sample. `begin(name)` is called before each sample, so that a crash or a hang is blamed on the
    right contender.
    """

    def sample(name: str, times: int) -> float:
        begin(name)
        return ticker.seconds(runs[name], times) / times

    inner = {name: min(MOST, max(1, int(SAMPLE / max(sample(name, 1), 1e-9)))) for name in runs}
    samples = {name: [sample(name, times)] for name, times in inner.items()}
    near = [name for name, [spent] in samples.items() if spent <= SLOW * min(samples.values())[0]]
    for turn in range(ROUNDS - 1):
        for name in near if turn % 2 else near[::-1]:  # alternate the order, so that none always follows the same one
            samples[name].append(sample(name, inner[name]))
        if turn and sum(inner[name] * sum(of) for name, of in samples.items()) > seconds:
            break
    return dict(sorted(samples.items(), key=lambda item: statistics.median(item[1])))
