"""Counts of the bytes that a forward pass keeps for backward."""

import torch
from bench_runs import CPU

from jasper_fast.bench.harness import allocations


class Keeper(torch.autograd.Function):
    """Saves one tensor for backward, stores one as an attribute and frees one."""

    stash: list = []

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 2)
        Keeper.stash.append(torch.zeros(100))
        return (x + torch.ones_like(x)).sum()


def test_kept_bytes_are_counted_however_held():
    x = torch.randn(1000, requires_grad=True)
    nbytes, births, _ = allocations.kept(lambda: Keeper.apply(x), CPU)
    assert nbytes == 4 * (1000 + 100 + 1)  # the saved tensor, the attribute and the loss
    assert births.peak >= 4 * 3000
    Keeper.stash.clear()


def test_kept_bytes_of_a_plain_graph():
    layer, x = torch.nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    nbytes, _, _ = allocations.kept(lambda: layer(x).relu().exp().sum(), CPU)
    assert nbytes == 4 * (2 * 4 * 16 + 1)  # the outputs of relu and exp, and the loss; x and the weight existed before
