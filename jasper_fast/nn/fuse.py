"""Fused sub-blocks for an existing Jasper model: NVIDIA's, NeMo's, or this project's eager one.

A block keeps its modules, parameters and buffers. Only its class is replaced, by a subclass whose forward runs the
fused ops. Copies and pickles have that class too, and unfuse restores the original one.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from jasper_fast import ops
from jasper_fast.dispatch import backends
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.nn.block import JasperBlock, momentum_of, of_the_batch
from jasper_fast.nn.packs import Packs
from jasper_fast.nn.recognise import LOOKED_FOR, Parts, Unfit, candidates, parts
from jasper_fast.nn.shared import Shared, shared
from jasper_fast.ops import sync
from jasper_fast.ops.conv1d_op import autocast

STATE = "_jasper_fast"  # the attribute of a fused module with our state: (backend, Packs) for a block
ENCODER = "its blocks are fused, but in evaluation it cannot run as one: "  # begins every reason given for an encoder


@dataclass(frozen=True)
class Report:
    """What `fuse` did, by module names.

    fused: blocks that run fused ops. whole: encoders that run on an `InferenceEngine` in evaluation. left: (name,
    reason) of unchanged blocks, and of encoders that run their fused blocks one by one.
    """

    fused: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    _wholes: list[weakref.ref] = field(default_factory=list, repr=False, compare=False)  # `refresh` drops their engines

    def refresh(self) -> None:
        """Makes the encoders in `whole` fold their weights again at their next evaluation.

        Needed only if weights were changed between two evaluation calls in a way that PyTorch does not record, as by
        `p.data.mul_(2)`.
        """
        for whole in self._wholes:
            if (held := whole()) is not None:
                held.drop()

    def data(self) -> dict[str, list]:
        """Returns the report as a dictionary of lists, for JSON."""
        return {"fused": [*self.fused], "whole": [*self.whole], "left": [*self.left]}

    def __str__(self) -> str:
        blocks = self.fused + [name for name, reason in self.left if not reason.startswith(ENCODER)]
        lines = [f"{len(self.fused)} of {len(blocks)} blocks run fused sub-blocks"]
        lines += [f"in evaluation one engine runs {name or 'the model'}" for name in self.whole]
        return "\n".join([*lines, *(f"left alone: {name}: {reason}" for name, reason in self.left)])


def survey(model: nn.Module, backend: str) -> tuple[Report, list[tuple[str, nn.Module]]]:
    """Returns what `fuse` would do with the blocks in `model`, and a list of all (name, block). Changes nothing.

    Raises ValueError for a model without such blocks, and BackendMissing for a backend that cannot run here.
    """
    backends.require(backend)
    found = list(candidates(model))
    if not found:
        fused = any(isinstance(m, JasperBlock) for m in model.modules())
        ours = "; its blocks are jasper_fast's own, which are already fused" if fused else ""
        raise ValueError(f"no Jasper blocks in {type(model).__name__}: looked for {LOOKED_FOR}{ours}")
    report = Report()
    for name, block in found:
        try:
            if "forward" in vars(block):
                raise Unfit("a forward method was set on the block itself")
            parts(block)
            report.fused.append(name)
        except Unfit as reason:
            report.left.append((name, str(reason)))
    return report, found


def fuse_block(block: nn.Module, backend: str) -> None:
    """Gives `block` the fused forward. `parts` must be able to take the block apart."""
    vars(block)[STATE] = (backend, Packs())
    become(block, FusedBlock)


def become(module: nn.Module, kind: type[Before]) -> None:
    """Replaces the class of `module` by a subclass of both `kind` and its own class."""
    module.__class__ = _fused_class(kind, type(module))


def give_back(model: nn.Module) -> None:
    """Restores the original class of every module in `model` that `become` changed."""
    for module in model.modules():
        if isinstance(module, Before):
            module.__class__ = type(module).__bases__[1]
            del vars(module)[STATE]


class Before:
    """A mixin that comes before a module's own class. Copying and pickling store these two classes and join them
    again."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _new, type(self).__bases__, *state


class FusedBlock(Before):
    """A block whose forward runs the fused ops."""

    def forward(self, *args, **kwargs):
        given = (*args, *kwargs.values())
        if len(given) == 1 and isinstance(given[0], tuple):  # NeMo passes one tuple
            given = given[0]
        xs, lengths = (*given, None)[:2]
        try:
            if "forward" in vars(self):
                raise Unfit("a forward method was set on the block itself")
            known = shared()
            found = known.parts.get(id(self)) if known else None
            return _run(found or parts(self), *vars(self)[STATE], xs, lengths, known)
        except Unfit as reason:
            raise RuntimeError(
                f"a fused block changed so that fused ops cannot compute it any more ({reason}): call "
                "jasper_fast.fuse(model) again to leave that block unfused"
            ) from None


@functools.cache
def _fused_class(kind: type[Before], own: type) -> type:
    """Makes a subclass of `own` with the same name, so that the model prints as before."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (kind, own), names)


def _new(kind: type[Before], own: type) -> nn.Module:
    """Makes an empty module of both classes, for pickle."""
    made = _fused_class(kind, own)
    return made.__new__(made)


def _run(
    found: Parts, backend: str, packs: Packs, xs: list[Tensor], lengths: Tensor | None, known: Shared | None
) -> tuple[list[Tensor], Tensor | None]:
    """Returns the outputs and lengths that the original block returns for block outputs `xs` and `lengths` (N,)."""
    steps = [lengths if found.masked else None]
    for sub in found.sub_blocks:
        steps.append(frames(sub.in_time, steps[-1]))
    sources = xs if found.dense else xs[-1:]
    if found.panes and (len(sources) != len(found.panes) or (len(xs) > len(sources) and not found.takes_last)):
        raise ValueError(f"a block with {len(found.panes)} residual convs was given {len(xs)} block outputs")
    sources = [known.ready(x, steps[0], _clean) if known else _clean(x, steps[0]) for x in sources]
    out = _Computation(found, backend, packs, steps, known)(sources[-1], sources if found.panes else [])
    if steps[-1] is not None and not torch.compiler.is_compiling() and not out.is_inference():
        out._jasper_fast_zero = (steps[-1], out._version)  # the next block then need not mask it
    passed = lengths if found.keeps_lengths and not found.masked else steps[-1]
    return ([*xs, out] if found.dense else [out]), passed


def frames(conv: nn.Conv1d, lengths: Tensor | None) -> Tensor | None:
    """Returns the frames of the conv's output; `lengths` itself if they do not change."""
    (k,), (s,), (d,), (p,) = conv.kernel_size, conv.stride, conv.dilation, conv.padding
    if lengths is None or (s == 1 and 2 * p == d * (k - 1)):
        return lengths
    return torch.div(lengths + (2 * p - d * (k - 1) - 1), s, rounding_mode="floor") + 1


def _clean(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Returns `x` (N, C, T) in NTC memory and autocast's dtype, with zeros at t >= `lengths`."""
    if lengths is not None and not _known_zero(x, lengths):
        x = mask(x, lengths.to(x.device))
    return ntc(autocast(x))


def _known_zero(x: Tensor, lengths: Tensor) -> bool:
    """Returns whether `x` is the output of a fused block for the same lengths, and has not been written to since."""
    if torch.compiler.is_compiling():
        return False
    known, version = getattr(x, "_jasper_fast_zero", (None, None))
    return known is lengths and version == x._version


class _Computation:
    """One forward pass of a block, as `JasperBlock` computes it. Panes are plain if the block shares nothing."""

    pane_sum, _batch_sum, _is_gram = JasperBlock.pane_sum, JasperBlock._batch_sum, JasperBlock._is_gram

    def __init__(self, found: Parts, backend: str, packs: Packs, steps: list[Tensor | None], known: Shared | None):
        self.found, self.known, self.pane_form = found, known, "auto" if known else "plain"
        self.subs, self.backend, self.packs, self._panes = found.sub_blocks, backend, packs, found.panes
        self.steps = [None if n is None else n.to(found.sub_blocks[0].conv.weight.device, torch.int64) for n in steps]

    def panes(self) -> list[tuple[nn.Conv1d, nn.BatchNorm1d]]:
        return self._panes

    def __call__(self, x: Tensor, sources: list[Tensor]) -> Tensor:
        y, stats = self._conv(0, x)
        for i, sub in enumerate(self.subs[1:]):
            conv, following = sub.conv, of_the_batch(sub.bn)
            if sub.taps is not None:
                how = self._taps(i + 1) | {"next_stats": following}
                weights = sub.taps.weight, conv.weight
                out = self._fused(ops.separable_sub_block, y, stats, i, *weights, **how)
                y, stats = out if following else (out, None)
            elif conv.stride == (1,):
                how = {"padding": conv.padding[0], "dilation": conv.dilation[0], "next_stats": following}
                out = self._fused(ops.sub_block, y, stats, i, conv.weight, packed=partial(self.packs, i + 1), **how)
                y, stats = out if following else (out, None)
            else:
                y, stats = self._conv(i + 1, self._fused(ops.bn_relu_dropout, y, stats, i))
        grams = [self.known and self.known.gram(self.found, i, x, self._reads_gram) for i, x in enumerate(sources)]
        residual = self.pane_sum(sources, grams, self.steps[0]) if sources else None
        out = self._fused(ops.bn_relu_dropout, y, stats, len(self.subs) - 1, residual=residual)
        for bn in (*(sub.bn for sub in self.subs), *(bn for _, bn in self._panes)):
            if bn.training and bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
        return out

    def _reads_gram(self, found: Parts, pane: int, x: Tensor) -> bool:
        bn = found.panes[pane][1]
        return self._is_gram(x, bn) and of_the_batch(bn)

    def _conv(self, i: int, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        sub, conv, stats = self.subs[i], self.subs[i].conv, of_the_batch(self.subs[i].bn)
        if sub.taps is not None:
            how = {"lengths": self.steps[i], "backend": self.backend, "stats": stats}
            out = ops.separable_conv(x, sub.taps.weight, conv.weight, **how, **self._taps(i))
            return out if stats else (out, None)
        out = ops.conv1d(
            x,
            conv.weight,
            lengths=self.steps[i],
            stride=conv.stride[0],
            padding=conv.padding[0],
            dilation=conv.dilation[0],
            backend=self.backend,
            stats=stats,
            packed=partial(self.packs, i),
        )
        return out if stats else (out, None)

    def _taps(self, i: int) -> dict[str, object]:
        """Returns the arguments of separable conv `i`, except the lengths of its input."""
        (s,), (p,), (d,) = self.subs[i].taps.stride, self.subs[i].taps.padding, self.subs[i].taps.dilation
        geometry = {"stride": s, "padding": p, "dilation": d}
        return geometry | {"out_lengths": self.steps[i + 1], "packed": partial(self.packs, i)}

    def _fused(self, op, y: Tensor, stats, i: int, *args, **kwargs):
        """Calls `op` with the batch norm, dropout and mask that follow conv `i`."""
        sub, lengths = self.subs[i], self.steps[i + 1]
        bn, conv, batch = sub.bn, sub.conv, of_the_batch(sub.bn)
        beyond = max(0, conv.dilation[0] * (conv.kernel_size[0] - 1) - conv.padding[0])
        return op(
            y,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            *args,
            lengths=lengths,
            stats=stats,
            p=sub.p,
            training=sub.p > 0 or batch,
            frozen=not batch,
            momentum=momentum_of(bn),
            eps=bn.eps,
            backend=self.backend,
            halo=None if lengths is None else -(-beyond // conv.stride[0]),
            group=sync.group_of(bn),
            **kwargs,
        )
