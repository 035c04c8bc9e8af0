"""Captures CUDA graphs, keeps one for each input shape, and orders the work on buffers that several streams share."""

import contextlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import is_not

import torch
from torch import Tensor, cuda

from jasper_fast.inference.plan import Buffers
from jasper_fast.kernels.capture import record


class CudaGraphs:
    """Captures launches on one CUDA device.

    Each graph has a memory pool of its own. On the triton and cuda faces the pool stays empty, because their launches
    allocate nothing. A shared pool would be destroyed with its last graph, and PyTorch would then refuse to capture
    into it.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"graphs=True needs a CUDA GPU, but the weights are on {device}; use graphs='auto'")
        self._stream = cuda.Stream(device)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Runs `launch` once on a side stream, which compiles and loads its kernels, and then captures it.

        Returns the function that replays the graph, on the stream that is current when it is called. Other threads may
        use the device during the capture, but not its default random generator, which PyTorch reserves for the capture.
        Raises RuntimeError if the launches cannot be captured.
        """
        current = cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        graph = cuda.CUDAGraph()
        with cuda.stream(self._stream):
            launch()
            current.wait_stream(self._stream)
            try:
                record(graph, launch)
            except Exception as error:
                raise RuntimeError(
                    f"the engine's launches could not be captured in a CUDA graph: {error}\n"
                    "use InferenceEngine(model, graphs=False), which has the same results without graphs"
                ) from error
        return graph.replay


class Turns:
    """Lets calls on different streams use the same buffers in turn. The caller must hold a lock."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: cuda.Stream | None = None
        self._last: cuda.Event | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Makes the device current, and lets its current stream wait for the work of the previous turn.

        Does nothing on a CPU.

        Raises RuntimeError if the caller is capturing a graph, because that graph could outlive the buffers.
        """
        if self.device.type != "cuda":
            yield
            return
        with cuda.device(self.device):
            if cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "InferenceEngine was called while a CUDA graph is captured, and that graph could outlive the "
                    "engine's buffers; call the engine outside of the capture, it makes its own graphs"
                )
            stream = cuda.current_stream(self.device)
            if self._last is None:
                self._last = cuda.Event()
            elif stream != self._stream:
                stream.wait_event(self._last)
            self._stream = stream
            try:
                yield
            finally:
                self._last.record(stream)

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """Lets the memory of `tensors` be reused only after the work queued so far. Call it within a turn."""
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(self._stream)

    def finish(self) -> None:
        """Makes the host wait until the work of all turns so far is done."""
        if self._stream is not None:
            self._stream.synchronize()


@dataclass(kw_only=True)
class Bound(ABC):
    """The launches for one (N, T), bound to the buffers. A graph captures `launch` and nothing else."""

    called: bool = False
    replay: Callable[[], None] | None = None
    made_with: tuple[object, ...] = ()  # what the graph depends on besides the buffers; kept alive as long as the graph

    @abstractmethod
    def launch(self) -> None:
        """Runs the launches."""


class Shapes:
    """The bound launches of the `limit` most recently used shapes.

    `graphs` captures their launches; if it is None, they run one by one. `patient`: capture at the second call of a
    shape, not at the first.
    """

    def __init__(self, turns: Turns, graphs: CudaGraphs | None, *, patient: bool, limit: int) -> None:
        self.turns, self.graphs, self.patient = turns, graphs, patient
        self._limit = limit
        self.held: OrderedDict[tuple[int, int], Bound] = OrderedDict()

    def bound(
        self, shape: tuple[int, int], buffers: Callable[[], dict[Buffers, dict[str, int]]], bind: Callable[[], Bound]
    ) -> Bound:
        """Returns the bound launches of a shape. At the first use of a shape, makes the buffers as large as `buffers()`
        says and calls `bind`."""
        if shape in self.held:
            self.held.move_to_end(shape)
            return self.held[shape]
        replaced = [old for held, sizes in buffers().items() for old in held.reserve(sizes)]
        if replaced:
            self._forget(len(self.held))
            self.turns.drop(replaced)
        self._forget(len(self.held) + 1 - self._limit)
        self.held[shape] = bind()
        return self.held[shape]

    def play(self, bound: Bound, dependences: Callable[[], tuple[object, ...]]) -> None:
        """Runs the launches, as a CUDA graph if the shape has one or should get one now.

        `dependences()` returns the objects on which a graph captured now would depend. If they are not those in
        `made_with`, the graph is captured again.
        """
        if self.graphs is None or (self.patient and not bound.called):
            bound.called = True
            bound.launch()
            return
        if bound.replay is not None and any(map(is_not, bound.made_with, dependences())):
            self.turns.finish()
            bound.replay = None
        if bound.replay is None:
            bound.replay = self.graphs.capture(bound.launch)
            bound.made_with = dependences()
        bound.replay()

    def _forget(self, count: int) -> None:
        """Drops the `count` least recently used shapes and their graphs."""
        if count <= 0 or not self.held:
            return
        if self.graphs is not None:
            self.turns.finish()  # a graph must not be freed while it runs
        for _ in range(count):
            self.held.popitem(last=False)
