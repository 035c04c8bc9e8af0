"""A Jasper block: its parameters have the reference's names, and the fused ops compute it in NTC memory."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast import ops
from jasper_fast.dispatch import choose
from jasper_fast.nn.architecture import BN_EPS, BN_MOMENTUM
from jasper_fast.nn.config import BlockConfig
from jasper_fast.nn.packs import Packs
from jasper_fast.nn.recognise import hook_of
from jasper_fast.ops import sync
from jasper_fast.ops.conv1d_op import autocast

PANE_FORMS = ("auto", "gram", "plain")
# With fewer rows the Gram form is not used. The variance of few rows can be tiny, and cancellation then destroys it.
FEW_ROWS = 16


class JasperBlock(nn.Module):
    """R sub-blocks (conv, batch norm, ReLU, dropout). The last one adds the residual panes before its ReLU.

    `conv` and `res` are dictionaries keyed by the positions in the reference's nn.Sequential (`conv.0.weight`,
    `conv.1.running_mean`, `conv.4.weight`, ..., `res.0.0.weight`), so state dicts are the same. A separable sub-block
    takes five positions: `conv.0.weight` is depthwise, `conv.1.weight` pointwise, and `conv.2` the batch norm.

    `pane_form`: how training computes the panes' statistics, "gram" (`ops.panes`) or "plain" (`ops.panes_plain`).
    "auto" is "gram" on a GPU and "plain" elsewhere (`choose.pane_form`). Batches of fewer than 16 frames in all are
    always computed in the plain form, unless ranks share statistics.
    """

    def __init__(
        self, c_in: int, b: BlockConfig, panes: list[int], backend: str = "auto", pane_form: str = "auto"
    ):  # fmt: skip
        super().__init__()
        if pane_form not in PANE_FORMS:
            raise ValueError(f"panes {pane_form!r} is not one of {', '.join(PANE_FORMS)}")
        self.b, self.backend, self.pane_form = b, backend, pane_form
        # The conv's output is zero from `halo` frames beyond the length on. A pointwise conv, with one tap, adds none.
        self.halo = 0 if b.separable else -(-max(0, b.d * (b.k - 1) - b.padding) // b.s)
        self.packs = Packs()
        self.conv = nn.ModuleDict()
        for i in range(b.repeat):
            channels = c_in if i == 0 else b.filters
            for j, module in enumerate(sub_block_modules(channels, b)):
                self.conv[str((5 if b.separable else 4) * i + j)] = module
        if panes:
            self.res = nn.ModuleList(
                nn.ModuleList([nn.Conv1d(c, b.filters, 1, bias=False), nn.BatchNorm1d(b.filters, BN_EPS, BN_MOMENTUM)])
                for c in panes
            )

    def sub_blocks(self) -> list[tuple[nn.Conv1d, nn.BatchNorm1d]]:
        """Returns the R (conv, batch norm) pairs in order. In a separable sub-block the conv is the pointwise one."""
        if self.b.separable:
            return [(self.conv[str(5 * i + 1)], self.conv[str(5 * i + 2)]) for i in range(self.b.repeat)]
        return [(self.conv[str(4 * i)], self.conv[str(4 * i + 1)]) for i in range(self.b.repeat)]

    def depthwise(self) -> list[nn.Conv1d]:
        """Returns the R depthwise convs of a separable block in order, or an empty list for another block."""
        return [self.conv[str(5 * i)] for i in range(self.b.repeat)] if self.b.separable else []

    def read_modules(self) -> list[nn.Module]:
        """Returns the convs and norms. Their parameters are read, and they are never called."""
        return [*self.depthwise(), *(m for pair in (*self.sub_blocks(), *self.panes()) for m in pair)]

    def panes(self) -> list[tuple[nn.Conv1d, nn.BatchNorm1d]]:
        """Returns the (1x1 conv, batch norm) pairs of the residual, in the order of their input blocks."""
        return [tuple(pane) for pane in self.res] if hasattr(self, "res") else []

    def refuse_hooks(self) -> None:
        """Raises RuntimeError if one of the convs and norms has hooks or a forward of its own."""
        refuse_hooks(*self.read_modules())

    def forward(
        self, x: Tensor, sources: list[Tensor], grams: list, lengths: list[Tensor] | None, seeds: Tensor | None
    ) -> Tensor:
        """Computes `x` (N, C_in, T) to (N, C_out, T'), both zero in the padding.

        `sources`: the block outputs that the panes read. `grams`: in training, the Gram matrix of each source (None for
        the plain form). `lengths`: frames at the input of each sub-block and at the end, R + 1 tensors (N,); None
        without masks. `seeds`: R int64 numbers.
        """
        self.refuse_hooks()
        b, x = self.b, autocast(x)
        y, stats = self._conv(0, x, lengths)
        for i in range(b.repeat - 1):
            if b.separable:
                (conv, bn), taps = self.sub_blocks()[i + 1], self.depthwise()[i + 1]
                following = of_the_batch(bn)
                how = self._taps(i + 1, lengths) | {"next_stats": following}
                out = self._fused(ops.separable_sub_block, y, stats, i, lengths, seeds, taps.weight, conv.weight, **how)
                y, stats = out if following else (out, None)
            elif b.s == 1:
                weight, following = self.sub_blocks()[i + 1][0].weight, of_the_batch(self.sub_blocks()[i + 1][1])
                how = {"padding": b.padding, "dilation": b.d, "next_stats": following}
                how["packed"] = partial(self.packs, i + 1)
                out = self._fused(ops.sub_block, y, stats, i, lengths, seeds, weight, **how)
                y, stats = out if following else (out, None)
            else:
                z = self._fused(ops.bn_relu_dropout, y, stats, i, lengths, seeds)
                y, stats = self._conv(i + 1, z, lengths)
        residual = self.pane_sum(sources, grams, lengths[0] if lengths else None) if sources else None
        return self._fused(ops.bn_relu_dropout, y, stats, b.repeat - 1, lengths, seeds, residual=residual)

    def _conv(self, i: int, x: Tensor, lengths: list[Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Returns conv `i` of `x`, with the statistics of its output if batch norm needs them."""
        b, (conv, bn) = self.b, self.sub_blocks()[i]
        stats = of_the_batch(bn)
        if b.separable:
            how = {"lengths": lengths[i] if lengths else None, "backend": self.backend, "stats": stats}
            out = ops.separable_conv(x, self.depthwise()[i].weight, conv.weight, **how, **self._taps(i, lengths))
            return out if stats else (out, None)
        out = ops.conv1d(
            x,
            conv.weight,
            lengths=lengths[i] if lengths else None,
            stride=b.s,
            padding=b.padding,
            dilation=b.d,
            backend=self.backend,
            stats=stats,
            packed=partial(self.packs, i),
        )
        return out if stats else (out, None)

    def _taps(self, i: int, lengths: list[Tensor] | None) -> dict[str, object]:
        """Returns the arguments of separable conv `i`, except the lengths of its input."""
        out_lengths = lengths[i + 1] if lengths else None
        geometry = {"stride": self.b.s, "padding": self.b.padding, "dilation": self.b.d}
        return geometry | {"out_lengths": out_lengths, "packed": partial(self.packs, i)}

    def _fused(self, op, y: Tensor, stats, i: int, lengths, seeds: Tensor | None, *args, **kwargs):
        """Calls `op` with the batch norm, dropout and mask that follow conv `i`. `y` is the conv's output, and `stats`
        has its statistics."""
        bn = self.sub_blocks()[i][1]
        return op(
            y,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            *args,
            lengths=lengths[i + 1] if lengths else None,
            stats=stats,
            p=self.b.dropout if self.training else 0.0,
            training=self.training or of_the_batch(bn),
            frozen=not of_the_batch(bn),
            momentum=momentum_of(bn),
            eps=bn.eps,
            seed=None if seeds is None else seeds[i : i + 1],
            backend=self.backend,
            halo=self.halo if lengths else None,
            group=sync.group_of(bn),
            **kwargs,
        )

    def gram(self, pane: int, source: Tensor) -> ops.Gram | None:
        """Returns the Gram matrix of `source`, a block output; None if `pane` of this block needs none."""
        return ops.gram(source, sync.group_of(self.panes()[pane][1])) if self.reads_gram(pane, source) else None

    def reads_gram(self, pane: int, source: Tensor) -> bool:
        """Returns whether `pane` takes its statistics from the Gram matrix of `source`."""
        bn = self.panes()[pane][1]
        return self._is_gram(source, bn) and of_the_batch(bn)

    def _is_gram(self, source: Tensor, bn: nn.Module) -> bool:
        # Ranks may have different numbers of rows, but must make the same choice.
        if sync.group_of(bn) is None and source.shape[0] * source.shape[2] < FEW_ROWS:
            return False
        if self.pane_form != "auto":
            return self.pane_form == "gram"
        return choose.pane_form(self.backend, source.device, source.dtype) == "gram"

    def pane_sum(self, sources: list[Tensor], grams: list[ops.Gram | None], lengths: Tensor | None) -> Tensor:
        """Returns the sum over the panes of BN(1x1 conv(source)), (N, C_out, T). Updates the running statistics.

        `sources` are zero at t >= `lengths` (N,). Each pane has its own settings. Panes whose batch norms have the same
        settings are computed in one call; as a rule, these are all panes.
        """
        alike: dict[tuple, list[int]] = {}
        for k, (_, bn) in enumerate(self.panes()):
            how = (bn.eps, bn.momentum, sync.group_of(bn)) if of_the_batch(bn) else None
            alike.setdefault(how, []).append(k)
        total = None
        for how, which in alike.items():
            convs, bns = zip(*(self.panes()[k] for k in which), strict=True)
            xs, weights = [sources[k] for k in which], [conv.weight for conv in convs]
            if how is None:
                out = sum_folded(xs, weights, bns)
            else:
                out = self._batch_sum(xs, [grams[k] for k in which], weights, bns, lengths)
            total = out if total is None else total + out
        return total

    def _batch_sum(self, xs, grams, weights, bns, lengths: Tensor | None) -> Tensor:
        """Returns the pane sum with the statistics of the batch, and updates the running ones."""
        gammas, betas, eps = [bn.weight for bn in bns], [bn.bias for bn in bns], bns[0].eps
        if all(self._is_gram(x, bns[0]) for x in xs):
            out, mean, var = ops.panes(xs, grams, weights, gammas, betas, eps=eps)
        else:
            how = {"lengths": lengths, "eps": eps, "backend": self.backend, "group": sync.group_of(bns[0])}
            out, mean, var = ops.panes_plain(xs, weights, gammas, betas, **how)
        with torch.no_grad():
            for stats, running in ((mean, "running_mean"), (var, "running_var")):
                kept = [(getattr(bn, running), stat) for bn, stat in zip(bns, stats, strict=True)]
                kept = [(buffer, stat.to(buffer.dtype)) for buffer, stat in kept if buffer is not None]
                if kept and bns[0].momentum is not None:
                    torch._foreach_lerp_(*map(list, zip(*kept, strict=True)), bns[0].momentum)
                elif kept:
                    for bn, (buffer, stat) in zip(bns, kept, strict=True):
                        buffer.lerp_(stat, momentum_of(bn).to(stat.dtype))
        return out


def sub_block_modules(c_in: int, b: BlockConfig) -> list[nn.Module]:
    """Makes the convs of a sub-block of `b` with `c_in` input channels, and its batch norm."""
    geometry = (b.k, b.s, b.padding, b.d)
    convs = [nn.Conv1d(c_in, b.filters, *geometry, bias=False)]
    if b.separable:
        convs = [nn.Conv1d(c_in, c_in, *geometry, groups=c_in, bias=False), nn.Conv1d(c_in, b.filters, 1, bias=False)]
    return [*convs, nn.BatchNorm1d(b.filters, BN_EPS, BN_MOMENTUM)]


def refuse_hooks(*modules: nn.Module) -> None:
    """Raises RuntimeError if one of these convs and norms has hooks or a forward of its own.

    Only their parameters are read, and they are never called, so a hook or such a forward would not run.
    """
    if torch.compiler.is_compiling():
        return
    for m in modules:
        hook = hook_of(m)
        if hook is not None or type(m).forward not in _FORWARDS:
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
    """Returns the weight of a batch's statistics in the running ones. Without momentum, all batches weigh the same."""
    if bn.momentum is None and bn.num_batches_tracked is not None:
        return 1.0 / (bn.num_batches_tracked + 1)
    return bn.momentum or 0.0


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
