"""Keeps, for each input shape that an engine has seen, the launches bound to its buffers and their CUDA graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_not

from jasper_fast.inference.graphs import CudaGraphs, Turns
from jasper_fast.inference.plan import Buffers


@dataclass(kw_only=True)
class Bound(ABC):
    """The launches for one (N, T), bound to the buffers. A graph captures `launch` and nothing else."""

    called: bool = False
    replay: Callable[[], None] | None = None
    made_with: tuple[object, ...] = ()  # other objects on which the graph depends, kept alive as long as the graph

    @abstractmethod
    def launch(self) -> None:
        """Runs the launches."""


class Shapes:
    """The `limit` most recently used shapes.

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
