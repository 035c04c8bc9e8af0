"""The gradients of a whole dense-residual block in fp64: conv sub-blocks, panes in both forms, masks and dropout."""

import pytest
import torch
import torch.nn.functional as F

from jasper_fast import ops
from jasper_fast.kernels import philox
from jasper_fast.kernels.layout import mask
from jasper_fast.nn.block import JasperBlock, pane_sum
from jasper_fast.nn.config import BlockConfig
from jasper_fast.nn.eager import EagerBlock

WIDTHS = (3, 4)  # channels of the block outputs that the panes read; the last is the block's input
LENGTHS = torch.tensor([7, 4])


def build(form: str, dropout: float, **more) -> JasperBlock:
    shape = {"filters": 5, "repeat": 3, "kernel_size": (3,), "dilation": (2,), "residual_dense": True, **more}
    b = BlockConfig(dropout=dropout, residual=True, **shape)
    block = JasperBlock(WIDTHS[-1], b, list(WIDTHS), "reference", form).double()
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1:  # gamma about 1, beta about 0
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else torch.nn.init.normal_(parameter)
    return block


def grams(block: JasperBlock, sources) -> list[ops.Gram | None]:
    return [ops.gram(source) if block.reads_gram(pane, source) else None for pane, source in enumerate(sources)]


def run(block: JasperBlock, sources, seeds) -> torch.Tensor:
    """Runs the block with conv masks and returns its output. `sources` are masked first."""
    steps = [LENGTHS]
    for _ in range(block.b.repeat):
        steps.append(block.b.out_length(steps[-1]))
    sources = [mask(s, LENGTHS) for s in sources]
    return block(sources[-1], sources, grams(block, sources), steps, seeds)


def inputs() -> list[torch.Tensor]:
    return [torch.randn(2, c, 7, dtype=torch.float64).requires_grad_() for c in WIDTHS]


def definition(block: EagerBlock, sources, seeds) -> torch.Tensor:
    """Computes the output of `block` op by op in PyTorch, with the dropout masks of `seeds` (None: no dropout)."""
    b, lens = block.cfg, LENGTHS
    keep = [1.0] * b.repeat
    x = sources[-1]
    for i in range(b.repeat):
        y = block.conv[4 * i + 1](block.conv[4 * i](x, lens))
        lens = b.out_length(lens)
        if seeds is not None:
            keep[i] = philox.keep_mask(*y.shape, b.dropout, seeds[i]).double() / (1 - b.dropout)
        if i < b.repeat - 1:
            x = F.relu(y) * keep[i]
    for (conv, bn), source in zip(block.res, sources, strict=True):
        y = y + bn(conv(source, LENGTHS))
    return mask(F.relu(y) * keep[-1], lens)


@pytest.mark.parametrize("more", [{}, {"dilation": (1,), "kernel_size": (5,)}, {"repeat": 1}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("form", ["gram", "plain"])
def test_equals_autograd_on_the_definition(form, dropout, more):
    """Outputs, all gradients and the running statistics equal those of `definition`."""
    ours = build(form, dropout, **more)
    plain = EagerBlock(WIDTHS[-1], ours.b, list(WIDTHS)).double()
    plain.load_state_dict(ours.state_dict())
    seeds = torch.arange(21, 21 + ours.b.repeat) if dropout else None
    leaves = inputs()
    results = []
    for block, call in ((ours, run), (plain, definition)):
        out = call(block, leaves, seeds)
        torch.manual_seed(2)
        wanted = [*leaves, *(p for _, p in sorted(block.named_parameters()))]
        gradients = torch.autograd.grad(out, wanted, torch.randn(out.shape, dtype=out.dtype))
        running = [v for name, v in sorted(block.named_buffers()) if not name.endswith("tracked")]
        results.append([out.detach(), *gradients, *running])
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("form", ["gram", "plain"])
def test_panes_train_by_the_eps_and_momentum_of_their_modules(form):
    block = build(form, 0.0)
    sources = [mask(s.detach(), LENGTHS) for s in inputs()]
    expected, stats = 0.0, []
    for (conv, bn), source in zip(block.panes, sources, strict=True):
        bn.eps, bn.momentum = 0.3, 0.25
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
        y = F.conv1d(source, conv.weight)
        expected = expected + F.batch_norm(y, mean, var, bn.weight, bn.bias, True, bn.momentum, bn.eps)
        stats.append((mean, var))
    out = pane_sum(block.panes, sources, grams(block, sources), LENGTHS, "reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close([(bn.running_mean, bn.running_var) for _, bn in block.panes], stats)
