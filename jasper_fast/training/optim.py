"""NovoGrad with foreach operations and no host synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class NovoGrad(torch.optim.Optimizer):
    """NovoGrad (Ginsburg et al., 2019), with the update of NVIDIA's Jasper: the second moment is one scalar per tensor.

    `params`: floating-point parameters or groups of them; `lr`: a float or a one-element tensor; `betas`: decay of the
    first and of the second moment; `grad_averaging` scales each new term of the first moment by `1 - beta1`.
    The state of a parameter is `exp_avg` (its shape and dtype) and `exp_avg_sq` (a scalar, fp32 or fp64).
    Gradients are not changed. Nothing here waits for the device: neither the first step, nor a tensor `lr`, nor a
    `GradScaler`, because its `found_inf` is applied on the device and then leaves parameters and state unchanged.
    Raises ValueError for settings out of range and RuntimeError for sparse gradients. Equivalent, for one parameter `p`
    with gradient `g`:

        v = (g * g).sum() if v == 0 else beta2 * v + (1 - beta2) * (g * g).sum()
        u = g / (v.sqrt() + eps) + weight_decay * p
        m = beta1 * m + (u * (1 - beta1) if grad_averaging else u)
        p = p - lr * m
    """

    _step_supports_amp_scaling = (
        True  # GradScaler then passes `grad_scale` and `found_inf` instead of waiting for the device
    )

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
    ):
        if not isinstance(lr, Tensor) and lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if eps < 0 or weight_decay < 0:
            raise ValueError(f"eps and weight_decay must not be negative, got {eps} and {weight_decay}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"grad_averaging": grad_averaging})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's value, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            for key in dict.fromkeys((p.device, p.dtype) for p in ready):  # foreach wants one device and one dtype
                self._update([p for p in ready if (p.device, p.dtype) == key], group, grad_scale, found_inf)
        return loss

    def _update(self, params: list[Tensor], group: dict, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        lr, share = group["lr"], 1 - beta1 if group["grad_averaging"] else 1.0
        device, wide = params[0].device, torch.promote_types(params[0].dtype, torch.float32)
        for p in params:
            if p.grad.is_sparse:
                raise RuntimeError("NovoGrad takes dense gradients only: build the layer with sparse=False")
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros((), dtype=wide, device=device)
        grads = [p.grad for p in params]
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]

        scale = 1.0 if grad_scale is None else grad_scale.to(device, non_blocking=True).to(wide).reciprocal()
        old = torch.stack(exp_avg_sqs)
        new = (torch.stack(torch._foreach_norm(grads, 2, dtype=wide)) * scale).square()
        if beta2:  # a second moment of zero means that there was no step yet
            new = torch.where(old == 0, new, beta2 * old + (1 - beta2) * new)
        keep = None
        if found_inf is not None:
            keep = found_inf.to(device, non_blocking=True).reshape(()) == 0
            new = torch.where(keep, new, old)
            # A selection, not a product: 0 * inf is NaN.
            grads = [torch.where(keep, g, torch.zeros((), dtype=g.dtype, device=device)) for g in grads]
        torch._foreach_copy_(exp_avg_sqs, list(new.unbind()))
        factors = list((share * scale / (new.sqrt() + group["eps"])).to(params[0].dtype).unbind())

        if keep is None and not isinstance(lr, Tensor):
            torch._foreach_mul_(exp_avgs, beta1)
            torch._foreach_addcmul_(exp_avgs, grads, factors)
            if group["weight_decay"]:
                torch._foreach_add_(exp_avgs, params, alpha=share * group["weight_decay"])
            torch._foreach_add_(params, exp_avgs, alpha=-lr)
            return
        # The same with scalars that are on the device.
        one = torch.ones((), dtype=params[0].dtype, device=device)
        gate = one if keep is None else keep.to(one.dtype)
        torch._foreach_mul_(exp_avgs, 1 - gate * (1 - beta1) if keep is not None else beta1)
        torch._foreach_addcmul_(exp_avgs, grads, factors)
        if group["weight_decay"]:
            torch._foreach_add_(exp_avgs, torch._foreach_mul(params, gate * (share * group["weight_decay"])))
        rate = lr.to(device, non_blocking=True).to(one.dtype).reshape(()) if isinstance(lr, Tensor) else lr
        torch._foreach_add_(params, torch._foreach_mul(exp_avgs, -gate * rate))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like `torch.optim.Optimizer`, but `exp_avg_sq` keeps its own dtype instead of the parameter's."""
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(order, saved, strict=True):
            if "exp_avg_sq" in state_dict["state"].get(i, {}):
                wide = torch.promote_types(p.dtype, torch.float32)
                self.state[p]["exp_avg_sq"] = state_dict["state"][i]["exp_avg_sq"].to(p.device, wide, copy=True)
