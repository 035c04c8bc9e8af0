"""Our counts of FLOPs, bytes and parameters agree with PyTorch's models, for Jasper 10x5 and QuartzNet 15x5."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jasper_fast.bench.cases import counts, models
from jasper_fast.nn.eager import EagerJasper


def network(name: str):
    config = models.config(name)
    with torch.device("meta"):
        return config, EagerJasper(config).eval()


@pytest.fixture(scope="module")
def jasper10x5():
    return network("jasper10x5")


def test_every_conv_of_jasper_10x5_is_counted_as_pytorch_counts_it(jasper10x5):
    config, model = jasper10x5
    N, T, seen = 3, 416, {}

    def record(name, module, inputs, output):
        weights = sum(p.numel() for p in module.parameters())
        seen[name] = (weights, 4 * (inputs[0].numel() + weights + output.numel()), output.shape[2])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_hook(functools.partial(record, name))
    flops = FlopCounterMode(display=False, depth=8)
    with flops, torch.device("meta"):
        model(torch.empty(N, 64, T), torch.empty(N, dtype=torch.int64))
    by_module = {k.removeprefix("EagerJasper."): v for k, v in flops.get_flop_counts().items()}
    ours = {conv.name: conv for conv in counts.convs(config, N, T)}
    assert list(ours) == list(seen) and len(ours) == 109
    for name, conv in ours.items():
        bias = conv.N * conv.T_out * conv.C_out if conv.bias else 0  # PyTorch's counter leaves the bias out
        assert sum(by_module[name].values()) == conv.flops - bias, name
        assert (conv.weights, conv.nbytes(4), conv.T_out) == seen[name], name


def test_jasper_10x5_totals(jasper10x5):
    config, model = jasper10x5
    assert counts.parameters(config) == sum(p.numel() for p in model.parameters()) == 332_632_349
    assert counts.forward_flops(config, 1, 1680) / 840 == pytest.approx(0.665e9, rel=1e-3)
    assert counts.forward_flops(config, 1, 208) == pytest.approx(69e9, rel=0.01)


def test_quartznets_counts_are_its_models():
    """Unlike Jasper, QuartzNet has convs with groups."""
    config, model = network("quartznet15x5")
    assert counts.parameters(config) == sum(p.numel() for p in model.parameters()) == 18_924_381
    found = {f"{conv.name}.weight" for conv in counts.convs(config, 1, 64)}
    assert found == {name for name, p in model.named_parameters() if p.dim() == 3}
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(2, 64, 208, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
    assert abs(counts.forward_flops(config, 2, 208) / counter.get_total_flops() - 1) < 1e-3
