"""The `jasper_fast` namespace of torch.library, in which every op of this package is defined."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

lib = torch.library.Library("jasper_fast", "DEF")


def without_autocast(impl):
    """Wraps `impl` so that it runs without autocast, because an op chooses the dtypes inside it."""

    @functools.wraps(impl)
    def run(x, *args):
        device = (x[0] if isinstance(x, (list, tuple)) else x).device.type
        if not torch.is_autocast_enabled(device):
            return impl(x, *args)
        with torch.autocast(device, enabled=False):
            return impl(x, *args)

    return run


def register_autograd(op: str, grad, setup_context) -> None:
    """Registers `grad` as the gradient of `op`. Differentiating that gradient again raises an error.

    The ops of the backward pass have no gradient of their own. PyTorch would treat their results as constants, and a
    gradient penalty or a Hessian would be wrong without an error.
    """
    said = f"jasper_fast::{op} has no second derivative: use jasper_fast.nn.eager.EagerJasper for that".encode()

    def refusing(x: Tensor) -> Tensor:
        return torch._C._functions.DelayedError(said, 1)(x.detach().requires_grad_())

    @functools.wraps(grad)
    def once(ctx, *grads):
        if not torch.is_grad_enabled():  # that is, create_graph is false
            return grad(ctx, *grads)
        with torch.no_grad():
            found = grad(ctx, *grads)
        return tree_map_only(Tensor, refusing, found)

    torch.library.register_autograd(f"jasper_fast::{op}", once, setup_context=setup_context, lib=lib)
