"""A Jasper block that the fused ops compute in NTC memory. Its parameters have the names of NVIDIA's Jasper."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast import ops
from jasper_fast.dispatch import choose
from jasper_fast.nn.architecture import convs_and_norm
from jasper_fast.nn.config import BlockConfig
from jasper_fast.nn.packs import Packs
from jasper_fast.nn.recognise import SubBlock, hook_of
from jasper_fast.ops import sync
from jasper_fast.ops.bn_relu_dropout_op import update_running
from jasper_fast.ops.conv1d_op import autocast

PANE_FORMS = ("auto", "gram", "plain")
# The Gram form needs at least this many rows (frames of the batch). The variance of fewer rows can be tiny, and
# cancellation in the Gram form would leave none of its digits correct.
FEW_ROWS = 16


class JasperBlock(nn.Module):
    """R sub-blocks (conv, batch norm, ReLU, dropout). The last one adds the residual panes before its ReLU.

    The keys of `conv` are the positions in NVIDIA's list of modules (`conv.0.weight`, `conv.1.running_mean`,
    `conv.4.weight`, ...), so state dicts have NVIDIA's keys. A separable sub-block takes five positions:
    `conv.0.weight` is depthwise, `conv.1.weight` pointwise, and `conv.2` the batch norm.

    `pane_form`: how training computes the panes' statistics, "gram" (`ops.panes`) or "plain" (`ops.panes_plain`). With
    "auto" `choose.pane_form` decides. Batches of fewer than 16 frames in all are always computed in the plain form,
    unless ranks share statistics.
    """

    def __init__(
        self, c_in: int, b: BlockConfig, panes: list[int], backend: str = "auto", pane_form: str = "auto"
    ):  # fmt: skip
        super().__init__()
        if pane_form not in PANE_FORMS:
            raise ValueError(f"panes {pane_form!r} is not one of {', '.join(PANE_FORMS)}")
        self.b, self.backend, self.pane_form = b, backend, pane_form
        self.packs = Packs()
        self.conv = nn.ModuleDict()
        for i in range(b.repeat):
            modules = convs_and_norm(c_in if i == 0 else b.filters, b.filters, b, nn.Conv1d)
            self.conv.update({str((5 if b.separable else 4) * i + j): module for j, module in enumerate(modules)})
        if panes:
            self.res = nn.ModuleList(nn.ModuleList(convs_and_norm(c, b.filters, None, nn.Conv1d)) for c in panes)

    @property
    def sub_blocks(self) -> list[SubBlock]:
        """The R sub-blocks in order. Raises RuntimeError if a conv or a norm, also of a pane, has hooks or a forward of
        its own."""
        refuse_hooks(*self.conv.values(), *(m for pane in self.panes for m in pane))
        modules, p = list(self.conv.values()), self.b.dropout if self.training else 0.0
        count = len(modules) // self.b.repeat
        groups = (modules[i : i + count] for i in range(0, len(modules), count))
        return [SubBlock(conv, bn, p, *taps) for *taps, conv, bn in groups]

    @property
    def panes(self) -> list[tuple[nn.Conv1d, nn.BatchNorm1d]]:
        """The (1x1 conv, batch norm) pairs of the residual, in the order of the block outputs that they read."""
        return [tuple(pane) for pane in self.res] if hasattr(self, "res") else []

    def forward(
        self, x: Tensor, sources: list[Tensor], grams: list, lengths: list[Tensor] | None, seeds: Tensor | None
    ) -> Tensor:
        """Returns the block's output (N, C_out, T') for `x` (N, C_in, T). With masks, input and output are zero in the
        padding.

        `sources`: the block outputs that the panes read. `grams`: in training, the Gram matrix of each source (None for
        the plain form). `lengths`: the numbers of valid frames at the input of each sub-block and at the end, R + 1
        tensors (N,); None without masks. `seeds`: R int64 numbers.
        """
        steps = lengths or [None] * (self.b.repeat + 1)
        return Pass(self.sub_blocks, self.panes, steps, seeds, self.backend, self.packs)(autocast(x), sources, grams)

    def reads_gram(self, pane: int, source: Tensor) -> bool:
        """Returns whether `pane` takes its statistics from the Gram matrix of `source`."""
        return reads_gram(self.panes[pane][1], source, self.backend, self.pane_form)


def reads_gram(bn: nn.Module, source: Tensor, backend: str, form: str) -> bool:
    """Returns whether a pane with the norm `bn` takes its statistics from the Gram matrix of `source`, a block output.

    `form`: as `JasperBlock.pane_form`.
    """
    if not of_the_batch(bn):
        return False
    # With SyncBN the number of rows is ignored: ranks may differ in it, but must make the same choice.
    if sync.group_of(bn) is None and source.shape[0] * source.shape[2] < FEW_ROWS:
        return False
    return (choose.pane_form(backend, source.device, source.dtype) if form == "auto" else form) == "gram"


@dataclass(frozen=True, eq=False)  # Dynamo of torch 2.11 hashes a Pass before it has fields
class Pass:
    """One forward pass of a block, of this project or of another.

    `steps`: the numbers of valid frames at the input of each sub-block and at the end, R + 1 tensors (N,); without
    masks each is None. `seeds`: R int64 numbers; None draws them.
    """

    sub_blocks: list[SubBlock]
    panes: list[tuple[nn.Conv1d, nn.BatchNorm1d]]
    steps: list[Tensor | None]
    seeds: Tensor | None
    backend: str
    packs: Packs

    def __call__(self, x: Tensor, sources: list[Tensor], grams: list[ops.Gram | None]) -> Tensor:
        """Returns the output (N, C_out, T') for `x` (N, C_in, T). `sources`, `grams`: see `JasperBlock.forward`.

        Raises ValueError for N = 0 if the statistics of the batch are needed.
        """
        if x.shape[0] == 0 and any(of_the_batch(sub.bn) for sub in self.sub_blocks):
            raise ValueError("an empty batch (N = 0) has no statistics to train with: leave it out")
        y, stats = self._conv(0, x)
        for i, sub in enumerate(self.sub_blocks[1:]):
            if sub.taps is None and sub.conv.stride != (1,):
                y, stats = self._conv(i + 1, self._fused(ops.bn_relu_dropout, y, stats, i))
                continue
            how = self._how(i + 1) | {"next_stats": of_the_batch(sub.bn)}
            if sub.taps is None:
                out = self._fused(ops.sub_block, y, stats, i, sub.conv.weight, **how)
            else:
                how |= {"stride": sub.taps.stride[0], "out_lengths": self.steps[i + 2]}
                out = self._fused(ops.separable_sub_block, y, stats, i, sub.taps.weight, sub.conv.weight, **how)
            y, stats = out if how["next_stats"] else (out, None)
        residual = pane_sum(self.panes, sources, grams, self.steps[0], self.backend) if sources else None
        return self._fused(ops.bn_relu_dropout, y, stats, len(self.sub_blocks) - 1, residual=residual)

    def _conv(self, i: int, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Returns the output of conv `i` for `x`, with the statistics of that output if batch norm needs them."""
        sub, stats = self.sub_blocks[i], of_the_batch(self.sub_blocks[i].bn)
        where = {"stride": sub.in_time.stride[0], "lengths": self.steps[i]}
        how = self._how(i) | where | {"stats": stats, "backend": self.backend}
        if sub.taps is not None:
            out = ops.separable_conv(x, sub.taps.weight, sub.conv.weight, out_lengths=self.steps[i + 1], **how)
        else:
            out = ops.conv1d(x, sub.conv.weight, **how)
        return out if stats else (out, None)

    def _how(self, i: int) -> dict[str, object]:
        """Returns arguments of an op: the padding and dilation of conv `i`, and a function that packs its weight."""
        conv = self.sub_blocks[i].in_time
        return {"padding": conv.padding[0], "dilation": conv.dilation[0], "packed": partial(self.packs, i)}

    def _fused(self, op, y: Tensor, stats, i: int, *args, **kwargs):
        """Calls `op` with the batch norm, dropout and mask that follow conv `i`. `y` is the output of that conv, and
        `stats` are the statistics of `y`."""
        sub, lengths, bn = self.sub_blocks[i], self.steps[i + 1], self.sub_blocks[i].bn
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
            frozen=not of_the_batch(bn),
            momentum=momentum_of(bn),
            eps=bn.eps,
            seed=None if self.seeds is None else self.seeds[i : i + 1],
            backend=self.backend,
            halo=None if lengths is None else sub.halo,
            group=sync.group_of(bn),
            **kwargs,
        )


def pane_sum(
    panes: list[tuple[nn.Conv1d, nn.BatchNorm1d]],
    sources: list[Tensor],
    grams: list[ops.Gram | None],
    lengths: Tensor | None,
    backend: str,
) -> Tensor:
    """Returns the sum over `panes` of BN(1x1 conv(source)), (N, C_out, T). Updates the running statistics of norms in
    training mode.

    `sources` are zero at t >= `lengths` (N,). Panes with batch statistics are computed in one call if their
    norms have the same eps, momentum and process group. All panes with running statistics are computed in another.
    """
    alike: dict[tuple | None, list[int]] = {}
    for k, (_, bn) in enumerate(panes):
        how = (bn.eps, bn.momentum, sync.group_of(bn)) if of_the_batch(bn) else None
        alike.setdefault(how, []).append(k)
    total = None
    for how, which in alike.items():
        convs, bns = zip(*(panes[k] for k in which), strict=True)
        xs, weights = [sources[k] for k in which], [conv.weight for conv in convs]
        if how is None:
            out = sum_folded(xs, weights, bns)
        else:
            out = _batch_sum(xs, [grams[k] for k in which], weights, bns, lengths, backend)
        total = out if total is None else total + out
    return total


def _batch_sum(xs, grams, weights, bns, lengths: Tensor | None, backend: str) -> Tensor:
    """Returns the pane sum with the statistics of the batch, and updates the running ones."""
    gammas, betas, eps = [bn.weight for bn in bns], [bn.bias for bn in bns], bns[0].eps
    if all(gram is not None for gram in grams):
        out, mean, var = ops.panes(xs, grams, weights, gammas, betas, eps=eps)
    else:
        how = {"lengths": lengths, "eps": eps, "backend": backend, "group": sync.group_of(bns[0])}
        out, mean, var = ops.panes_plain(xs, weights, gammas, betas, **how)
    if bns[0].momentum is not None:
        buffers = [bn.running_mean for bn in bns] + [bn.running_var for bn in bns]
        update_running(buffers, (*mean, *var), bns[0].momentum)
    else:  # each norm has a counter of its own
        for bn, *stats in zip(bns, mean, var, strict=True):
            update_running([bn.running_mean, bn.running_var], stats, momentum_of(bn))
    return out


def refuse_hooks(*modules: nn.Module) -> None:
    """Raises RuntimeError if one of these convs and norms has hooks or a forward of its own, because neither would run:
    the fused ops only read the parameters of these modules. Under torch.compile nothing is checked."""
    if torch.compiler.is_compiling():
        return
    for m in modules:
        hook = hook_of(m)
        if hook is not None or "forward" in vars(m) or type(m).forward not in _FORWARDS:
            kind, what = type(m).__name__, "its own forward" if hook is None else f"a hook ({hook})"
            raise RuntimeError(
                f"a {kind} in a Jasper has {what}, which would never run, because fused ops only read its parameters: "
                "put hooks on the blocks, use torch.nn.utils.parametrizations instead of the older weight_norm and "
                "spectral_norm, and call torch.nn.utils.prune.remove before the model runs (README.md, Hooks)"
            )


_FORWARDS = (nn.Conv1d.forward, nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)


def of_the_batch(bn: nn.BatchNorm1d) -> bool:
    """Returns whether `bn` normalises with the statistics of the batch, by the rule of nn.BatchNorm1d."""
    return bn.training or bn.running_mean is None


def momentum_of(bn: nn.BatchNorm1d) -> float | Tensor:
    """Returns the weight of a batch's statistics in the running statistics. Without momentum all batches count
    equally."""
    if bn.momentum is None and bn.num_batches_tracked is not None:
        return 1.0 / (bn.num_batches_tracked + 1)
    return bn.momentum or 0.0


def count_batch(norms: Iterable[nn.BatchNorm1d]) -> None:
    """Adds one to the batch counter of each of `norms` that is in training mode."""
    counters = [bn.num_batches_tracked for bn in norms if bn.training and bn.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)


def fold(bn: nn.BatchNorm1d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (scale, shift), each (C,) in `dtype`: batch norm with running statistics is `y * scale + shift`.

    Raises ValueError for a batch norm without running statistics (track_running_stats=False).
    """
    if bn.running_mean is None:
        raise ValueError("a batch norm without running statistics cannot be folded: run the model, not an engine")
    scale = bn.weight.to(dtype) * (bn.running_var.to(dtype) + bn.eps).rsqrt()
    return scale, bn.bias.to(dtype) - bn.running_mean.to(dtype) * scale


def sum_folded(sources: list[Tensor], weights: list[Tensor], bns) -> Tensor:
    """Returns the pane sum with running statistics, by one GEMM per pane. The statistics get no gradient."""
    out = None
    for x, weight, bn in zip(sources, weights, bns, strict=True):
        scale, shift = fold(bn, bn.weight.dtype)
        y = F.linear(x.transpose(1, 2), (scale[:, None] * weight.flatten(1)).to(x.dtype), shift.to(x.dtype))
        out = y if out is None else out + y
    return out.transpose(1, 2)
