"""Batch norm, residual sum, ReLU, dropout and the mask of the next conv as one op."""

import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels.layout import empty_ntc, ntc, wide_dtype
from jasper_fast.kernels.operands import Mask, Norm
from jasper_fast.ops import sync
from jasper_fast.ops.registration import lib, op, register_autograd


@op("bn_stats(Tensor y, str face) -> (Tensor, Tensor)")
def _stats(y, face):
    return backends.face(backends.NORM, face).stats(ntc(y))


@op(
    "bn_relu_dropout(Tensor y, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? residual, Tensor? lengths, "
    "Tensor? seed, Tensor? rows, float p, bool batch_stats, int? halo, str group, str face) -> Tensor"
)
def _forward(y, mean, rstd, gamma, beta, residual, lengths, seed, rows, p, batch_stats, halo, group, face):
    residual = None if residual is None else ntc(residual)
    norm, mask = Norm(mean, rstd, gamma, beta), Mask(lengths, seed, p)
    return backends.face(backends.NORM, face).forward(ntc(y), norm, residual, mask)


@op(
    "bn_relu_dropout_backward(Tensor dz, Tensor y, Tensor? z, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, "
    "Tensor? lengths, Tensor? seed, Tensor? rows, float p, bool batch_stats, int? halo, bool has_residual, str group, "
    "str face) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _backward(
    dz, y, z, mean, rstd, gamma, beta, lengths, seed, rows, p, batch_stats, halo, has_residual, group, face
):  # fmt: skip
    impl = backends.face(backends.NORM, face)
    saved = (ntc(dz), ntc(y), None if z is None else ntc(z), Norm(mean, rstd, gamma, beta))
    mask = Mask(lengths, seed, p)
    dbeta, dgamma = impl.backward_reduce(*saved, mask)
    means = mean_sums(dbeta, dgamma, y, rows, group) if batch_stats else None
    dy, dres = impl.backward_apply(*saved, means, mask, has_residual, halo)
    return dy, dgamma, dbeta, dy.new_empty(0) if dres is None else dres


def mean_sums(dbeta: Tensor, dgamma: Tensor, y: Tensor, rows: Tensor | None, group: str) -> tuple[Tensor, Tensor]:
    """Returns (dbeta/M, dgamma/M) over the rows of all ranks of `group`. `dbeta` and `dgamma` are the sums of this
    rank, and are not changed."""
    if not group:
        return tuple(torch._foreach_div([dbeta, dgamma], y.shape[0] * y.shape[2]))
    return tuple(sync.all_reduce(torch.stack([dbeta, dgamma]), group) / rows)


op("bn_sync_stats(Tensor mean, Tensor m2, SymInt rows, str group) -> (Tensor, Tensor, Tensor)")(sync.merge_stats)


def fake_stats(y: Tensor, c: int, stats: bool) -> tuple[Tensor, Tensor]:
    """Returns mean and M2 of `c` channels as fake tensors, for a fake `y`. Without `stats` they are empty."""
    stat = y.new_empty(c, dtype=wide_dtype(y)) if stats else y.new_empty(0)
    return stat, torch.empty_like(stat)


@torch.library.register_fake("jasper_fast::bn_stats", lib=lib)
def _(y, face):
    return fake_stats(y, y.shape[1], True)


@torch.library.register_fake("jasper_fast::bn_sync_stats", lib=lib)
def _(mean, m2, rows, group):
    return torch.empty_like(mean), torch.empty_like(m2), mean.new_empty(())


@torch.library.register_fake("jasper_fast::bn_relu_dropout", lib=lib)
def _(y, *_args):
    return empty_ntc(*y.shape, like=y)


@torch.library.register_fake("jasper_fast::bn_relu_dropout_backward", lib=lib)
def _(dz, y, z, mean, rstd, gamma, beta, lengths, seed, rows, p, batch_stats, halo, has_residual, group, face):
    dres = empty_ntc(*y.shape, like=y) if has_residual else y.new_empty(0)
    return empty_ntc(*y.shape, like=y), torch.empty_like(gamma), torch.empty_like(beta), dres


def _save(ctx, inputs, output):
    *norm, residual, lengths, seed, rows, ctx.p, ctx.batch_stats, ctx.halo, ctx.group, ctx.face = inputs
    ctx.has_residual = residual is not None
    # With a residual, the output z is saved: it shows backward where the ReLU let values pass. This takes no extra
    # memory, because z is then the output of a block, which stays in memory anyway.
    ctx.save_for_backward(norm[0], output if ctx.has_residual else None, *norm[1:], lengths, seed, rows)


@register_autograd("bn_relu_dropout", _save)
def _grad(ctx, dz):
    dy, dgamma, dbeta, dres = torch.ops.jasper_fast.bn_relu_dropout_backward(
        dz, *ctx.saved_tensors, ctx.p, ctx.batch_stats, ctx.halo, ctx.has_residual, ctx.group, ctx.face
    )
    return dy, None, None, dgamma, dbeta, dres if ctx.has_residual else None, *(None,) * 8


def norm_face(x: Tensor, backend: str, channels: int, frames: int) -> str:
    """Returns what `choose.norm_face` chooses for a tensor (N, `channels`, `frames`) with the N, device and dtype of
    `x`."""
    channels = operator.index(channels)  # makes it a constant in a traced graph
    return choose.norm_face(backend, x.device, x.dtype, channels, choose.rows_log2(x.shape[0] * frames))


def draw_seeds(count: int, device: torch.device | str) -> Tensor:
    """Draws `count` dropout seeds, int64 (count,) on `device`, from PyTorch's default generator of that device.

    On CUDA the seeds are drawn on the device without a host sync, so a captured graph has new masks in each replay.
    """
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device)


def bn_stats(y: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Returns the mean and M2 (sum of squared deviations) of each channel of `y` (N, C, T) over all N*T rows.

    Padding counts too. The two tensors are (C,), fp32 (fp64 for fp64 input). Equivalent to `y.mean((0, 2))` and
    `y.var((0, 2)) * (M - 1)`. Raises ValueError for another number of dimensions.
    """
    check_dim(y)
    return torch.ops.jasper_fast.bn_stats(y.detach(), norm_face(y, backend, *y.shape[1:]))


def bn_relu_dropout(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    p: float = 0.0,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-3,
    seed: Tensor | int | None = None,
    backend: str = "auto",
    frozen: bool = False,
    halo: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Computes batch norm, residual sum, ReLU, dropout and zeroing of the padding in one pass.

    Shapes: `y`, `residual` and the result (N, C, T), in fp32, fp16, bf16 or fp64 (reference face) and NTC memory (other
    strides are copied); `gamma`, `beta`, `running_mean`, `running_var` (C,); `lengths` (N,) in frames. The result is
    zero at t >= length. `stats` is (mean, M2) of `y` over its N*T rows, (C,) each, if a conv has already computed them.

    With `training`, `y` is normalised with the statistics of the batch, padding included; the running statistics are
    updated in place; and elements are dropped with probability `p`. Without `training`, the running statistics are used
    and nothing is dropped. `frozen` with `training` drops elements, but uses the running statistics and does not update
    them. `seed` (one int64) fixes the dropout mask (Philox4x32-10, the same bits on every face); None draws a seed from
    PyTorch's generator.

    `halo`, with `lengths`, promises that `y` is zero at t >= length + halo, so backward need not read it there. If `y`
    is the output of a conv whose input has zero padding, halo is `ceil((dilation * (K - 1) - padding) / stride)`
    frames. With `group` and `training` the statistics are over the rows of all ranks of the group, as in
    nn.SyncBatchNorm; N*T may differ between ranks. The gradients of gamma and beta are those of this rank.

    Raises ValueError for shapes that do not fit, lengths or a seed that are not int64, p outside [0, 1) and a negative
    halo, and if the running statistics are needed but None. Also raises it if the statistics of a batch with fewer than
    two rows (N*T < 2) are wanted, unless there is a group; PyTorch accepts a batch without rows. Raises BackendMissing
    for a named backend that cannot run here.

    Semantics: what follows the conv in a sub-block of NVIDIA's `jasper/model.py`. Equivalent to

        z = F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
        z = F.dropout(F.relu(z + residual), p, training)
        z = z.masked_fill(torch.arange(T) >= lengths[:, None, None], 0)
    """
    lengths = check(y, gamma, beta, running_mean, running_var, stats, residual, lengths, p, halo)
    p, seed = dropout_seed(p if training else 0.0, seed, y.device)
    norm = normaliser(y, gamma, beta, running_mean, running_var, stats, training, frozen, momentum, eps, backend, group)
    residual = None if residual is None else residual.to(y.dtype)
    return torch.ops.jasper_fast.bn_relu_dropout(
        y, *norm.vectors, residual, lengths, seed, norm.rows, p,
        norm.batch_stats, halo, norm.group, norm_face(y, backend, *y.shape[1:]),
    )  # fmt: skip


class Normaliser(NamedTuple):
    """What normalises y: mean, rstd, gamma and beta in a wide dtype, and whether the statistics are those of the batch.

    For batch statistics of a group of ranks, also the group's number of rows (0-d) and its name.
    """

    vectors: Norm
    batch_stats: bool
    rows: Tensor | None
    group: str


def normaliser(
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stats: tuple[Tensor, Tensor] | None,
    training: bool,
    frozen: bool,
    momentum: float,
    eps: float,
    backend: str,
    group: torch.distributed.ProcessGroup | None,
) -> Normaliser:
    """Returns the batch's statistics, with gamma and beta in the same dtype, and updates the running statistics.
    Without `training`, or if `frozen`, returns the running statistics in their place."""
    batch_stats = training and not frozen
    rows, name = None, sync.name(group) if batch_stats else ""
    if batch_stats:
        check_rows(y, name)
        m = y.shape[0] * y.shape[2]
        mean, m2 = bn_stats(y, backend if m else "reference") if stats is None else (s.detach() for s in stats)
        if name:
            mean, m2, rows = torch.ops.jasper_fast.bn_sync_stats(mean, m2, m, name)
            m = rows
        if name or torch.compiler.is_compiling():
            var, unbiased = m2 / m, m2 / (m - 1)
        else:  # both divisions in one launch
            var, unbiased = torch._foreach_div([m2, m2], [m, m - 1])
        update_running([running_mean, running_var], [mean, unbiased], momentum)
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var are needed unless the statistics of the batch are used")
    else:
        mean, var = running_mean.detach(), running_var.detach()
    mean, var, gamma, beta = (v.to(wide_dtype(y)).contiguous() for v in (mean, var, gamma, beta))
    return Normaliser(Norm(mean, (var + eps).rsqrt(), gamma, beta), batch_stats, rows, name)


def dropout_seed(p: float, seed: Tensor | int | None, device: torch.device) -> tuple[float, Tensor | None]:
    """Returns (p, seed), the seed as an int64 tensor with one element. Draws a seed if none is given. If p is 0, the
    seed is None."""
    if p == 0.0:
        return p, None
    if not isinstance(seed, Tensor):
        seed = draw_seeds(1, device) if seed is None else torch.tensor([seed], dtype=torch.int64, device=device)
    elif seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be one int64, got {tuple(seed.shape)} {seed.dtype}")
    return p, seed


@torch.no_grad()
def update_running(running: list[Tensor | None], values: Iterable[Tensor], momentum: float | Tensor) -> None:
    """Moves the running statistics that are not None towards `values` by `momentum`, in one launch if momentum is a
    number."""
    pairs = [(of, to.to(of.dtype)) for of, to in zip(running, values, strict=True) if of is not None]
    if isinstance(momentum, Tensor):
        for of, to in pairs:
            of.lerp_(to, momentum.to(of.dtype))
    elif pairs:
        torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), momentum)


def check(y, gamma, beta, running_mean, running_var, stats, residual, lengths, p, halo) -> Tensor | None:
    """Raises ValueError for arguments of `bn_relu_dropout` that do not fit. Returns `lengths`, contiguous."""
    check_dim(y)
    n, c, _ = y.shape
    vectors = {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    for name, v in (*vectors.items(), *(("each of stats", of) for of in stats or ())):
        if v is not None and v.shape != (c,):
            raise ValueError(f"{name} must be ({c},) for y {tuple(y.shape)}, got {tuple(v.shape)}")
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual must be {tuple(y.shape)} like y, got {tuple(residual.shape)}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must lie in [0, 1), got {p}")
    if halo is not None and halo < 0:
        raise ValueError(f"halo, the number of frames that y fills beyond the length, must be at least 0, got {halo}")
    return check_lengths(lengths, n)


def check_dim(y: Tensor) -> None:
    """Raises ValueError unless `y` has three dimensions."""
    if y.dim() != 3:
        raise ValueError(f"y must be (N, C, T), got {tuple(y.shape)}")


def check_rows(x: Tensor, synced: bool | str) -> None:
    """Raises ValueError if `x` (N, C, T) has fewer than two rows, unless `synced`: other ranks may then have rows."""
    if not synced and x.shape[0] * x.shape[2] < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def check_lengths(lengths: Tensor | None, n: int) -> Tensor | None:
    """Returns `lengths` in contiguous memory, as the faces read them, or None for None.

    Raises ValueError unless they are int64 (n,).
    """
    if lengths is None:
        return None
    if lengths.shape != (n,) or lengths.dtype != torch.int64:
        raise ValueError(f"lengths must be ({n},) int64, got {tuple(lengths.shape)} {lengths.dtype}")
    return lengths.contiguous()
