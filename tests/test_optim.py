"""NovoGrad and the moving average against plain loops in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from jasper_fast.training.ema import EMA
from jasper_fast.training.optim import NovoGrad

SHAPES = ((5, 3, 11), (7,), (1,), (4, 5, 1), ())


def tensors(dtype=torch.float64):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def by_hand(params, grads, state, *, lr, betas, eps, weight_decay, grad_averaging):
    """One NovoGrad step on lists of fp64 tensors, one at a time, as the reference states it."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if g is None:
            continue
        norm = (g * g).sum()
        m, v = state.get(i, (torch.zeros_like(p), None))
        v = norm if v is None else betas[1] * v + (1 - betas[1]) * norm
        u = g / (v.sqrt() + eps) + weight_decay * p
        m = betas[0] * m + ((1 - betas[0]) * u if grad_averaging else u)
        state[i] = (m, v)
        p -= lr * m


@pytest.mark.parametrize("grad_averaging", [False, True])
@pytest.mark.parametrize("betas", [(0.95, 0.0), (0.8, 0.5), (0.95, 0.98)])
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
def test_equals_a_plain_loop(betas, grad_averaging, lr):
    params, state = tensors(), {}
    settings = {"betas": betas, "eps": 1e-8, "weight_decay": 1e-2, "grad_averaging": grad_averaging}
    optimizer = NovoGrad(params, lr=lr.double() if isinstance(lr, torch.Tensor) else lr, **settings)
    expected = [p.detach().clone() for p in params]
    for step in range(5):
        grads = [torch.randn_like(p) for p in params]
        if step == 1:
            grads[2] = None  # missing in one step
        if step == 0:
            grads[3] = None  # missing in the first step
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        by_hand(expected, grads, state, lr=float(lr), **settings)
        for p, g, e in zip(params, grads, expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=1e-7 if isinstance(lr, torch.Tensor) else 1e-12, atol=1e-12)
            assert g is None or torch.equal(p.grad, g), "a gradient was changed"


def test_groups_have_their_own_settings():
    a, b = tensors()[:2]
    optimizer = NovoGrad([{"params": [a], "lr": 0.0}, {"params": [b], "weight_decay": 0.0}], lr=0.1, weight_decay=1.0)
    before = a.detach().clone(), b.detach().clone()
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(a, before[0])
    torch.testing.assert_close(b.detach(), before[1] - 0.1 / 7**0.5)


def test_mixed_dtypes_and_low_precision_state():
    params = [*tensors(torch.float32), *tensors(torch.bfloat16)]
    optimizer = NovoGrad(params, lr=0.1, betas=(0.9, 0.5))
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()
    again = NovoGrad(params, lr=0.1, betas=(0.9, 0.5))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in params:
        assert optimizer.state[p]["exp_avg"].dtype == p.dtype
        assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
        assert torch.equal(again.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
        assert again.state[p]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("betas", [(0.95, 0.0), (0.9, 0.9)])
def test_state_dict_continues_bit_for_bit(betas, tmp_path):
    grads = [[torch.randn(s) for s in SHAPES] for _ in range(6)]
    start = [torch.randn(s) for s in SHAPES]

    def run(params, optimizer, steps):
        for step in steps:
            for p, g in zip(params, grads[step], strict=True):
                p.grad = g
            optimizer.step()

    whole = [nn.Parameter(t.clone()) for t in start]
    run(whole, NovoGrad(whole, lr=0.1, betas=betas, weight_decay=0.01), range(6))
    first = [nn.Parameter(t.clone()) for t in start]
    optimizer = NovoGrad(first, lr=0.1, betas=betas, weight_decay=0.01)
    run(first, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer = NovoGrad(second, lr=123.0)
    optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    run(second, optimizer, range(3, 6))
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("betas", [(0.95, 0.0), (0.9, 0.9)])
def test_found_inf_leaves_everything_untouched(betas, lr):
    """A skipped step changes nothing, even if it is the first; the next one is what it would have been."""
    params, twins = tensors(torch.float32), []
    for p in params:
        twins.append(nn.Parameter(p.detach().clone()))
    ours, plain = (NovoGrad(ps, lr=lr, betas=betas, weight_decay=0.1) for ps in (params, twins))
    for found in (1.0, 0.0, 1.0, 0.0):
        before = [p.detach().clone() for p in params]
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.full_like(p, float("nan")) if found else torch.randn_like(p)
            q.grad = p.grad
        ours.found_inf, ours.grad_scale = torch.tensor(found), None
        ours.step()
        if found:
            assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        else:
            plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"])


def test_works_with_grad_scaler():
    """Scaled gradients, unscaled by the scaler or not, give the plain update; an overflow halves the scale."""
    start = torch.randn(3, 4)
    results = []
    for how in ("plain", "scaled", "unscaled"):
        p = nn.Parameter(start.clone())
        optimizer = NovoGrad([p], lr=0.1, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=how != "plain")
        for step in range(3):
            optimizer.zero_grad()
            factor = float("inf") if step == 1 and how != "plain" else 1.0
            if step == 1 and how == "plain":
                continue
            scaler.scale((p * torch.arange(12.0).view(3, 4)).sum() * factor).backward()
            if how == "unscaled":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append(p.detach())
        assert how == "plain" or scaler.get_scale() == 512.0
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize(
    ("settings", "word"), [({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.0)}, "betas"), ({"eps": -1.0}, "eps")]
)
def test_settings_out_of_range_are_named(settings, word):
    with pytest.raises(ValueError, match=word):
        NovoGrad(tensors(), **settings)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        NovoGrad(table.parameters()).step()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_averages_weights_and_statistics(warmup):
    model = Net()
    ema = EMA(model, decay=0.9, warmup=warmup)
    expected = {k: v.double().clone() for k, v in model.state_dict().items()}
    for t in range(1, 5):
        model(torch.randn(4, 2, 5))
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        ema.update(model)
        decay = min(0.9, (1 + t) / (10 + t)) if warmup else 0.9
        for k, v in model.state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v.double() if v.is_floating_point() else v
    for k, v in ema.state_dict().items():
        torch.testing.assert_close(v.double(), expected[k].double(), rtol=1e-6, atol=1e-6)
    assert ema.average["bn.num_batches_tracked"] == 4


def test_ema_context_gives_the_weights_back():
    model = Net()
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.conv.weight += 1
    live = {k: v.clone() for k, v in model.state_dict().items()}
    average = {k: v.clone() for k, v in ema.average.items()}
    version = model.conv.weight._version
    with pytest.raises(KeyboardInterrupt), ema.applied_to(model):
        assert all(torch.equal(v, average[k]) for k, v in model.state_dict().items())
        assert model.conv.weight._version > version, "packed weights would not notice"
        raise KeyboardInterrupt
    assert all(torch.equal(v, live[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in ema.average.items())


def test_ema_state_round_trip_and_errors():
    model = Net()
    ema, again = EMA(model, 0.9), EMA(Net(), 0.9)
    again.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()}, updates=7)
    assert again.updates == 7
    assert all(torch.equal(v, ema.average[k]) for k, v in again.average.items())
    with pytest.raises(KeyError, match=r"bn\.weight"):
        again.load_state_dict({k: v for k, v in ema.state_dict().items() if k != "bn.weight"})
    with pytest.raises(ValueError, match="decay"):
        EMA(model, 1.0)
