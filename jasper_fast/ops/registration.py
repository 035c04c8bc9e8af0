"""The `jasper_fast` namespace of torch.library, in which every op of this package is defined."""

import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

lib = torch.library.Library("jasper_fast", "DEF")


def op(schema: str):
    """Defines an op with this schema, which the decorated function computes on every device.

    The function runs without autocast, because it chooses the dtypes itself.
    """

    def register(impl):
        @functools.wraps(impl)
        def run(x, *args):
            device = (x[0] if isinstance(x, (list, tuple)) else x).device.type
            if not torch.is_autocast_enabled(device):
                return impl(x, *args)
            with torch.autocast(device, enabled=False):
                return impl(x, *args)

        lib.define(schema)
        lib.impl(schema.partition("(")[0], run, "CompositeExplicitAutograd")
        return impl

    return register


def register_autograd(name: str, setup_context):
    """Registers the decorated function as the gradient of an op. Differentiating that gradient again raises an error.

    The ops of the backward pass have no gradient of their own. PyTorch would treat their results as constants, and a
    gradient penalty or a Hessian would be wrong without an error.

    The function gets None, not zeros, as the gradient of an output that has none, unless `setup_context` asks for
    zeros. If no output has a gradient, the function is not called.
    """
    said = f"jasper_fast::{name} has no second derivative: use jasper_fast.nn.eager.EagerJasper for that".encode()

    def refusing(x: Tensor) -> Tensor:
        return torch._C._functions.DelayedError(said, 1)(x.detach().requires_grad_())

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def register(grad):
        @functools.wraps(grad)
        def once(ctx, *grads):
            if all(g is None for g in grads):
                return tree_map(lambda _: None, ctx.needs_input_grad)
            if not torch.is_grad_enabled():  # that is, create_graph is false
                return grad(ctx, *grads)
            with torch.no_grad():
                found = grad(ctx, *grads)
            return tree_map_only(Tensor, refusing, found)

        torch.library.register_autograd(f"jasper_fast::{name}", once, setup_context=setup, lib=lib)
        return grad

    return register
