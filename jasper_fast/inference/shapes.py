"""The input shapes that an engine has seen: for each, the launches bound to its buffers, and their CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import is_not
from typing import Protocol

from jasper_fast.inference.graphs import CudaGraphs, Turns
from jasper_fast.inference.plan import Buffers


class Bound(Protocol):
    """The launches for one (N, T), bound to the buffers. A graph captures `launch` and nothing else."""

    called: bool
    replay: Callable[[], None] | None
    made_with: tuple[object, ...]  # what else the graph depends on; kept alive as long as the graph

    def launch(self) -> None:
        """Run the launches."""


class Shapes:
    """The `limit` most recently used shapes.

    `graphs` captures their launches; with None they are launched one by one. `patient`: capture at a shape's second
    call, not at its first.
    """

    def __init__(self, turns: Turns, graphs: CudaGraphs | None, *, patient: bool, limit: int) -> None:
        self.turns, self.graphs, self.patient = turns, graphs, patient
        self._limit = limit
        self.held: OrderedDict[tuple[int, int], Bound] = OrderedDict()

    def bound(
        self, shape: tuple[int, int], buffers: Callable[[], dict[Buffers, dict[str, int]]], bind: Callable[[], Bound]
    ) -> Bound:
        """The bound launches of a shape, made by `bind` at its first use, after `buffers()` have grown to the elements
        that the shape needs."""
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
        """Run the launches, as a CUDA graph if the shape has one or should get one now.

        `dependences()` is what a graph captured now would depend on; if it differs from `made_with`, capture anew.
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
        """Drop the `count` shapes that were used longest ago, with their graphs."""
        if count <= 0 or not self.held:
            return
        if self.graphs is not None:
            self.turns.finish()  # a graph must not be freed while it runs
        for _ in range(count):
            self.held.popitem(last=False)
