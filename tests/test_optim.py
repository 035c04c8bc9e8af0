"""NovoGrad against a plain loop in fp64, the moving average, and the step with both."""

import copy
import functools
import pickle

import pytest
import torch
from conftest import assert_raises
from torch import nn

from jasper_fast.training.optim import EMA, NovoGrad
from jasper_fast.training.step import update

SHAPES = ((5, 3, 11), (7,), (1,), (4, 5, 1), ())


def tensors(dtype=torch.float64):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def by_hand(params, grads, state, *, lr, betas, eps, weight_decay, grad_averaging):
    """Makes one NovoGrad step on lists of fp64 tensors, one tensor at a time, by the definition."""
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
        if step < 2:
            grads[3 - step] = None  # no gradient for parameter 3 in step 0, none for parameter 2 in step 1
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
    before = copy.deepcopy((a, b))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert torch.equal(a, before[0])
    torch.testing.assert_close(b, before[1] - 0.1 / 7**0.5)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.bfloat16]], ids=str)
@pytest.mark.parametrize("betas", [(0.95, 0.0), (0.9, 0.9)])
def test_state_dict_continues_bit_for_bit(betas, dtypes, tmp_path):
    start = [p for dtype in dtypes for p in tensors(dtype)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(6)]

    def run(params, optimizer, steps):
        for step in steps:
            for p, g in zip(params, grads[step], strict=True):
                p.grad = g
            optimizer.step()

    whole, first = copy.deepcopy(start), copy.deepcopy(start)
    run(whole, NovoGrad(whole, lr=0.1, betas=betas, weight_decay=0.01), range(6))
    optimizer = NovoGrad(first, lr=0.1, betas=betas, weight_decay=0.01)
    run(first, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    second = copy.deepcopy(first)
    optimizer = NovoGrad(second, lr=123.0)
    optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    run(second, optimizer, range(3, 6))
    assert all(map(torch.equal, whole, second))
    for p in second:
        assert optimizer.state[p]["exp_avg"].dtype == p.dtype
        assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("betas", [(0.95, 0.0), (0.9, 0.9)])
def test_a_grad_scaler_skips_overflows_and_changes_no_other_step(betas, lr):
    """Shows that steps with a GradScaler, with or without a call of `unscale_`, give the results of steps without one.
    A step with an overflow, even the first, halves the scale and changes nothing else."""
    start, results = tensors(torch.float32), []
    grads = [[torch.randn(s) for s in SHAPES] for _ in range(4)]
    for how in ("plain", "scaled", "unscaled"):
        params = copy.deepcopy(start)
        optimizer = NovoGrad(params, lr=lr, betas=betas, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=how != "plain")
        for step, overflow in enumerate((True, False, True, False)):
            if overflow and how == "plain":  # the runs with a scaler skip this step
                continue
            optimizer.zero_grad()
            before = copy.deepcopy(params)
            loss = sum((p * g).sum() for p, g in zip(params, grads[step], strict=True))
            scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()
            if how == "unscaled":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, params, before)) == overflow
        assert how == "plain" or scaler.get_scale() == 256.0
        results.append([*params, *(optimizer.state[p]["exp_avg_sq"] for p in params)])
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=1e-6, atol=1e-7)


def test_settings_out_of_range_are_named():
    assert_raises((
        (lambda: NovoGrad(tensors(), lr=-1.0), "lr"),
        (lambda: NovoGrad(tensors(), betas=(1.0, 0.0)), "betas"),
        (lambda: NovoGrad(tensors(), eps=-1.0), "eps"),
        (lambda: EMA(Net(), 1.0), "decay"),
    ))  # fmt: skip


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        NovoGrad(table.parameters()).step()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)
        self.twin = self.conv  # tied weights, which the state dict has under two names

    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize("warmup", [False, True])
@torch.no_grad()
def test_ema_averages_weights_and_statistics(warmup):
    model = Net()
    ema = EMA(model, decay=0.9, warmup=warmup)
    expected = {k: v.double().clone() for k, v in model.state_dict().items()}
    for t in range(1, 5):
        model(torch.randn(4, 2, 5))
        for p in model.parameters():
            p += torch.randn_like(p)
        ema.update(model)
        decay = min(0.9, (1 + t) / (10 + t)) if warmup else 0.9
        for k, v in model.state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v.double() if v.is_floating_point() else v
    torch.testing.assert_close(ema.state_dict(), expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert ema.average["bn.num_batches_tracked"] == 4


@torch.no_grad()
def test_ema_context_gives_the_weights_back():
    model = Net()
    ema = EMA(model, decay=0.5)
    model.conv.weight += 1
    live, average = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.average)
    version = model.conv.weight._version
    with pytest.raises(KeyboardInterrupt), ema.applied_to(model):
        assert all(torch.equal(v, average[k]) for k, v in model.state_dict().items())
        assert model.conv.weight._version > version, "packed weights would not be renewed"
        raise KeyboardInterrupt
    assert all(torch.equal(v, live[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in ema.average.items())


def test_ema_state_round_trip_and_errors():
    ema, again = EMA(Net(), 0.9), EMA(Net(), 0.9)
    again.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()}, updates=7)
    assert again.updates == 7
    assert all(torch.equal(v, ema.average[k]) for k, v in again.average.items())
    with pytest.raises(KeyError, match=r"bn\.weight"):
        again.load_state_dict({k: v for k, v in ema.state_dict().items() if k != "bn.weight"})


# ---- the average in the optimiser's step, and the guarded step ----


class Frozen(Net):
    """A Net with a parameter that does not learn, one that never has a gradient, and one without elements."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 1, bias=False)  # the gradient of a bias before a norm would be only rounding errors
        self.still = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused, self.nothing = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.empty(0, 4))

    def forward(self, x):
        return super().forward(x) * 2 + self.nothing.sum()


def learn(backend, together, warmup=True):
    """Runs five guarded steps, the third with NaN. The optimiser's step updates the average if `together`, otherwise
    `ema.update` does. Returns the model, the average, the optimiser and the results of the steps."""
    torch.manual_seed(3)
    model = Frozen()
    ema = EMA(model, decay=0.9, warmup=warmup)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = NovoGrad(learning, 0.1, (0.9, 0.5), weight_decay=0.1, ema=ema if together else None, backend=backend)
    outcomes = []
    for factor in (1.0, 1.0, torch.nan, 1.0, 1.0):
        optimizer.zero_grad()
        with torch.no_grad():
            model.still += 1  # the optimiser does not change this parameter, but its average must follow it
        (model(torch.randn(4, 2, 5)) * torch.randn(4, 3, 5)).sum().mul(factor).backward()
        outcomes.append(optimizer.guarded_step())
        if not together:
            ema.update(model)
    return model, ema, optimizer, torch.stack(outcomes)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_in_the_step_is_the_one_after_it(backend, warmup):
    model, ema, optimizer, outcomes = learn(backend, True, warmup)
    twin, after, _, expected = learn("reference", False, warmup)
    torch.testing.assert_close(outcomes, expected, equal_nan=True)
    assert outcomes[:, 1].tolist() == [0, 0, 1, 0, 0] and ema.updates == after.updates == 5
    torch.testing.assert_close(ema.state_dict(), after.state_dict())
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert model.unused not in optimizer.state
    assert ema.average["bn.num_batches_tracked"] == 5


def test_what_a_step_writes_is_seen_by_autograd(backend):
    """Shows that a step increases version counters, by which packed weights are known to be out of date."""
    model, ema, optimizer, _ = learn(backend, True)
    held = [model.conv.weight, ema.average["conv.weight"], ema.average["bn.running_mean"]]
    before = [t._version for t in held]
    optimizer.guarded_step()
    assert all(t._version > v for t, v in zip(held, before, strict=True))


def test_a_guarded_step_unscales_and_bounds(backend):
    start, grads, results = torch.randn(3, 400), torch.randn(3, 400), []
    for scale, clip in ((None, 0.0), (1024.0, 0.0), (None, 1.0), (1024.0, 1.0)):
        p = nn.Parameter(start.clone())
        p.grad = grads * (scale or 1.0)
        optimizer = NovoGrad([p], lr=0.1, eps=0.5, backend=backend)  # a large eps, so that clipping changes the step
        norm, skipped = optimizer.guarded_step(scale and torch.tensor([scale]), clip)
        torch.testing.assert_close(norm, grads.norm())
        assert skipped == 0
        results.append(p.detach())
    torch.testing.assert_close(results[1::2], results[::2])  # with and without a scale
    bounded = grads / (grads.norm() + 1e-6)
    torch.testing.assert_close(results[2], start - 0.1 * bounded / (bounded.norm() + 0.5))
    assert not torch.allclose(results[2], results[0])


def test_an_average_of_another_model_is_refused():
    model = Net()
    optimizer = NovoGrad(model.parameters(), ema=EMA(Net()))
    model(torch.randn(2, 2, 3)).sum().backward()
    with pytest.raises(ValueError, match="lacks some of the optimised parameters"):
        optimizer.step()


def test_a_state_of_the_foreach_form_goes_on(backend):
    """Loads the state of an earlier version, whose second moments are separate tensors. Moment and gradient have
    another memory order than the parameter."""
    start = torch.randn(4, 6, 3)
    moment, grad = (torch.randn(3, 6, 4).permute(2, 1, 0) for _ in range(2))
    state = {0: {"exp_avg": moment, "exp_avg_sq": torch.tensor(2.5)}}
    group = {"lr": 0.1, "betas": (0.9, 0.5), "eps": 1e-8, "weight_decay": 0.1, "grad_averaging": False, "params": [0]}
    p = nn.Parameter(start.clone())
    p.grad = grad
    optimizer = NovoGrad([p], backend=backend)
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    optimizer.step()
    expected, held = start.double(), {0: (moment.double(), torch.tensor(2.5, dtype=torch.float64))}
    by_hand([expected], [grad.double()], held, **{key: value for key, value in group.items() if key != "params"})
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)
    saved = optimizer.state_dict()
    assert saved["state"].keys() == {0} and saved["state"][0].keys() == {"exp_avg", "exp_avg_sq"}
    assert saved["param_groups"] == [group]


def test_an_optimizer_can_be_copied_and_pickled():
    _, _, optimizer, _ = learn("auto", True)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.step()
        assert twin.ema is None


# ---- `update`, which train_step calls ----


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("kind", [NovoGrad, functools.partial(torch.optim.AdamW, fused=True), torch.optim.SGD])
def test_an_update_skips_bad_steps_and_scales_alike(kind, fp16):
    """Shows that all kinds of optimisers skip the same steps and have the same loss scales: NovoGrad, a fused one
    (which reads found_inf on the device), and one for which the host decides."""
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=fp16)
    scales = []
    for bad in (False, True, False, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3)).square().sum() * (torch.inf if bad else 1.0)).backward()
        want = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) / scaler.get_scale()
        before = [p.detach().clone() for p in model.parameters()]
        norm = update(model, optimizer, scaler)
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert moved == [not bad] * 2 and bad == (not norm.isfinite())
        assert bad or torch.allclose(norm, want)
        scales.append(scaler.get_scale())
    assert scales == ([256.0, 128.0, 128.0, 256.0] if fp16 else [1.0] * 4)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("kind", [functools.partial(torch.optim.AdamW, fused=True), torch.optim.SGD])
def test_an_update_is_skipped_if_the_norm_of_finite_gradients_overflows(kind, fp16):
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=fp16)
    scaler.scale(1e30 * model(torch.ones(4, 3)).sum()).backward()
    assert update(model, kind(model.parameters(), lr=0.1), scaler, clip_norm=1.0) == torch.inf
    assert torch.equal(model.weight, before) and scaler.get_scale() == (4.0 if fp16 else 1.0)
