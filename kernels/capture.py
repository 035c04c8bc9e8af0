"""The making of CUDA graphs: launches are captured, and what the host sends to the device waits until afterwards."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ROOM = 1 << 20  # bytes for what is sent during one capture; the tables of Jasper 10x5 take a tenth
_ALIGNED = 256
_local = threading.local()


def record(graph: torch.cuda.CUDAGraph, launch: Callable[[], Any], pool: Any = None) -> Any:
    """Captures `launch` on the current stream, which is not the default one, and returns what it returns.

    `pool`: the memory pool of the graph, a pool of its own by default. If `launch` fails, or the capture itself, the
    allocator is set free for other captures, and the error is raised.

    No collection of garbage comes between, because freeing a graph or an event could break a capture.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        if pool is None and torch.cuda.is_available():
            pool = torch.cuda.graph_pool_handle()  # a handle of ours: a broken capture does not tell its own
        # thread_local: an allocation by another thread, such as a data loader, does not break the capture
        how = {} if pool is None else {"pool": pool}
        graph.capture_begin(**how, capture_error_mode="thread_local")
        try:
            result = launch()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # its error says more than that of the broken capture
                _end(graph, pool)
            raise
        _end(graph, pool)
        return result
    finally:
        if enabled:
            gc.enable()


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Ends a capture. If that fails, PyTorch leaves its allocator directing memory into `pool`: end that too."""
    try:
        graph.capture_end()
    except RuntimeError:
        if pool is not None:
            device = torch.cuda.current_device()
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
        raise


def sent(
    rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device, out: Tensor | None = None
) -> Tensor:
    """`rows` of numbers as a tensor on `device`, in the memory of `out` where it is given, without waiting for it.

    Inside `put_off` the copy waits until it ends: in a graph it would come with every replay, from host memory that may
    hold something else by then. The memory then comes from before the capture. Raises RuntimeError if that is too
    small.
    """
    if out is None:
        shape = len(rows), len(rows[0])
        room = getattr(_local, "room", None)
        out = torch.empty(shape, dtype=dtype, device=device) if room is None else _cut(room, shape, dtype)

    def send() -> None:
        made = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
        out.copy_(made, non_blocking=True)

    waiting = getattr(_local, "waiting", None)
    send() if waiting is None else waiting.append(send)
    return out


def _cut(room: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Memory of `shape` from the front of `room[0]`, which loses it."""
    count = shape[0] * shape[1] * dtype.itemsize
    if count > len(room[0]):
        raise RuntimeError(f"what the host sends to a captured step takes more than {ROOM} bytes")
    mine, room[0] = room[0][:count], room[0][-(-count // _ALIGNED) * _ALIGNED :]
    return mine.view(dtype).view(shape)


@contextlib.contextmanager
def put_off(device: torch.device) -> Iterator[None]:
    """For the time of a capture on `device`: what this thread sends inside waits until the end; an error drops it.

    Its memory is allocated before the capture. A graph's own memory would not do, because graphs that share a pool
    overwrite each other's, and these tensors must last from one replay to the next.
    """
    _local.waiting = waiting = []
    _local.room = [torch.empty(ROOM, dtype=torch.uint8, device=device)]
    try:
        yield
    finally:
        _local.waiting = _local.room = None
    for send in waiting:
        send()
