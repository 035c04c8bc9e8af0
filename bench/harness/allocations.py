"""Counts the bytes that a forward pass keeps for backward, and the peak of allocated bytes."""

import gc
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from jasper_fast.bench.harness.kineto import recorded


class Births(TorchDispatchMode):
    """Records the storages that ops create, and the largest number of their bytes that were alive together (`peak`).

    A storage counts once, however many views it has. Storages in `before` do not count, and in the peak the gradients
    of `parameters` do not count either. The storages are kept as weak references, so that they can be freed. A tensor
    that is created and freed inside a custom op does not count here; only the function `peak` counts it.
    """

    def __init__(self, device_type: str, before: dict[int, StorageWeakRef]) -> None:
        super().__init__()
        self.device_type, self.before = device_type, before
        self.parameters: list[nn.Parameter] = []
        self.born: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = len(self.born)
        for t in tree_iter((args, kwargs, out)):
            if isinstance(t, Tensor) and t.device.type == self.device_type:
                storage = t.untyped_storage()
                if storage._cdata not in self.before and storage._cdata not in self.born:
                    self.born[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if len(self.born) > known:
            gradients = {p.grad.untyped_storage()._cdata for p in self.parameters if p.grad is not None}
            self.peak = max(self.peak, self.alive(but=gradients))
        return out

    def alive(self, but: Collection[int] = ()) -> int:
        """Returns the bytes of the storages that were created and are still alive, except those at the addresses
        `but`."""
        for key in [key for key, (ref, _) in self.born.items() if ref.expired()]:
            del self.born[key]
        return sum(nbytes for key, (_, nbytes) in self.born.items() if key not in but)


def reachable(device_type: str) -> dict[int, torch.UntypedStorage]:
    """Returns the storages of all tensors on the device that Python can reach now, by address."""
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    storages = (t.untyped_storage() for t in tensors if t.device.type == device_type and t.layout == torch.strided)
    return {storage._cdata: storage for storage in storages}


def kept(forward: Callable[[], Tensor], device: torch.device) -> tuple[int, Births, Tensor]:
    """Runs `forward`; returns (bytes kept for backward, the `Births`, the loss). The loss keeps the graph alive."""
    gc.collect()
    births = Births(device.type, {key: StorageWeakRef(s) for key, s in reachable(device.type).items()})
    with births:
        loss = forward()
    gc.collect()
    alive, known = births.alive(), births.before.keys() | births.born.keys()
    hidden = sum(s.nbytes() for key, s in reachable(device.type).items() if key not in known)
    return alive + hidden, births, loss


def peak(work: Callable[[], object], device_type: str, parameters: Collection[nn.Parameter] = ()) -> int:
    """Runs `work`; returns the most bytes that it has allocated at the same time on the device. The gradients of
    `parameters` do not count.

    Every allocation by PyTorch's allocators counts, including those in C++ and in custom ops. Memory that an op takes
    directly from the system does not count. Such memory is some scratch memory of oneDNN, and 0.3 MiB per thread of our
    CPU kernels at Jasper 10x5.
    """
    with recorded([ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    left, events = profiler.profiler.kineto_results.experimental_event_tree(), []
    while left:  # a loop, because the tree of events can be deeper than Python's recursion limit
        event = left.pop()
        left += event.children
        if event.typed[0] == _EventType.Allocation and event.typed[1].device.type == device_type:
            events.append(event)
    return most_alive(
        [(e.typed[1].ptr, e.typed[1].alloc_size) for e in sorted(events, key=lambda e: e.start_time_ns)],
        but={p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None},
    )


def most_alive(events: Sequence[tuple[int, int]], but: Collection[int] = ()) -> int:
    """Returns the most bytes alive at the same time, from a list of (address, bytes). Positive bytes are an allocation,
    negative bytes a free.

    Frees of memory that was allocated before the list begins do not count. The last allocation at each of the addresses
    `but` does not count either.
    """
    alive: dict[int, int] = {}
    last = {address: i for i, (address, nbytes) in enumerate(events) if nbytes > 0 and address in but}
    total = most = 0
    for i, (address, nbytes) in enumerate(events):
        if nbytes > 0 and last.get(address) != i:
            alive[address] = nbytes
            total += nbytes
            most = max(most, total)
        elif nbytes < 0:
            total -= alive.pop(address, 0)
    return most
