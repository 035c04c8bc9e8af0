"""A stand-in for CUDA graphs on a CPU: it records what a step launches and replays it into the memory of the capture.

As on a GPU, a capture changes no tensor, and a replay runs no Python code of the step: it repeats the recorded
operations and Triton launches on the same memory. During a capture it is an error if the host reads a tensor, or copies
a number into one. A replay fails if memory that it uses was allocated before the capture and has been freed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from standins import READS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jasper_fast.kernels import launch

FORBIDDEN = (*READS, "lift_fresh")  # lift_fresh makes a tensor from a number on the host
MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def tensors(of: Any) -> list[Tensor]:
    return [x for x in tree_leaves(of) if isinstance(x, Tensor)]


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """The record of one capture. `state` returns all tensors that a step changes; they are restored after the
    capture. A capture raises RuntimeError if the step does something that a CUDA graph cannot record."""

    def __init__(self, monkeypatch, state: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()
        self._patch, self._state = monkeypatch, state
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []
        self.made: set[int] = set()  # storages that the capture allocated
        self.outside: set[int] = set()  # other storages that the recorded calls use

    def capture(self, step: Callable[[], Any]) -> Any:
        before = [(x, x.detach().clone()) for x in self._state()]
        rng, run = torch.get_rng_state(), launch.run
        self._patch.setattr(launch, "run", self._launched)
        try:
            with self:
                return step()
        finally:
            self._patch.setattr(launch, "run", run)
            torch.set_rng_state(rng)
            with torch.no_grad():
                for x, old in before:
                    x.copy_(old)

    def _launched(self, kernel, grid, like, *args, **meta) -> None:
        self._note(args)
        self.calls.append((_run, (kernel, grid, like, *args), meta, None))

    def _note(self, args: Any) -> None:
        self.outside |= {place(x) for x in tensors(args)} - self.made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in FORBIDDEN:
            raise RuntimeError(f"{name}: the host and the device wait for each other")
        if func.namespace == "jasper_fast":  # record the operations and launches inside the op
            with self:
                return func.redispatch(CPU_KEY, *args, **kwargs)
        self._note((args, kwargs))
        out = func(*args, **kwargs)
        given = {place(x) for x in tensors((args, kwargs))}
        fresh = [x.detach() for x in tensors(out) if place(x) not in given]
        self.made |= {place(x) for x in fresh}
        views = not fresh and not any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if not views and name not in MEMORY:
            self.calls.append((func, args, kwargs, fresh))
        return out

    def replay(self, held: Iterable[Tensor]) -> None:
        """Repeats the recorded calls; `held`: all tensors that are still referenced."""
        lost = self.outside - {place(x) for x in held}
        assert not lost, f"{len(lost)} of the {len(self.outside)} inputs of the graph have been freed"
        with torch.no_grad():
            for func, args, kwargs, fresh in self.calls:
                out = func(*args, **kwargs)
                if fresh:
                    given = {place(x) for x in tensors((args, kwargs))}
                    for to, x in zip(fresh, (x for x in tensors(out) if place(x) not in given), strict=True):
                        to.copy_(x)


_run = launch.run


class TapeRecorder:
    """Stands in for `graphed.CudaRecorder`. `held` returns all tensors that model, optimiser and graphs hold."""

    def __init__(
        self, monkeypatch, state: Callable[[], Iterable[Tensor]], held: Callable[[], Iterable[Tensor]]
    ) -> None:
        self._patch, self._state, self._held = monkeypatch, state, held
        self.tapes: list[Tape] = []
        self.replays = 0

    def capture(self, step: Callable[[], Any], alone: bool) -> tuple[Any, Callable[[], None]]:
        tape = Tape(self._patch, self._state)
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay(self._held())

        return tape.capture(step), replay
