"""CUDA graphs, and the order of work on buffers that several streams share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, cuda

from jasper_fast.kernels.capture import record


class CudaGraphs:
    """Captures launches on one CUDA device. The launches allocate nothing, so the memory pool of each graph stays
    empty.

    Graphs do not share a pool, because it is destroyed with the last graph and PyTorch then refuses to capture into it.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"graphs=True needs a CUDA GPU, and the weights are on {device}; take graphs='auto'")
        self._stream = cuda.Stream(device)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Run `launch` once on a side stream, which compiles and loads its kernels, then capture it.

        Returns the replay function, which runs on the stream that is current when it is called. Other threads may use
        the device during the capture, but not its default random generator, which PyTorch reserves for the capture.
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
                    "InferenceEngine(model, graphs=False) runs without graphs, with the same results"
                ) from error
        return graph.replay


class Turns:
    """Lets users of shared buffers take turns, on any streams; the caller holds a lock."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: cuda.Stream | None = None
        self._last: cuda.Event | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Makes the device current and its current stream wait for the work of the last turn; does nothing on a CPU.

        Raises RuntimeError if the caller is capturing a graph, which would outlive the buffers.
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
        """Within a turn: frees `tensors`, which are no longer needed, but only after the work queued so far."""
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(self._stream)

    def finish(self) -> None:
        """Within a turn: wait on the host until all work queued so far is done."""
        if self._stream is not None:
            self._stream.synchronize()
