"""The sum of dense-residual panes (1x1 conv + batch norm) as PyTorch computes it: one GEMM and statistics per pane.

This is the plain form; panes_op.py has the Gram form. On most faces a pane's output is freed once it is added, and
backward computes it again. Only the block outputs are then kept for backward, and other layers keep them anyway. The
C++ face also saves the outputs of the last KEPT panes, because on a CPU it is slow to compute them again.

With y = x W^T, yhat = (y - mean)*rstd and g the gradient of the sum, which is the same for every pane:
    dgamma = sum g*yhat,   dbeta = sum g,   dy = gamma*rstd*(g - dbeta/M - yhat*dgamma/M),   dW = dy^T x,   dx = dy W
"""

import torch
from torch import Tensor

from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels.layout import empty_ntc, ntc, rows as _rows, wide_dtype
from jasper_fast.ops import sync
from jasper_fast.ops.bn_relu_dropout_op import check_lengths, norm_face
from jasper_fast.ops.panes_op import check_panes, unbiased
from jasper_fast.ops.registration import lib, op, register_autograd

KEPT = 7  # A block saves at most this many pane outputs on a CPU: those of its last panes, with the widest inputs.


def _impl_name(face: str, weights: list[Tensor], *activations: Tensor) -> str:
    """Returns the face of `panes` that goes with batch norm on `face`.

    For batch norm on "cpu" it is "cpu" too, if the C++ panes take these dtypes and C++ also runs convs of this dtype.
    In all other cases it is "reference".
    """
    dtype = activations[0].dtype
    if face != "cpu" or any(w.dtype not in (dtype, torch.float32) for w in weights):
        return "reference"
    takes = backends.face("panes", "cpu").takes(*activations)
    return "cpu" if takes and choose.conv_face("cpu", torch.device("cpu"), dtype) == "cpu" else "reference"


def _saved(keep: int, face: str, xs: list[Tensor], weights: list[Tensor]) -> int:
    """Returns how many pane outputs are saved: at most `keep` on the C++ face, and none on another face.

    The op calls this, and not `panes_plain`, because torch.compile cannot trace the import of a face.
    """
    return min(keep, len(xs)) if _impl_name(face, weights, *xs) == "cpu" else 0


def _groups(panes, kept):
    """Yields (slice of `panes`, buffer for its outputs): first one slice for each pane whose output is not saved, then
    one slice for all panes whose outputs are saved."""
    passing = len(panes) - len(kept)
    place = kept.new_empty((1, *kept.shape[1:])) if passing else kept
    yield from ((slice(k, k + 1), place) for k in range(passing))
    if len(kept):
        yield slice(passing, None), kept


@op(
    "panes_plain(Tensor[] xs, Tensor[] weights, Tensor gamma, Tensor beta, Tensor? lengths, float eps, int keep, "
    "str group, str face) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _forward(xs, weights, gamma, beta, lengths, eps, keep, group, face):
    n, _, t = xs[0].shape
    bn, impl = backends.face("bn_relu_dropout", face), backends.face("panes", _impl_name(face, weights, *xs))
    out = beta.sum(0)  # in a wide dtype, so that the sum is rounded only once
    kept, total = xs[0].new_empty((_saved(keep, face, xs, weights), n * t, len(out))), out.new_empty(0)
    means, variances = [], []
    for panes, ys in _groups(xs, kept):
        impl.outputs(xs[panes], weights[panes], lengths, ys)
        means_m2s = zip(*(bn.stats(y.unflatten(0, (n, t)).transpose(1, 2)) for y in ys), strict=True)
        mean, m2 = (torch.cat(stats).to(out.dtype) for stats in means_m2s)
        if group:
            mean, m2, total = sync.merge_stats(mean, m2, n * t, group)
        means.append(mean.view(len(ys), -1))
        variances.append(m2.view(len(ys), -1) / (total if group else n * t))
        out = impl.forward(ys, means[-1], gamma[panes] * (variances[-1] + eps).rsqrt(), out)
    out = out.to(xs[0].dtype).unflatten(0, (n, t)).transpose(1, 2)
    return out, torch.cat(means), torch.cat(variances), total, kept


@op(
    "panes_plain_backward(Tensor g, Tensor[] xs, Tensor[] weights, Tensor gamma, Tensor? lengths, Tensor pane_mean, "
    "Tensor pane_var, Tensor rows, Tensor kept, float eps, str group, str face) "
    "-> (Tensor[], Tensor[], Tensor, Tensor)"
)
def _backward(g, xs, weights, gamma, lengths, pane_mean, pane_var, rows, kept, eps, group, face):
    impl = backends.face("panes", _impl_name(face, weights, g, *xs))
    m, g = rows if group else g.shape[0] * g.shape[2], _rows(ntc(g))
    dbeta = g.sum(0, dtype=pane_mean.dtype)
    mean_g = sync.all_reduce(dbeta.clone(), group) / m
    rstd = (pane_var + eps).rsqrt()
    scale, dgammas, dxs, dweights = gamma * rstd, [], [], []
    for panes, ys in _groups(xs, kept):
        if ys is not kept:
            impl.outputs(xs[panes], weights[panes], lengths, ys)
        dgamma = impl.backward_reduce(g, ys, pane_mean[panes]) * rstd[panes]
        slope = sync.all_reduce(dgamma.clone(), group) * rstd[panes] / m
        dx, dw = impl.gradients(
            g, mean_g, ys, pane_mean[panes], scale[panes], slope, xs[panes], weights[panes], lengths
        )
        dxs += dx
        dweights += dw
        dgammas.append(dgamma)
    return dxs, dweights, torch.cat(dgammas), dbeta


@torch.library.register_fake("jasper_fast::panes_plain", lib=lib)
def _(xs, weights, gamma, beta, lengths, eps, keep, group, face):
    n, _, t = xs[0].shape
    c_out, stat = weights[0].shape[0], torch.empty_like(gamma)
    out = empty_ntc(n, c_out, t, like=xs[0])
    kept = xs[0].new_empty((_saved(keep, face, xs, weights), n * t, c_out))
    return out, stat, torch.empty_like(stat), stat.new_empty(() if group else 0), kept


@torch.library.register_fake("jasper_fast::panes_plain_backward", lib=lib)
def _(g, xs, weights, gamma, lengths, pane_mean, pane_var, rows, kept, eps, group, face):
    dxs = [empty_ntc(*x.shape, like=g) for x in xs]
    dweights = [w.new_empty(w.shape) for w in weights]
    return dxs, dweights, torch.empty_like(pane_mean), pane_mean.new_empty(pane_mean.shape[1])


def _save(ctx, inputs, output):
    xs, weights, gamma, _, lengths, ctx.eps, _, ctx.group, ctx.face = inputs
    ctx.save_for_backward(*xs, *weights, gamma, lengths, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


@register_autograd("panes_plain", _save)
def _grad(ctx, g, *_):
    *lists, gamma, lengths, mean, var, rows, kept = ctx.saved_tensors
    n = len(lists) // 2
    dxs, dweights, dgamma, dbeta = torch.ops.jasper_fast.panes_plain_backward(
        g, lists[:n], lists[n:], gamma, lengths, mean, var, rows, kept, ctx.eps, ctx.group, ctx.face
    )
    # Each beta needs a gradient in its own memory, because gradients may be changed in place.
    return dxs, dweights, dgamma, dbeta.repeat(n, 1), *(None,) * 5


def panes_plain(
    xs: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    *,
    lengths: Tensor | None = None,
    eps: float = 1e-3,
    backend: str = "auto",
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sum of a block's panes in training, pane by pane: the result of `panes`, without Gram matrices.

    The result is (sum (N, C_out, T), means, unbiased variances (P, C_out)). `backend` chooses the face of the
    batch norm statistics. With `group` these are over the rows of all its ranks. The xs must be zero at t >= `lengths`
    (N,), which must not exceed T. Kernels skip the frames beyond them, and the gradient of the xs is undefined there.
    The other arguments, the errors and the equivalent PyTorch are those of `panes`.
    """
    name = sync.name(group)
    check_panes(xs, weights, gammas, betas, bool(name))
    wide, lengths = wide_dtype(xs[0]), check_lengths(lengths, xs[0].shape[0])
    face = norm_face(xs[0], backend, weights[0].shape[0], xs[0].shape[2])
    keep = KEPT if face == "cpu" and torch.is_grad_enabled() else 0
    out, mean, var, rows, _ = torch.ops.jasper_fast.panes_plain(
        list(xs), list(weights), torch.stack(gammas).to(wide), torch.stack(betas).to(wide), lengths, eps, keep, name,
        face,
    )  # fmt: skip
    return out, mean, unbiased(var, xs[0], rows if name else None)
