"""Training steps: in every precision, gradients that are a few per cent wrong are found, and right gradients pass. The
bytes that a step keeps and allocates are counted."""

import functools

import pytest
import torch
from bench_runs import CPU, CUDA, DTYPES, make_run
from standins import spied

from jasper_fast.bench.cases import full_step, models, train
from jasper_fast.bench.commands import memory, train as train_command
from jasper_fast.bench.harness import allocations, correct, limits
from jasper_fast.bench.rivals import choice
from jasper_fast.bench.rivals.eager_layouts import ChannelsLast2d
from jasper_fast.kernels.layout import mask

N, T = 4, 96
LAYER = "encoder.layers.2.conv.4.weight"


@functools.cache
def setting():
    config = models.config("small")
    batch = train.Batch(config, N, T, CPU)
    batch.refill(train.CLEAR_SEED)
    return config, models.weights(config, CPU), batch


@functools.cache
def found(contender: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns one contender's log-probabilities and gradients, which bench compares."""
    config, state, batch = setting()
    if contender == "jasper_fast":
        module = models.fused(config, state, "auto")
    else:
        module = models.eager(config, state, torch.float64 if dtype is torch.float64 else torch.float32)
    if contender == "eager_2d_channels_last":
        module = ChannelsLast2d(module)
    return train.answer(module, module, batch, state, dtype)


def complaints(got: dict[str, torch.Tensor], dtype: torch.dtype) -> list[str]:
    return correct.complaints(got, found("eager", dtype), found("eager", torch.float64), train.tolerance(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contender", ["jasper_fast", "eager_2d_channels_last"])
def test_right_gradients_are_told_right(contender, dtype):
    assert complaints(found(contender, DTYPES[dtype]), DTYPES[dtype]) == []


def test_clear_weights_keep_every_relu_away_from_zero():
    """The inputs of each ReLU must have both signs, so that a missing ReLU is found."""
    config, state, batch = setting()
    model = models.eager(config, models.clear(config, state)).train()
    nearest, signs = [], []

    def watch(module, inputs):
        (x,) = inputs
        nearest.append((x.abs().amin() / x.std(2).mean()).item())
        signs.append((x > 0).float().mean().item())

    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_pre_hook(watch)
    with models.dropout_off(model):
        model(batch.features, batch.lengths)
    assert len(nearest) == 11 and min(nearest) > 0.1, nearest  # at the usual weights the smallest is 1e-5
    assert all(abs(share - (1 - 1 / models.OFF)) < 0.01 for share in signs), signs


def scaled(by: float):
    return lambda gradient: gradient * by


def one_element(gradient):
    wrong = gradient.clone()
    wrong[3, 5, 2] += wrong.abs().max() / 4
    return wrong


ALL = tuple(DTYPES)
FAULTS = {  # (change, name of the changed gradient or "" for all, dtypes in which the fault is found)
    "weight gradient x 1.0001": (scaled(1.0001), LAYER, ("fp32",)),
    "weight gradient x 1.01": (scaled(1.01), LAYER, ("fp32", "fp16")),
    "weight gradient x 1.02": (scaled(1.02), LAYER, ALL),
    "weight gradient x 0.97": (scaled(0.97), LAYER, ALL),
    "dgamma x 1.05": (scaled(1.05), "encoder.layers.2.conv.5.weight", ALL),
    "a pane's weight gradient x 0.97": (scaled(0.97), "encoder.layers.3.res.1.0.weight", ALL),
    "every gradient x 1.02": (scaled(1.02), "", ALL),
    "taps shifted": (lambda gradient: gradient.roll(1, 2), LAYER, ALL),
    "dbeta at the wrong elements": (lambda gradient: gradient.roll(1), "encoder.layers.2.conv.5.bias", ALL),
    "one element": (one_element, LAYER, ALL),
    "no weight gradient": (scaled(0.0), LAYER, ALL),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "dtype"), [(fault, dtype) for fault, (*_, dtypes) in FAULTS.items() for dtype in dtypes]
)
def test_a_faulty_gradient_is_refused(fault, dtype):
    change, name, _ = FAULTS[fault]
    right = found("jasper_fast", DTYPES[dtype]).items()
    lines = complaints({n: change(t) if n.startswith(f"clear grad {name}") else t for n, t in right}, DTYPES[dtype])
    assert lines and all(line.startswith("clear grad ") for line in lines), lines
    assert fault == "every gradient x 1.02" or len(lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_skipped_utterance_gets_no_time(dtype, tmp_path, monkeypatch):
    def faulty(config, state, backend):
        model = models.eager(config, state)
        conv = model.encoder.layers[2].conv[4]

        def forward(x, lengths):
            x, weight = mask(x, lengths), conv.weight
            parts = ((x[:-1], weight), (x[-1:], weight.detach()))  # the last utterance gives no weight gradient
            return torch.cat([torch.nn.functional.conv1d(x, w, None, 1, conv.padding) for x, w in parts])

        conv.forward = forward
        return model

    monkeypatch.setattr(models, "fused", faulty)
    run = make_run(tmp_path, rivals="eager", dtype=DTYPES[dtype])
    rows = {r["contender"]: r for r in run.cases("test", [train.case(run, "small", N, T, "forward+backward")])}
    assert rows["jasper_fast"]["status"] == "wrong" and "time_s" not in rows["jasper_fast"]
    assert rows["jasper_fast"]["why"].startswith(f"clear grad {LAYER}: ")
    assert rows["eager"]["status"] == "ok", rows["eager"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "mode", "ours"), [
    ("fp16", "forward+backward", False), ("fp16", "step", False), ("fp16", "step", True), ("bf16", "step", True),
])  # fmt: skip
def test_fp16_scales_the_loss_as_training_does(dtype, mode, ours, monkeypatch):
    """The scaler unscales eager's gradients. NovoGrad unscales inside its step and leaves `grad` scaled."""
    scaler = torch.amp.GradScaler
    steps, updates = (spied(monkeypatch, scaler, name) for name in ("step", "update"))
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=64.0))
    config, state, _ = setting()
    module = models.fused(config, state, "auto") if ours else models.eager(config, state)
    batch = train.Batch(config, 2, 32, CPU)
    bias, before = "decoder.layers.0.bias", module.decoder.layers[0].bias.detach().clone()
    want = train.answer(module, module, batch, state, DTYPES[dtype])[f"grad {bias}"]
    with models.dropout_off(module):
        train.runner(module, module, batch, state, DTYPES[dtype], mode).run()
    got = module.get_parameter(bias)
    stepped = mode == "step" and dtype == "fp16"
    scale = 64.0 if dtype == "fp16" and (ours or not stepped) else 1.0
    torch.testing.assert_close(got.grad, scale * want, atol=0.05 * scale * want.abs().max().item(), rtol=0)
    assert (len(steps), len(updates)) == (stepped and not ours, stepped)
    assert got.isfinite().all() and torch.equal(got, before) == (mode != "step")


@pytest.mark.slow
def test_answers_in_fp16_are_scaled_as_far_as_nothing_overflows(monkeypatch):
    """After an overflow a smaller scale is used. The returned gradients are unscaled."""
    config, state, _ = setting()
    module, batch = models.eager(config, state), train.Batch(config, 2, 32, CPU)
    bias = "grad decoder.layers.0.bias"
    monkeypatch.setattr(train, "SCALES", (2.0**30, 64.0))
    scaled = train.answer(module, module, batch, state, torch.float16)[bias]
    plain = train.answer(module, module, batch, state, torch.float32)[bias]
    torch.testing.assert_close(scaled, plain, atol=0.02 * plain.abs().max().item(), rtol=0)
    monkeypatch.setattr(train, "SCALES", (2.0**30,))
    assert not train.answer(module, module, batch, state, torch.float16)[bias].isfinite().all()


@pytest.mark.slow
def test_eager_without_masks_meets_unpadded_batches_only(tmp_path):
    run = make_run(tmp_path, rivals="eager,eager_no_masks,eager_2d_channels_last")
    rows = train_command.main(run, (("small", 2, 32),))
    seen = {(r["key"]["mode"], r["contender"]): r["status"] for r in rows}
    rivals = {"": "eager_2d_channels_last", train.FULL: "eager_no_masks"}
    expected = {(f"forward+backward{full}", c): "ok" for full in rivals for c in ("jasper_fast", "eager", rivals[full])}
    assert seen == expected, [r.get("why") for r in rows]


@pytest.mark.slow
def test_eager_without_masks_is_wrong_where_utterances_are_padded(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "of_batch", lambda chosen, full: chosen)
    run = make_run(tmp_path, rivals="eager,eager_no_masks")
    rows = {r["contender"]: r for r in run.cases("test", [train.case(run, "small", 2, 32, "forward+backward")])}
    assert rows["eager_no_masks"]["status"] == "wrong" and rows["eager"]["status"] == "ok"


def test_the_full_step_of_our_model_has_an_optimiser_on_the_model_s_backend(monkeypatch):
    seen = spied(monkeypatch, full_step, "NovoGrad", lambda *of, **how: how["backend"])
    config, state, _ = setting()
    batch = train.Batch(config, 2, 32, CPU)
    for backend in ("reference", "auto"):
        module = models.fused(config, state, backend)
        train.runner(module, module, batch, state, torch.float32, "step")
    assert seen == ["reference", "auto"]


def test_no_case_without_padding_unless_someone_meets_it(run):
    assert "eager_no_masks" in choice.DEFAULT["training", "cuda"]
    assert "eager_no_masks" not in train.rivals_of(run)


def test_tf32_is_held_to_its_own_roundings(monkeypatch):
    assert train.precision(CPU, torch.float32) is torch.float32
    monkeypatch.setattr(limits, "float32_mode", lambda device: "TF32")
    assert train.precision(CUDA, torch.float32) is torch.float16
    assert train.precision(CUDA, torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 5e-4), (torch.float16, 6e-5)])
def test_a_loss_that_eager_hits_by_chance_is_no_measure(dtype, off):
    """If eager's loss is exact, an error of 0.06 eps passes and one of 0.3 eps does not."""
    exact = {"loss": torch.tensor(500.0, dtype=torch.float64)}
    low = {"loss": torch.tensor(500.0)}
    for factor, refused in ((1.0, False), (5.0, True)):
        got = {"loss": torch.tensor(500.0 * (1 + factor * off))}
        assert bool(correct.complaints(got, low, exact, train.tolerance(dtype))) == refused


# ------------------------------------------------------------------ memory


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


@torch.library.custom_op("bench_test::with_a_temporary", mutates_args=())
def with_a_temporary(x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(1_000_000).sum()


@pytest.mark.slow
def test_peak_sees_what_lives_and_ends_inside_a_custom_op():
    x = torch.randn(1000)
    assert 4_000_000 < allocations.peak(lambda: with_a_temporary(x), "cpu") < 4_020_000
    births = allocations.kept(lambda: with_a_temporary(x), CPU)[1]
    assert births.peak < 10_000, "a dispatch mode does not see it"


def test_peak_leaves_out_gradients_and_nothing_else():
    w, x = torch.nn.Parameter(torch.randn(1000, 1000)), torch.randn(4, 1000)
    w.sum().backward()  # so that `peak` does not count what PyTorch allocates at its first backward
    w.grad = None
    without = allocations.peak(lambda: (x @ w).sum().backward(), "cpu", [w])
    w.grad = None
    assert without < 100_000 and allocations.peak(lambda: (x @ w).sum().backward(), "cpu") > 4_000_000


def test_most_alive_follows_addresses_that_are_used_again():
    events = [(1, 10), (2, 5), (1, -10), (1, 7), (9, -100), (2, -5), (3, 4)]
    assert allocations.most_alive(events) == 15
    assert allocations.most_alive(events, but={1}) == 15  # the first tensor at address 1 was no gradient, so it counts
    assert allocations.most_alive([(1, 7), (3, 4), (3, -4), (4, 2)], but={1}) == 4


@pytest.mark.slow
def test_memory_rows_of_both_contenders_have_the_allocator_s_peak(tmp_path):
    rows = memory.main(make_run(tmp_path, backend="cpu"), (("small", 2, 32),))
    assert [r["status"] for r in rows] == ["ok", "ok"], [r.get("why") for r in rows]
    for row in rows:
        assert row["memory"]["peak_bytes"] > row["memory"]["kept_bytes"] > 0
