"""The definition of NovoGrad's step in PyTorch's foreach operations, for any floating-point dtypes on one device."""

import functools

import torch
from torch import Tensor

from jasper_fast.kernels.novograd.operands import Settings, Tensors, Watched

Number = float | Tensor


def step(
    tensors: Tensors,
    watched: Watched,
    settings: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_norm: float,
    guard: bool,
    held: dict,
) -> Tensor:
    """Makes one step in place. Returns (2,): the unscaled gradients' norm before clipping, and 1 if skipped, else 0.

    The host never waits for a GPU. held: not used.
    """
    wide = functools.reduce(torch.promote_types, (g.dtype for g in tensors.grads), torch.float32)
    device, settings = settings.device, settings.to(wide)
    norms = torch.stack(torch._foreach_norm(tensors.grads, 2, dtype=wide))
    norms = norms if grad_scale is None else norms / grad_scale.to(norms)
    norm = torch.linalg.vector_norm(norms)
    bad = torch.zeros((), dtype=torch.bool, device=device) if found_inf is None else found_inf.reshape(()) != 0
    bad = bad | ~torch.isfinite(norm) if guard else bad
    clip = (clip_norm / (norm + 1e-6)).clamp(max=1.0) if clip_norm else torch.ones_like(norm)
    scale = clip if grad_scale is None else clip / grad_scale.to(norms)
    on_cpu = device.type == "cpu"
    rows = settings.tolist() if on_cpu else list(settings)  # on a GPU `tolist` would wait
    if not on_cpu or not bad:
        for index, row in enumerate(rows):
            mine = [i for i, group in enumerate(tensors.groups) if group == index]
            if mine:
                part = Tensors(*([of[i] for i in mine] if of else [] for of in tensors))
                # not norms[mine]: it would send the list `mine` to the GPU, and the host would wait for that
                squares = (torch.stack([norms[i] for i in mine]) * clip).square()
                _update(part, Settings(*row), squares, scale, None if on_cpu else bad)
    average(tensors.params, tensors.averages, rows[0][-1])
    average(*watched, rows[0][-1])
    return torch.stack([norm, bad.to(norm)])


def _update(tensors: Tensors, s: Settings, squares: Tensor, scale: Tensor, bad: Tensor | None) -> None:
    """Updates the parameters of one group. bad: a tensor that is true if they must not change; None means false."""
    grads, params, exp_avgs, exp_avg_sqs, *_ = tensors
    old = torch.stack([v.reshape(()) for v in exp_avg_sqs]).to(squares)
    new = torch.where((old == 0) | (s.beta2 == 0), squares, s.beta2 * old + s.rest2 * squares)
    factors = s.share * scale / (new.sqrt() + s.eps)
    beta1, decay, lr = s.beta1, s.decay, s.lr
    if bad is not None:  # selects zeros instead of multiplying by zero, because 0 * inf is NaN
        new, keep = torch.where(bad, old, new), 1 - bad.to(squares)
        grads = [torch.where(bad, torch.zeros((), dtype=g.dtype, device=g.device), g) for g in grads]
        factors = torch.where(bad, 0.0, factors)
        beta1, decay, lr = 1 - keep * (1 - beta1), keep * decay, keep * lr
    torch._foreach_copy_(exp_avg_sqs, [x.view_as(v) for x, v in zip(new.unbind(), exp_avg_sqs, strict=True)])
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_addcmul_(exp_avgs, grads, [x.to(m.dtype) for x, m in zip(factors.unbind(), exp_avgs, strict=True)])
    if not isinstance(decay, float) or decay:
        _add(exp_avgs, params, decay)
    _add(params, exp_avgs, -lr)


def average(lives: list[Tensor], averages: list[Tensor], weight: Number) -> None:
    """averages += weight*(lives - averages), in place. Tensors that are not floating-point are copied instead."""
    for key in dict.fromkeys(a.dtype for a in averages):
        mine = [i for i, a in enumerate(averages) if a.dtype == key]
        of, to = [averages[i] for i in mine], [lives[i].detach() for i in mine]
        if not key.is_floating_point:
            torch._foreach_copy_(of, to)
        elif isinstance(weight, float):
            torch._foreach_lerp_(of, to, weight)
        else:
            _add(of, torch._foreach_sub(to, of), weight)


def _add(xs: list[Tensor], ys: list[Tensor], by: Number) -> None:
    """xs += by*ys."""
    if isinstance(by, float):
        torch._foreach_add_(xs, ys, alpha=by)
    else:
        torch._foreach_add_(xs, torch._foreach_mul(ys, by))
