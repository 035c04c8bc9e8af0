"""Recognises Jasper blocks of other projects by class name and attributes, without importing those projects."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from jasper_fast.nn.config import refuse

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
NAMES = ("JasperBlock", "EagerBlock")
LOOKED_FOR = (
    "modules of class JasperBlock with `conv` and `out` (NVIDIA's) or `mconv` and `mout` (NeMo's), "
    "or EagerBlock (this project's)"
)


class Unfit(Exception):
    """A block that the fused ops cannot compute. The message is the reason."""


@dataclass(frozen=True)
class SubBlock:
    """A conv with its batch norm and `p`, the present probability of dropout. In a separable sub-block `conv` is the
    pointwise conv, and `taps` the depthwise conv before it."""

    conv: nn.Conv1d
    bn: nn.BatchNorm1d
    p: float
    taps: nn.Conv1d | None = None

    @property
    def in_time(self) -> nn.Conv1d:
        """The conv that decides the number of frames."""
        return self.conv if self.taps is None else self.taps

    @property
    def halo(self) -> int:
        """The number of frames beyond the output's length in which the output of `conv` may differ from zero, if its
        input is zero beyond the input's length. It is 0 for a pointwise conv."""
        (k,), (s,), (p,), (d,) = self.conv.kernel_size, self.conv.stride, self.conv.padding, self.conv.dilation
        return -(-max(0, d * (k - 1) - p) // s)


@dataclass(frozen=True)
class Parts:
    """The modules of a block, not copies of them.

    `panes`: the 1x1 residual convs with their batch norms. `masked`: whether the convs zero the padding of their
    inputs. `dense`: whether the block appends its output to the list of block outputs that it was given.
    `keeps_lengths`: whether a block without masks returns its input lengths unchanged, as NeMo's blocks do.
    `takes_last`: whether a residual that is not dense, if it is given several block outputs, reads the last of them.
    """

    sub_blocks: list[SubBlock]
    panes: list[tuple[nn.Conv1d, nn.BatchNorm1d]]
    masked: bool
    dense: bool
    keeps_lengths: bool
    takes_last: bool


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, block) of every module that has the attributes of a Jasper block."""
    for name, module in model.named_modules():
        layers = getattr(module, "mconv", getattr(module, "conv", None))
        last = getattr(module, "mout", getattr(module, "out", None))
        if isinstance(layers, nn.ModuleList) and isinstance(last, nn.Sequential):
            yield name, module


def parts(block: nn.Module) -> Parts:
    """Returns the present parts of `block`. Raises Unfit with the reason if the fused ops cannot compute it."""
    _check_kind(block)
    layers, last = (block.mconv, block.mout) if hasattr(block, "mconv") else (block.conv, block.out)
    groups: list[list[nn.Module]] = []
    for layer in layers:
        if type(layer).__name__ in ("SqueezeExcite", "GroupShuffle"):
            raise Unfit("squeeze-excite" if type(layer).__name__ == "SqueezeExcite" else "grouped convs")
        if _is_conv(layer) and not (groups and len(groups[-1]) == 1 and _is_depthwise(groups[-1][0])):
            groups.append([])
        if not groups:
            raise Unfit(f"it begins with a {type(layer).__name__}, not with a conv")
        groups[-1].append(layer)
    if not groups:
        raise Unfit("it has no convs")
    subs, masks = [], []
    for group in (*groups[:-1], [*groups[-1], *last]):
        *convs, bn, p = _sub_block(group)
        *taps, conv = map(_inner, convs)
        subs.append(SubBlock(conv, bn, p, *taps))
        masks += [_masks(conv) for conv in convs]
    panes = []
    for pane in getattr(block, "res", None) or ():
        if len(pane) != 2:
            raise Unfit(f"it has a residual of {len(pane)} modules, but only a conv and a batch norm can be fused")
        _check_conv(pane[0])
        _check_norm(pane[1])
        conv = _inner(pane[0])
        if not _is_pointwise(conv):
            raise Unfit("it has a residual conv that is not 1x1 at stride 1 (residual_mode stride_add)")
        panes.append((conv, pane[1]))
        masks.append(_masks(pane[0]))
    refuse(
        Unfit,
        (len(set(masks)) > 1, "only some of its convs have masks"),
        (panes and any(sub.in_time.stride != (1,) for sub in subs), "it has a residual and a stride above 1"),
    )
    own = getattr(block, "cfg", None) if type(block).__name__ == "EagerBlock" else None
    dense = own.dense if own else len(panes) > 0 and getattr(block, "dense_residual", False)
    return Parts(subs, panes, masks[0], dense, hasattr(block, "mconv"), own is not None)


def _check_kind(block: nn.Module) -> None:
    kind, mode = type(block).__name__, getattr(block, "residual_mode", "add")
    other = f"its class is {kind}, not one of {', '.join(NAMES)}, so its forward may do something else"
    refuse(
        Unfit,
        (kind not in NAMES, other),
        (mode not in ("add", "stride_add"), f"residual_mode {mode}"),
        (getattr(block, "se", False), "squeeze-excite"),
        (getattr(block, "adapter_layer", None), "adapters"),
        (captures(block), "intermediate outputs are captured (InterCTC)"),
    )
    for name, module in block.named_modules():
        hook = hook_of(module) if module is not block else None
        refuse(
            Unfit,
            (hook is not None, f"a hook ({hook}) on {name}"),
            ("forward" in vars(module), f"a forward method was set on {name or 'the block'} itself"),
        )


def hook_of(module: nn.Module) -> str | None:
    """Returns the name of a hook on `module`, or None if it has none."""
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    return getattr(hooks[0], "__qualname__", type(hooks[0]).__name__) if hooks else None


def captures(block: nn.Module) -> bool:
    """Returns whether NeMo keeps intermediate outputs of `block`, as for InterCTC."""
    enabled = getattr(block, "is_access_enabled", None)
    return enabled is not None and bool(enabled(getattr(block, "model_guid", None)))


def _sub_block(group: list[nn.Module]) -> tuple[nn.Module | float, ...]:
    """Returns (conv, norm, probability of dropout), or (depthwise conv, pointwise conv, norm, probability of dropout).

    `group`: the modules of one sub-block in order.
    """
    (conv, *rest), taps = group, []
    if _is_depthwise(conv):
        taps = [conv]
        _check_conv(conv, groups=_inner(conv).in_channels)
        if not rest or not _is_conv(rest[0]):
            raise Unfit("it has a depthwise conv without a pointwise one after it")
        conv, *rest = rest
    _check_conv(conv)
    refuse(
        Unfit,
        (taps and not _is_pointwise(_inner(conv)), "it has a depthwise conv without a pointwise one after it"),
        (len(rest) == 0, "it has a conv without batch norm"),
    )
    norm, *rest = rest
    _check_norm(norm)
    names, computes = [type(m).__name__ for m in rest], [type(m).forward for m in rest]
    refuse(
        Unfit,
        (computes[:1] != [nn.ReLU.forward], f"the activation is {names[0] if rest else 'missing'}, not ReLU"),
        (computes[1:] not in ([], [nn.Dropout.forward]), f"after its activation comes {', '.join(names[1:])}"),
    )
    return *taps, conv, norm, sum(dropout.p for dropout in rest[1:] if dropout.training)


def _is_depthwise(conv: nn.Module) -> bool:
    inner = _inner(conv)
    return isinstance(inner, nn.Conv1d) and 1 < inner.groups == inner.in_channels == inner.out_channels


def _is_pointwise(conv: nn.Conv1d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding) == ((1,), (1,), (0,))


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) or "Conv" in type(module).__name__


def _inner(conv: nn.Module) -> nn.Module | None:
    """Returns the conv that has the weight: NeMo's MaskedConv1d wraps a conv, and NVIDIA's is one."""
    return conv if isinstance(conv, nn.Conv1d) else getattr(conv, "conv", None)


def _masks(conv: nn.Module) -> bool:
    return bool(
        getattr(conv, "masked", getattr(conv, "use_mask", any("Masked" in c.__name__ for c in type(conv).__mro__)))
    )


def _check_conv(conv: nn.Module, groups: int = 1) -> None:
    heads, inner = getattr(conv, "heads", -1), _inner(conv)
    masked = any("MaskedConv1d" in kind.__name__ for kind in type(conv).__mro__)
    own = isinstance(inner, nn.Conv1d) and (type(inner).forward is nn.Conv1d.forward or (inner is conv and masked))
    kind = type(conv if inner is None else inner).__name__
    refuse(
        Unfit,
        (heads != -1, f"heads = {heads}"),
        (getattr(conv, "pad_layer", None) is not None, "asymmetric padding (future_context)"),
        (
            not own or (inner is not conv and not masked),
            f"quantised: its conv is a {kind}" if "Quant" in kind else f"its conv is a {kind}",
        ),
    )
    refuse(
        Unfit,
        (inner.groups != groups, f"grouped convs (groups = {inner.groups})"),
        (inner.bias is not None, "it has a conv with a bias"),
        (
            isinstance(inner.padding, str) or inner.padding_mode != "zeros",
            f"padding {inner.padding!r}, padding_mode {inner.padding_mode!r}",
        ),
    )


def _check_norm(norm: nn.Module) -> None:
    foreign = type(norm).forward not in (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)
    refuse(
        Unfit,
        (foreign, f"its norm is {type(norm).__name__}, not batch norm"),
        (getattr(norm, "weight", None) is None, "it has a batch norm without weights (affine=False)"),
    )
