"""`fuse` and `unfuse`: run an existing Jasper model on fused ops, and in evaluation on an engine."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from torch import nn

from jasper_fast.inference.encoders import KINDS, Graphs, Whole, describe
from jasper_fast.nn.fuse import ENCODER, STATE, Before, FusedBlock, Report, become, survey
from jasper_fast.nn.packs import Packs
from jasper_fast.nn.recognise import Unfit


def fuse(model: nn.Module, backend: str = "auto", strict: bool = False, *, graphs: Graphs = "auto") -> Report:
    """Makes the Jasper blocks in `model` run fused ops on their own parameters and buffers. Returns a report of the
    blocks that do.

    Blocks of NVIDIA's Jasper, of NeMo's and of `EagerJasper` are recognised by class name and attributes. A block that
    the ops cannot compute is left unchanged, with the reason in the report. With `strict` it raises ValueError, and
    nothing is changed. State-dict keys, hooks on blocks and on modules around them, train(), deepcopy, pickle and
    optimisers stay valid. With conv masks, outputs of blocks are zero in the padding.

    A fused block reads its weights in every call. In evaluation without gradients, an encoder whose blocks are all
    fused runs on an `InferenceEngine`, with batch norm folded, one kernel per sub-block, and CUDA graphs on a GPU
    (`graphs` is the engine's argument). The weights are folded again after every eval(), and if one has changed since
    the last call; for changes that cannot be noticed see `Report.refresh`. Hooks on blocks, torch.compile and tracing
    make the blocks run one by one.

    Raises ValueError for a model without such blocks, and BackendMissing for a backend that cannot run here. Equivalent
    to the model itself, up to rounding and to which elements are dropped.
    """
    if graphs not in ("auto", True, False):
        raise ValueError(f"graphs must be 'auto', True or False, not {graphs!r}")
    report, blocks = survey(model, backend)
    encoders = dict(_encoders(model, report, blocks, backend))
    if strict and report.left:
        raise ValueError("; ".join(f"cannot fuse {name or 'the model'}: {reason}" for name, reason in report.left))
    unfuse(model)  # an earlier call may have fused blocks that this call leaves unchanged
    for name, block in blocks:
        if name in report.fused:
            become(block, FusedBlock, (backend, Packs()))
    for name, encoder in encoders.items():
        become(encoder, KINDS[type(encoder).__name__], Whole(backend, graphs))
        report.whole.append(name)
        report._wholes.append(weakref.ref(vars(encoder)[STATE]))
    return report


def _encoders(
    model: nn.Module, report: Report, blocks: list[tuple[str, nn.Module]], backend: str
) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, encoder) for each encoder that can run on one engine. If an encoder cannot although all its blocks
    are fused, the reason is added to `report`."""
    fused = {id(block): name in report.fused for name, block in blocks}
    for name, module in model.named_modules():
        kind = KINDS.get(type(module).__name__)
        inner = kind.blocks_of(module) if kind else []
        if not inner or not all(fused.get(id(m), True) for m in inner):
            continue
        try:
            if strangers := [type(m).__name__ for m in inner if id(m) not in fused]:
                raise Unfit(f"it contains a {strangers[0]}, which is not a Jasper block")
            if "forward" in vars(module):
                raise Unfit("a forward bound to it")
            describe(module, kind, backend)
            yield name, module
        except Unfit as reason:
            report.left.append((name, f"{ENCODER}{reason}"))


def unfuse(model: nn.Module) -> None:
    """Restores the original forward of every block and encoder in `model` that `fuse` changed."""
    for module in model.modules():
        if isinstance(module, Before):
            module.__class__ = type(module).__bases__[1]
            del vars(module)[STATE]
