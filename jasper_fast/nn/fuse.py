"""Fused sub-blocks for an existing Jasper model: NVIDIA's, NeMo's, or this project's eager one.

A block keeps its modules, parameters and buffers. Only its class is replaced, by a subclass whose forward runs the
fused ops. Copies and pickles of the block also have the subclass. `unfuse` restores the original class.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jasper_fast.dispatch import backends
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.nn.architecture import frames
from jasper_fast.nn.block import JasperBlock, Pass, count_batch
from jasper_fast.nn.packs import Packs
from jasper_fast.nn.recognise import LOOKED_FOR, Parts, Unfit, candidates, parts
from jasper_fast.nn.shared import Shared, shared
from jasper_fast.ops.conv1d_op import autocast

STATE = "_jasper_fast"  # the attribute that `become` adds to a fused module
# A reason in `Report.left` begins with this if it is about an encoder and not a block.
ENCODER = "its blocks are fused, but in evaluation no engine can run it: "


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

    # A model may have its report as an attribute. In a copy of the model, this report then refers to the copy's own
    # encoders.
    def __getstate__(self) -> dict[str, list]:
        return vars(self) | {"_wholes": [whole for ref in self._wholes if (whole := ref()) is not None]}

    def __setstate__(self, state: dict[str, list]) -> None:
        vars(self).update(state, _wholes=[*map(weakref.ref, state["_wholes"])])

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
            parts(block)
            report.fused.append(name)
        except Unfit as reason:
            report.left.append((name, str(reason)))
    return report, found


def become(module: nn.Module, kind: type[Before], state: object) -> None:
    """Replaces the class of `module` by a subclass of both `kind` and its own class, and stores `state` in `module`."""
    vars(module)[STATE] = state
    module.__class__ = _fused_class(kind, type(module))


class Before:
    """The first base of a fused class; the second is the module's own class. Copies and pickles store both bases, and
    make the fused class from them again."""

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


def own_class(kind: type) -> type:
    """Returns `kind`, a fused class, without what `become` added. A class that was derived from a fused class, as by
    `fully_shard`, is derived anew from the module's own class."""
    if issubclass(kind.__bases__[0], Before):
        return kind.__bases__[1]
    names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(own_class(b) if issubclass(b, Before) else b for b in kind.__bases__), names)


def _new(kind: type[Before], own: type) -> nn.Module:
    """Makes an instance of the fused class without calling `__init__`; copy and pickle fill it."""
    made = _fused_class(kind, own)
    return made.__new__(made)


def _run(
    found: Parts, backend: str, packs: Packs, xs: list[Tensor], lengths: Tensor | None, known: Shared | None
) -> tuple[list[Tensor], Tensor | None]:
    """Returns the outputs and lengths that the original block returns for block outputs `xs` and `lengths` (N,)."""
    # Only an EagerBlock has `takes_last`. It masks only if it is given lengths, so it does not need them.
    if found.masked and lengths is None and not found.takes_last:
        raise ValueError("the convs of this block zero the padding of their inputs, so it needs the lengths")
    steps, passed = counts(found, lengths)
    sources = xs if found.dense else xs[-1:]
    if found.panes and (len(sources) != len(found.panes) or (len(xs) > len(sources) and not found.takes_last)):
        raise ValueError(f"a block with {len(found.panes)} residual convs was given {len(xs)} block outputs")
    sources = [known.ready(x, steps[0], _clean) if known else _clean(x, steps[0]) for x in sources]
    read = sources if found.panes else []
    grams = [known and known.gram(found, pane, x, backend) for pane, x in enumerate(read)]  # None: plain panes
    within = _within(found, steps[0], sources[-1].shape[2])
    out = Pass(found.sub_blocks, found.panes, within, None, backend, packs)(sources[-1], read, grams)
    count_batch([sub.bn for sub in found.sub_blocks] + [bn for _, bn in found.panes])
    if steps[-1] is not None and not torch.compiler.is_compiling() and not out.is_inference():
        out._jasper_fast_zero = (steps[-1], out._version)  # so that the next block need not mask `out`
    return ([*xs, out] if found.dense else [out]), passed


def counts(found: Parts, lengths: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
    """Returns (counts, passed) for a block that is given `lengths`. counts: the numbers of valid frames at the input of
    each sub-block and at the end, each None without masks. passed: the lengths that the original block returns."""
    steps = [lengths if found.masked else None]
    for sub in found.sub_blocks:
        steps.append(frames(sub.in_time, steps[-1]))
    return steps, lengths if found.keeps_lengths and not found.masked else steps[-1]


def _within(found: Parts, lengths: Tensor | None, t: int) -> list[Tensor | None]:
    """Returns the numbers of valid frames at the input of each sub-block and at the end, on the device of the weights,
    for an input of `t` frames. `lengths`: those of the utterances, which may exceed `t`; None without masks."""
    if lengths is not None:
        lengths = lengths.to(found.sub_blocks[0].conv.weight.device, torch.int64).clamp(0, t)
    within = [lengths]
    for sub in found.sub_blocks:
        count = frames(sub.in_time, within[-1])
        within.append(count if count is within[-1] else count.clamp(min=0))
    return within


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
