"""Captures CUDA graphs. Copies from the host that a capture would include are put off until its end."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ROOM = 1 << 20  # bytes for what is sent during one capture; the tables of Jasper 10x5 need a tenth of that
_ALIGNED = 256
_local = threading.local()


def record(graph: torch.cuda.CUDAGraph, launch: Callable[[], Any], pool: Any = None) -> Any:
    """Captures what `launch` launches on the current stream into `graph`, and returns the result of `launch`.

    The current stream must not be the default stream. `pool` is the graph's memory pool, by default a new one. If
    `launch` or the capture fails, the allocator is released for other captures and the error is raised. Garbage
    collection is off during the capture, because freeing a graph or an event could break it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        if pool is None and torch.cuda.is_available():
            # After a failure `_end` needs the pool's handle, and a graph whose capture failed does not give it.
            pool = torch.cuda.graph_pool_handle()
        # With "thread_local", an allocation by another thread, such as a data loader, does not break the capture.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = launch()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the error of `launch` says more than that of the broken capture
                _end(graph, pool)
            raise
        _end(graph, pool)
        return result
    finally:
        if enabled:
            gc.enable()


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Ends a capture. If this fails, makes PyTorch's allocator stop allocating from `pool`, and raises the error."""
    try:
        graph.capture_end()
    except RuntimeError:
        if pool is not None:
            device = torch.cuda.current_device()
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
        raise


def captured(
    call: Callable[[], Any], device: torch.device | None = None, before: int = 1
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures `call` as a CUDA graph. Returns the graph, and what `call` returned during the capture.

    Before the capture, `call` runs `before` times on a side stream, so that one-time work is not captured.
    """
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(before):
            call()
        torch.cuda.synchronize(device)
        result = record(graph, call)
    torch.cuda.current_stream(device).wait_stream(side)
    return graph, result


def sent(
    rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device, out: Tensor | None = None
) -> Tensor:
    """Returns `rows` of numbers as a tensor on `device`, in the memory of `out` if given, without waiting for `device`.

    A captured copy would be repeated in every replay, from host memory that may have other contents by then. Therefore
    inside `put_off` the copy is made at the end of that context, into memory that was allocated before the capture.
    Raises RuntimeError if that memory is too small.
    """
    waiting = getattr(_local, "waiting", None)
    if out is None:
        shape = len(rows), len(rows[0])
        out = torch.empty(shape, dtype=dtype, device=device) if waiting is None else _cut(_local.room, shape, dtype)

    def send() -> None:
        out.copy_(torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda"), non_blocking=True)

    send() if waiting is None else waiting.append(send)
    return out


def _cut(room: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Cuts memory for a tensor of `shape` from the front of `room[0]`, and returns it."""
    count = shape[0] * shape[1] * dtype.itemsize
    if count > len(room[0]):
        raise RuntimeError(f"the tables that the host sends to a captured step take more than {ROOM} bytes")
    mine, room[0] = room[0][:count], room[0][-(-count // _ALIGNED) * _ALIGNED :]
    return mine.view(dtype).view(shape)


@contextlib.contextmanager
def put_off(device: torch.device) -> Iterator[None]:
    """A context for a capture on `device`. Calls of `sent` by this thread inside it make their copies when it ends.

    If the context ends with an error, nothing is copied. The memory for the copies is allocated before the capture,
    outside the graph's pool. Graphs that share a pool overwrite each other's memory, but these tensors must last from
    one replay to the next.
    """
    _local.waiting = waiting = []
    _local.room = [torch.empty(ROOM, dtype=torch.uint8, device=device)]
    try:
        yield
    finally:
        _local.waiting = _local.room = None
    for send in waiting:
        send()
