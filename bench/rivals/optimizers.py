"""NovoGrad as one would write it in PyTorch, with foreach operations. The host decides whether to skip a step."""

import torch


class ForeachNovoGrad(torch.optim.Optimizer):
    """Makes the same update as `jasper_fast.NovoGrad` with beta2 = 0, which normalises each gradient by its own
    norm.

    This optimiser does not support `found_inf`. So GradScaler and `jasper_fast.training.step.update` wait for the
    device before they decide whether to call it.
    """

    def __init__(self, params, lr=1e-3, beta1=0.95, eps=1e-8, weight_decay=0.0) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters that have gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            exp_avgs = [self.state[p]["exp_avg"] for p in params]
            factors = torch.stack(torch._foreach_norm(grads)).add_(group["eps"]).reciprocal_()
            torch._foreach_mul_(exp_avgs, group["beta1"])
            torch._foreach_addcmul_(exp_avgs, grads, list(factors.unbind()))
            torch._foreach_add_(exp_avgs, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, exp_avgs, alpha=-group["lr"])
