"""The shapes that an engine knows: what is bound to its buffers for each, and each one's graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import is_not
from typing import Protocol

from jasper_fast.inference.graphs import CudaGraphs, Turns
from jasper_fast.inference.plan import Buffers


class Bound(Protocol):
    """One (N, T) bound to the buffers. `launch` is all that a graph may hold; the rest is kept here for it."""

    called: bool
    replay: Callable[[], None] | None
    made_with: tuple[object, ...]  # what the graph depends on beside the buffers: alive while it is

    def launch(self) -> None:
        """Run it."""


class Shapes:
    """At most `limit` shapes, those used last. `graphs`: what captures their launches; None launches them one by one.
    `patient`: not before a shape's second call."""

    def __init__(self, turns: Turns, graphs: CudaGraphs | None, *, patient: bool, limit: int) -> None:
        self.turns, self.graphs, self.patient = turns, graphs, patient
        self._limit = limit
        self.held: OrderedDict[tuple[int, int], Bound] = OrderedDict()

    def bound(
        self, shape: tuple[int, int], buffers: Callable[[], dict[Buffers, dict[str, int]]], bind: Callable[[], Bound]
    ) -> Bound:
        """What `bind` makes of a shape, once; `buffers` grow first where they have less room than these elements."""
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
        """Launch what is bound, as a graph where it is time for one; `dependences`: as its `made_with`, now."""
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
            self.turns.finish()  # a graph must not go while it runs
        for _ in range(count):
            self.held.popitem(last=False)
