"""The making of CUDA graphs: launches are captured, and what the host sends to the device waits until afterwards."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_local = threading.local()


def record(graph: torch.cuda.CUDAGraph, launch: Callable[[], Any], pool: Any = None) -> Any:
    """Captures `launch` on the current stream, which is not the default one; gives what it returns. `pool`: of memory.

    No collection of garbage comes between, because freeing a graph or an event could break a capture.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        # thread_local: an allocation by another thread, such as a data loader, does not break the capture
        how = {} if pool is None else {"pool": pool}
        graph.capture_begin(**how, capture_error_mode="thread_local")
        try:
            result = launch()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # its error says more than that of the broken capture
                graph.capture_end()
            raise
        graph.capture_end()
        return result
    finally:
        if enabled:
            gc.enable()


def sent(
    rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device, out: Tensor | None = None
) -> Tensor:
    """`rows` of numbers as a tensor on `device`, in the memory of `out` where it is given, without waiting for it.

    Inside `put_off()` there is only the memory, until it ends: in a graph the copy would come with every replay, from
    host memory that may hold something else by then.
    """
    if out is None:
        out = torch.empty((len(rows), len(rows[0])), dtype=dtype, device=device)

    def send() -> None:
        made = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
        out.copy_(made, non_blocking=True)

    waiting = getattr(_local, "waiting", None)
    send() if waiting is None else waiting.append(send)
    return out


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """In this thread what is `sent` inside goes afterwards, but not after an error: for the time of a capture."""
    _local.waiting = waiting = []
    try:
        yield
    finally:
        _local.waiting = None
    for send in waiting:
        send()
