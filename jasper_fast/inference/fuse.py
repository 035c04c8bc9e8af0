"""Runs other projects' Jaspers on fused ops, and runs whole encoders on one engine in evaluation without gradients.

A fused encoder keeps its modules, parameters and buffers, as fused blocks do (`nn.fuse`). Its new forward calls the
engine if that gives the same result. Otherwise it calls the original forward, for example in training, with gradients,
while a compiler traces it, and if its blocks have hooks. Before the engine is called, the encoder checks whether the
weights have changed since they were folded.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.optimizer import register_optimizer_step_post_hook

from jasper_fast.inference.engine import EncoderEngine
from jasper_fast.inference.plan import weight_of
from jasper_fast.nn.architecture import block_shapes, out_lengths
from jasper_fast.nn.config import BlockConfig, ConfigError, EncoderConfig, refuse
from jasper_fast.nn.fuse import ENCODER, STATE, Before, FusedBlock, Report, become, counts, own_class, survey
from jasper_fast.nn.packs import Packs
from jasper_fast.nn.recognise import Parts, Unfit, captures, parts
from jasper_fast.nn.shared import Shared, sharing
from jasper_fast.nn.watch import Watch

Graphs = bool | Literal["auto"]


@dataclass(frozen=True)
class Layer(Parts):
    """A block of another project, as the engine's plan reads it."""

    b: BlockConfig


@dataclass(frozen=True)
class Encoder:
    """An encoder of another project, as the engine reads it."""

    layers: list[Layer]
    masks: bool
    backend: str
    tune = True
    decoder = None

    @property
    def encoder(self) -> Encoder:
        return self

    @property
    def config(self) -> SimpleNamespace:
        blocks = tuple(layer.b for layer in self.layers)
        encoder = EncoderConfig(weight_of(self).shape[1], use_conv_masks=self.masks, blocks=blocks)
        return SimpleNamespace(encoder=encoder, decoder=None)

    def lengths(self, lengths: Tensor | None) -> Tensor | None:
        """Returns the lengths that the blocks would return if they ran one by one."""
        for layer in self.layers:
            _, lengths = counts(layer, lengths)
        return lengths


def describe(module: nn.Module, kind: type[FusedEncoder], backend: str) -> Encoder:
    """Returns the encoder `module` in the form that an engine reads. Raises Unfit, with the reason, if an engine cannot
    compute it."""
    layers = [_layer(block, parts(block)) for block in kind.blocks_of(module)]
    masks = {kind.masks_of(module, layer) for layer in layers}
    refuse(
        Unfit,
        (len(masks) > 1, "only some of its blocks have masks"),
        (
            kind.returns_all and layers[-1].dense,
            "its last block is dense, so the outputs of all blocks are returned",
        ),
    )
    found = Encoder(layers, *masks, backend)
    for (c_in, b, panes), layer, before in zip(block_shapes(found.config), layers, [None, *layers[:-1]], strict=True):
        channels = layer.sub_blocks[0].conv.in_channels, [conv.in_channels for conv, _ in layer.panes]
        after_dense = before is not None and before.b.residual_dense
        plain = b.residual and not b.residual_dense and not layer.takes_last
        refuse(
            Unfit,
            (channels != (c_in, panes), "its convs have other channels than those of a Jasper"),
            (plain and after_dense, "a block with a plain residual follows one with a dense residual"),
        )
    return found


def _layer(block: nn.Module, found: Parts) -> Layer:
    convs, pointwise = [sub.conv for sub in found.sub_blocks], [conv for conv, _ in found.panes]
    in_time, taps = [sub.in_time for sub in found.sub_blocks], [sub.taps for sub in found.sub_blocks if sub.taps]
    known = {*convs, *pointwise, *taps}
    norms = [sub.bn for sub in found.sub_blocks] + [bn for _, bn in found.panes]
    refuse(
        Unfit,
        ({m for m in block.modules() if isinstance(m, nn.Conv1d)} != known, "convs outside sub-blocks and panes"),
        (any("weight" in vars(m) for m in (*known, *norms)), "a weight that is not a parameter"),
        (any(bn.running_mean is None for bn in norms), "a batch norm without running statistics"),
    )
    first, c = in_time[0], convs[0].out_channels
    try:
        sizes = c, len(convs), first.kernel_size, first.stride, first.dilation
        b = BlockConfig(*sizes, 0.0, bool(found.panes), found.dense, bool(taps))
    except ConfigError as reason:
        raise Unfit(str(reason)) from None
    shape = ((b.k,), (b.s,), (b.d,), (b.padding,))
    unlike = any((m.kernel_size, m.stride, m.dilation, m.padding) != shape for m in in_time)
    if unlike or any(m.out_channels != c for m in convs) or len(taps) not in (0, len(convs)):
        raise Unfit("convs in one block with different settings, or with padding other than k // 2 * dilation")
    return Layer(**vars(found), b=b)


class Whole:
    """The state of a fused encoder: an engine for each dtype, and a `Watch` that notices changes of the weights."""

    def __init__(self, backend: str, graphs: Graphs):
        self._how = backend, graphs
        self._lock = threading.RLock()
        self.drop()
        with _known:
            _live.add(self)

    def __reduce__(self) -> tuple:
        return Whole, self._how

    def drop(self) -> None:
        """Drops the engines and their copies of the weights. The next call of `engine` makes new ones."""
        with self._lock:
            self._engines: dict[torch.dtype, EncoderEngine] = {}
            self._watch: Watch | None = None
            self._found: Encoder | None = None
            self._described = False
            self._capturing: list[nn.Module] = []

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops the engines if `optimizer` has parameters of this encoder. The Watch would not notice the step of a
        fused optimiser, which does not raise `_version`."""
        with self._lock:
            given = (p for group in optimizer.param_groups for p in group["params"])
            if self._watch is not None and self._watch.holds(given):
                self.drop()

    def describe(self, encoder: FusedEncoder) -> Encoder | None:
        """Returns the encoder as it is now, or None if no engine can compute it. After None the blocks run one by one,
        and raise any error themselves."""
        with self._lock, contextlib.suppress(Unfit):
            if self._watch is None or not self._watch.same():
                self.drop()
                self._watch = Watch(encoder.tree())
                self._capturing = [b for b in encoder.blocks_of(encoder) if hasattr(b, "is_access_enabled")]
            if self._watch.hooked() or any(map(captures, self._capturing)):
                return None
            if not self._described:
                self._described = True
                if not any(m.training for m in encoder.tree() if isinstance(m, _BatchNorm | _DropoutNd)):
                    self._found = describe(encoder, type(encoder), self._how[0])
            return self._found
        return None

    def engine(self, found: Encoder, dtype: torch.dtype) -> EncoderEngine:
        """Returns the engine in `dtype` for `found`, which `describe` has returned."""
        with self._lock:
            if dtype not in self._engines:
                with torch.inference_mode(False):  # tensors made in inference mode cannot be written to outside it
                    self._engines[dtype] = EncoderEngine(found, dtype=dtype, graphs=self._how[1])
            return self._engines[dtype]


_live: weakref.WeakSet[Whole] = weakref.WeakSet()
_known = threading.Lock()  # guards `_live`


def _after_a_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    with _known:
        alive = list(_live)
    for whole in alive:
        whole.stepped(optimizer)


register_optimizer_step_post_hook(_after_a_step)


class FusedEncoder(Before):
    """An encoder whose forward calls the engine if that gives the same result."""

    where: str  # dotted path of the blocks
    returns_all = False  # whether forward returns a list of all block outputs, not only the last output

    @classmethod
    def blocks_of(cls, module: nn.Module) -> list[nn.Module]:
        """Returns the blocks of `module` in order, or none if it is not an encoder of this kind."""
        for name in cls.where.split("."):
            module = getattr(module, name, None)
        return list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []

    @staticmethod
    def masks_of(module: nn.Module, block: Parts) -> bool:
        """Returns whether the convs of `block`, in the encoder `module`, zero the padding of their inputs."""
        return block.masked

    def tree(self) -> Iterator[nn.Module]:
        """Returns the modules whose weights and settings the engine's results depend on."""
        return (m for m in self.modules() if m is not self)

    def train(self, mode: bool = True):
        vars(self)[STATE].drop()  # so that eval() folds the weights again, and training gets the engines' memory
        return super().train(mode)

    def sharing(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for the original forward, in which the blocks share work in training (`nn.shared`)."""
        if self.training and not torch.compiler.is_compiling():
            with contextlib.suppress(Unfit):  # the unfit block's own forward raises the error
                return sharing(Shared(self.blocks_of(self)))
        return contextlib.nullcontext()

    def whole(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Runs the engine. Returns the output (N, C, T') of the last block and its lengths, or None if the encoder's
        original forward must run instead."""
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or nn.modules.module._has_any_global_hook()
            or getattr(self, "_is_replica", False)  # a replica of nn.DataParallel has new weights in every call
        ):
            return None
        found = vars(self)[STATE].describe(self)
        if found is None or not _fits(found, x, lengths):
            return None
        kind = x.device.type
        cast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else weight_of(found).dtype
        if not cast and x.dtype != dtype:
            return None
        given = torch.full(x.shape[:1], x.shape[2], device=x.device) if not found.masks else lengths.to(x.device)
        with torch.autocast(kind, enabled=False) if cast else contextlib.nullcontext():
            out = vars(self)[STATE].engine(found, dtype)(x, given)
        return out.to(dtype), found.lengths(lengths)


def _fits(found: Encoder, x: Tensor, lengths: Tensor | None) -> bool:
    """Returns whether an engine can take these arguments. If not, the original forward runs instead."""
    return (
        type(x) is Tensor
        and x.dim() == 3
        and x.shape[1] == weight_of(found).shape[1]
        and x.numel() > 0
        and x.is_floating_point()
        and x.device == weight_of(found).device
        and (lengths is not None or not found.masks)
        and (lengths is None or (lengths.shape == x.shape[:1] and not lengths.is_floating_point()))
    )


class NVIDIAsEncoder(FusedEncoder):
    """NVIDIA's JasperEncoder, which returns a list of block outputs."""

    where, returns_all = "layers", True

    def forward(self, x, x_lens=None):
        if (found := self.whole(x, x_lens)) is not None:
            return [found[0]], found[1]
        with self.sharing():
            return super().forward(x, x_lens)


class NeMosEncoder(FusedEncoder):
    """NeMo's ConvASREncoder, which is called with keyword arguments."""

    where = "encoder"

    def forward(self, audio_signal, length):
        if length is not None and (found := self.whole(audio_signal, length)) is not None:
            return found
        with self.sharing():
            return super().forward(audio_signal=audio_signal, length=length)


class EagerModel(FusedEncoder):
    """EagerJasper. Its `encoder` has no forward of its own, so the forward of the whole model is replaced."""

    where = "encoder.layers"

    @staticmethod
    def masks_of(module: nn.Module, block: Parts) -> bool:
        return module.config.encoder.use_conv_masks

    def tree(self) -> Iterator[nn.Module]:
        return self.encoder.modules()

    def forward(self, features, lengths):
        found = self.whole(features, lengths if self.config.encoder.use_conv_masks else None)
        if found is None:
            with self.sharing():
                return super().forward(features, lengths)
        log_probs = self.decoder.layers[0](found[0]).transpose(1, 2).float().log_softmax(dim=2)
        return log_probs, out_lengths(self.config, lengths)


# name of an encoder's class: the class that replaces it
KINDS: dict[str, type[FusedEncoder]] = {
    "JasperEncoder": NVIDIAsEncoder,
    "ConvASREncoder": NeMosEncoder,
    "EagerJasper": EagerModel,
}


def fuse(model: nn.Module, backend: str = "auto", strict: bool = False, *, graphs: Graphs = "auto") -> Report:
    """Makes the Jasper blocks in `model` run fused ops on their own parameters and buffers. Returns a report of what
    was fused.

    Blocks of NVIDIA's Jasper, of NeMo's and of `EagerJasper` are recognised by class name and attributes. A block that
    the ops cannot compute is left unchanged, with the reason in the report. With `strict`, ValueError is raised if
    there is such a block, or an encoder that no engine can run; then nothing is changed. State-dict keys, hooks on
    blocks and on modules around blocks, train(), deepcopy, pickle and optimisers stay valid. With conv masks, outputs
    of blocks are zero in the padding.

    A fused block reads its weights in every call. In evaluation without gradients, each encoder in `report.whole` runs
    on an `InferenceEngine`, with batch norm folded, and with CUDA graphs on a GPU (`graphs` is the engine's
    argument). The weights are folded again after every eval(), and when a weight has changed since the last call; for
    changes that cannot be noticed see `Report.refresh`. Hooks on blocks, torch.compile and tracing make the blocks run
    one by one.

    Raises ValueError for a model without such blocks and for other values of `graphs`, and BackendMissing for a backend
    that cannot run here. Equivalent to the model itself, up to rounding and to the choice of the elements that dropout
    drops, but an empty batch in training raises ValueError.
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
    """Yields (name, encoder) for each encoder that can run on one engine. If all blocks of an encoder are fused but it
    cannot run on one engine, the reason is added to `report`."""
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
                raise Unfit("a forward method was set on the encoder itself")
            describe(module, kind, backend)
            yield name, module
        except Unfit as reason:
            report.left.append((name, f"{ENCODER}{reason}"))


def unfuse(model: nn.Module) -> None:
    """Restores the original forward of every block and encoder in `model` that `fuse` changed."""
    for module in model.modules():
        if isinstance(module, Before):
            module.__class__ = own_class(type(module))
            del vars(module)[STATE]
