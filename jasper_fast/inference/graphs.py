"""CUDA graphs, and the order of streams on buffers that belong to nobody's stream."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, cuda


class CudaGraphs:
    """Captures launches on one CUDA device: launches that allocate nothing, so that each graph's own pool stays empty.

    A pool that graphs share dies with the last of them, and PyTorch refuses to capture into a dead one.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"graphs=True needs a CUDA GPU, and the weights are on {device}; take graphs='auto'")
        self._stream = cuda.Stream(device)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Run `launch` once on a side stream, which compiles and loads its kernels, then capture it.

        Returns the replay, which runs on the stream that is current then. Other threads may use the device meanwhile,
        but draw nothing from its default random generator: PyTorch lends it to every capture, and then refuses others.
        Raises RuntimeError where the launches cannot be captured.
        """
        current = cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        graph = cuda.CUDAGraph()
        with cuda.stream(self._stream):
            launch()
            current.wait_stream(self._stream)
            try:
                with _no_collection():
                    self._record(graph, launch)
            except Exception as error:
                raise RuntimeError(
                    f"the engine's launches could not be captured in a CUDA graph: {error}\n"
                    "InferenceEngine(model, graphs=False) runs without graphs, with the same results"
                ) from error
        return graph.replay

    def _record(self, graph: cuda.CUDAGraph, launch: Callable[[], None]) -> None:
        # thread_local: another thread's allocation, say a data loader's, does not break the capture
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the launch's own error says more than that of the broken capture
                graph.capture_end()
            raise
        graph.capture_end()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: what it frees, a graph or an event, could break off a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Turns:
    """One user of shared buffers after another, whatever streams they are on; the caller holds a lock."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: cuda.Stream | None = None
        self._last: cuda.Event | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Makes the current stream wait for the last turn's work, and its device the current one; on a CPU nothing.

        Raises RuntimeError where the caller is capturing a graph: that one would outlive the buffers.
        """
        if self.device.type != "cuda":
            yield
            return
        with cuda.device(self.device):
            if cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "InferenceEngine was called while a CUDA graph is captured, which would outlive the engine's "
                    "buffers: call it outside of the capture, it makes graphs of its own"
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
        """Within a turn: the memory of `tensors`, which nobody needs any more, outlives the work queued so far."""
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(self._stream)

    def finish(self) -> None:
        """Within a turn: wait on the host until all work queued so far is done."""
        if self._stream is not None:
            self._stream.synchronize()
