"""Batch norm, residual sum, ReLU, dropout and the next conv's mask as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.backends import face as _face
from jasper_fast.backends import resolve
from jasper_fast.kernels.layout import ntc
from jasper_fast.ops.library import lib, without_autocast

_OP = "bn_relu_dropout"

lib.define("bn_stats(Tensor y, str face) -> (Tensor, Tensor)")
lib.define(
    "bn_relu_dropout(Tensor y, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, Tensor? residual, Tensor? lengths, "
    "Tensor? seed, float p, bool batch_stats, str face) -> Tensor"
)
lib.define(
    "bn_relu_dropout_backward(Tensor dz, Tensor y, Tensor? z, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, "
    "Tensor? lengths, Tensor? seed, float p, bool batch_stats, bool has_residual, str face) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _stats(y, face):
    return _face(_OP, face).stats(ntc(y))


def _forward(y, mean, rstd, gamma, beta, residual, lengths, seed, p, batch_stats, face):
    residual = None if residual is None else ntc(residual)
    return _face(_OP, face).forward(ntc(y), mean, rstd, gamma, beta, residual, lengths, seed, p)


def _backward(dz, y, z, mean, rstd, gamma, beta, lengths, seed, p, batch_stats, has_residual, face):
    impl = _face(_OP, face)
    dz, y, z = ntc(dz), ntc(y), None if z is None else ntc(z)
    dbeta, dgamma = impl.backward_reduce(dz, y, z, mean, rstd, gamma, beta, lengths, seed, p)
    m = y.shape[0] * y.shape[2]
    mean_g, mean_gy = (dbeta / m, dgamma / m) if batch_stats else (None, None)
    dy, dres = impl.backward_apply(dz, y, z, mean, rstd, gamma, beta, mean_g, mean_gy, lengths, seed, p, has_residual)
    return dy, dgamma, dbeta, dy.new_empty(0) if dres is None else dres


lib.impl("bn_stats", without_autocast(_stats), "CompositeExplicitAutograd")
lib.impl("bn_relu_dropout", without_autocast(_forward), "CompositeExplicitAutograd")
lib.impl("bn_relu_dropout_backward", without_autocast(_backward), "CompositeExplicitAutograd")


def _like(y: Tensor) -> Tensor:
    n, c, t = y.shape
    return y.new_empty((n, t, c)).transpose(1, 2)


@torch.library.register_fake("jasper_fast::bn_stats", lib=lib)
def _(y, face):
    stat = y.new_empty(y.shape[1], dtype=torch.float64 if y.dtype == torch.float64 else torch.float32)
    return stat, torch.empty_like(stat)


@torch.library.register_fake("jasper_fast::bn_relu_dropout", lib=lib)
def _(y, mean, rstd, gamma, beta, residual, lengths, seed, p, batch_stats, face):
    return _like(y)


@torch.library.register_fake("jasper_fast::bn_relu_dropout_backward", lib=lib)
def _(dz, y, z, mean, rstd, gamma, beta, lengths, seed, p, batch_stats, has_residual, face):
    return _like(y), torch.empty_like(gamma), torch.empty_like(beta), _like(y) if has_residual else y.new_empty(0)


def _save(ctx, inputs, output):
    y, mean, rstd, gamma, beta, residual, lengths, seed, ctx.p, ctx.batch_stats, ctx.face = inputs
    ctx.has_residual = residual is not None
    # With a residual the output tells where the ReLU was open; it lives on as a block output anyway.
    ctx.save_for_backward(y, output if ctx.has_residual else None, mean, rstd, gamma, beta, lengths, seed)


def _grad(ctx, dz):
    y, z, mean, rstd, gamma, beta, lengths, seed = ctx.saved_tensors
    dy, dgamma, dbeta, dres = torch.ops.jasper_fast.bn_relu_dropout_backward(
        dz, y, z, mean, rstd, gamma, beta, lengths, seed, ctx.p, ctx.batch_stats, ctx.has_residual, ctx.face
    )
    return dy, None, None, dgamma, dbeta, dres if ctx.has_residual else None, None, None, None, None, None


torch.library.register_autograd("jasper_fast::bn_relu_dropout", _grad, setup_context=_save, lib=lib)


def draw_seeds(count: int, device: torch.device | str) -> Tensor:
    """`count` dropout seeds, int64 (count,) on `device`, from PyTorch's default generator there.

    On CUDA they are drawn on the device, without a host sync, so a captured graph replays with fresh masks.
    """
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device)


def bn_stats(y: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Per-channel mean and M2 (sum of squared deviations) of `y` (N, C, T) over all N*T rows, padding included.

    Returns two (C,) tensors, fp32 (fp64 for fp64 input). Equivalent to `y.mean((0, 2))` and `y.var((0, 2)) * (M - 1)`.
    """
    return torch.ops.jasper_fast.bn_stats(y.detach(), resolve(backend, y.device.type))


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
) -> Tensor:
    """Batch norm, residual sum, ReLU, dropout and zeroing of the padding in one pass.

    Shapes: `y`, `residual` and the result (N, C, T), fp32, fp16, bf16 or fp64 (reference face), in NTC memory (other
    strides are copied); `gamma`, `beta`, `running_mean`, `running_var` (C,); `lengths` (N,) integer frames, from which
    on the result is zero. `stats` is (mean, M2) of `y` over its N*T rows, each (C,), where a conv already took them.

    With `training` the statistics are those of the batch, padding included, the running ones are updated in place, and
    elements are dropped with probability `p`. Without it the running statistics normalise and nothing is dropped.
    `frozen` with `training` drops, but normalises with the running statistics and leaves them alone. `seed` (one int64)
    fixes the mask (Philox4x32-10, the same bits on every face); None draws one from PyTorch's generator.

    Raises ValueError for shapes that do not fit, for p outside [0, 1), and in training for N*T = 1 as PyTorch does;
    BackendMissing for a backend asked for by name that cannot run here.

    Semantics: one sub-block of the reference's `jasper/model.py` after its conv. Equivalent to

        z = F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
        z = F.dropout(F.relu(z + residual), p, training)
        z = z.masked_fill(torch.arange(T) >= lengths[:, None, None], 0)
    """
    check(y, gamma, beta, running_mean, running_var, residual, lengths, p)
    mean, rstd, batch_stats = normaliser(y, running_mean, running_var, stats, training, frozen, momentum, eps, backend)
    p, seed = dropout_seed(p if training else 0.0, seed, y.device)
    if residual is not None:
        residual = residual.to(y.dtype)
    return torch.ops.jasper_fast.bn_relu_dropout(
        y, mean, rstd, gamma.to(mean.dtype), beta.to(mean.dtype), residual, lengths, seed, p, batch_stats,
        resolve(backend, y.device.type),
    )  # fmt: skip


def normaliser(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stats: tuple[Tensor, Tensor] | None,
    training: bool,
    frozen: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, bool]:
    """(mean, rstd, whether they are the batch's own); updates the running statistics where they are."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    batch_stats = training and not frozen
    if batch_stats:
        m = y.shape[0] * y.shape[2]
        if m == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
        mean, m2 = bn_stats(y, backend) if stats is None else (s.detach() for s in stats)
        var = m2 / m
        _update(running_mean, mean, momentum)
        _update(running_var, m2 / (m - 1), momentum)
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var are needed where the batch's own statistics are not used")
    else:
        mean, var = running_mean.detach(), running_var.detach()
    return mean.to(wide), (var.to(wide) + eps).rsqrt(), batch_stats


def dropout_seed(p: float, seed: Tensor | int | None, device: torch.device) -> tuple[float, Tensor | None]:
    """(p, seed tensor (1,)): the seed is drawn where none is given, and None where nothing is dropped."""
    if p == 0.0:
        return p, None
    if seed is None:
        return p, draw_seeds(1, device)
    return p, seed if isinstance(seed, Tensor) else torch.tensor([seed], dtype=torch.int64, device=device)


def _update(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        with torch.no_grad():
            running.lerp_(value.to(running.dtype), momentum)


def check(y, gamma, beta, running_mean, running_var, residual, lengths, p) -> None:
    if y.dim() != 3:
        raise ValueError(f"y must be (N, C, T), got {tuple(y.shape)}")
    n, c, _ = y.shape
    for name, v in (("gamma", gamma), ("beta", beta), ("running_mean", running_mean), ("running_var", running_var)):
        if v is not None and v.shape != (c,):
            raise ValueError(f"{name} must be ({c},) for y {tuple(y.shape)}, got {tuple(v.shape)}")
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual must be {tuple(y.shape)} like y, got {tuple(residual.shape)}")
    if lengths is not None and (lengths.shape != (n,) or lengths.is_floating_point()):
        raise ValueError(f"lengths must be ({n},) integers, got {tuple(lengths.shape)} {lengths.dtype}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must lie in [0, 1), got {p}")
