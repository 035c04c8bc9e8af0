"""What the fused blocks of an encoder share during a forward pass: prepared block outputs, and their Gram matrices.

A dense block reads its input and the inputs of the dense blocks before it. Without sharing, it would mask and cast
each of these block outputs again, and would compute the statistics of its panes (1x1 residual convs) from the outputs
of the panes. When blocks share, each block output is prepared once. In the Gram form, its one Gram matrix serves all
blocks that read the block output.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from itertools import takewhile

import torch
from torch import Tensor, nn

from jasper_fast import ops
from jasper_fast.nn.block import reads_gram
from jasper_fast.nn.recognise import Parts, parts
from jasper_fast.ops import sync


class Shared:
    """The prepared block outputs and Gram matrices of `blocks`, which are in the order of their calls. Raises Unfit if
    a block cannot be fused."""

    def __init__(self, blocks: list[nn.Module]):
        self.parts = {id(block): parts(block) for block in blocks}
        self._order = list(self.parts.values())
        self._ready: dict[tuple, tuple[Tensor, Tensor | None, Tensor]] = {}
        self._grams: dict[tuple, tuple[Tensor, ops.Gram]] = {}

    def ready(self, x: Tensor, lengths: Tensor | None, make: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """Returns `make(x, lengths)`, which is computed only once for the same `x` and `lengths`."""
        key = id(x), x._version, id(lengths)
        if key not in self._ready:
            self._ready[key] = x, lengths, make(x, lengths)  # kept alive, so that no other tensor gets their ids
        return self._ready[key][2]

    def gram(self, found: Parts, pane: int, x: Tensor, backend: str) -> ops.Gram | None:
        """Returns the Gram matrix of `x` with the statistics of `pane` of block `found`; None if that pane needs none.

        The first call for `x` also computes the statistics for all later blocks that read `x`.
        """
        bn = found.panes[pane][1]
        if not reads_gram(bn, x, backend, "auto"):
            return None
        key = id(x), id(found), pane
        if key not in self._grams:
            group = sync.group_of(bn)
            later = [
                of
                for of in self._readers(found, pane)
                if reads_gram(of.panes[pane][1], x, backend, "auto")
                and of.panes[pane][0].in_channels == x.shape[1]
                and sync.group_of(of.panes[pane][1]) is group
            ]
            stats = ops.pane_stats(ops.gram(x, group), [of.panes[pane][0].weight for of in later])
            self._grams.update({(id(x), id(of), pane): (x, gram) for of, gram in zip(later, stats, strict=True)})
        return self._grams[key][1]

    def _readers(self, found: Parts, pane: int) -> list[Parts]:
        """Returns `found` and the blocks after it whose `pane` reads the same block output."""
        if not found.dense or found not in self._order:
            return [found]
        after = self._order[self._order.index(found) :]
        return list(takewhile(lambda of: of.dense and len(of.panes) > pane, after))


_shared: ContextVar[Shared | None] = ContextVar("jasper_fast_shared", default=None)


def shared() -> Shared | None:
    """Returns the `Shared` of the encoder whose forward is running, or None if none is.

    It is also None under torch.compile, and under saved-tensor hooks. Activation checkpointing uses such hooks, and its
    second pass must repeat the same computation.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    return _shared.get()


@contextlib.contextmanager
def sharing(made: Shared) -> Iterator[None]:
    """A context for the forward pass of the encoder whose blocks share `made`."""
    token = _shared.set(made)
    try:
        yield
    finally:
        _shared.reset(token)
