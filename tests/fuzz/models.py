"""Random small Jaspers, compared with their eager twins: a training step, evaluation and the inference engine."""

import itertools
import random

import torch
from engines import valid
from torch import nn

from jasper_fast import InferenceEngine, Jasper, JasperConfig
from jasper_fast.kernels import native
from jasper_fast.nn.eager import EagerJasper


def draw_config(rng: random.Random) -> JasperConfig:
    """Returns a random valid configuration of one to four tiny blocks."""
    blocks, masks = [], rng.random() < 0.7
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["none", "plain", "dense", "dense"])
        k, s, d = rng.choice([1, 2, 3, 4, 5, 8, 11]), rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])
        if kind != "none":  # residual panes keep the number of frames, so the convs beside them must keep it too
            s, k = 1, k | 1
        d = 1 if s > 1 else d
        blocks.append(
            {
                "filters": rng.choice([1, 2, 3, 7, 8, 16, 17, 24]),
                "repeat": rng.randint(1, 3),
                "kernel_size": [k],
                "stride": [s],
                "dilation": [d],
                "dropout": 0.0,
                "residual": kind != "none",
                "residual_dense": kind == "dense",
                "separable": rng.random() < 0.3,
            }
        )
    encoder = {"in_feats": rng.choice([1, 3, 8, 16]), "use_conv_masks": masks, "blocks": blocks}
    decoder = {"in_feats": blocks[-1]["filters"], "n_classes": rng.choice([2, 5, 29])}
    return JasperConfig.from_dict({"encoder": encoder, "decoder": decoder})


def norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def draw_settings(model: nn.Module, rng: random.Random) -> None:
    """Gives every batch norm its own eps, momentum, weight, bias and statistics.

    In some models, some batch norms are marked as `frozen`: `step` does not update their statistics.
    """
    some = rng.random() < 0.3
    for bn in norms(model):
        bn.eps, bn.momentum = rng.choice([1e-5, 1e-3, 0.1]), rng.choice([None, 0.01, 0.1, 0.9, 1.0])
        bn.running_mean.normal_(0, 0.1)
        bn.running_var.uniform_(0.5, 2)
        bn.frozen = some and rng.random() < 0.5
        nn.init.uniform_(bn.weight, -1.5, 1.5)
        nn.init.normal_(bn.bias, 0, 0.3)


def copy_settings(source: nn.Module, target: nn.Module) -> None:
    for bn, own in zip(norms(source), norms(target), strict=True):
        own.eps, own.momentum, own.frozen = bn.eps, bn.momentum, bn.frozen


def frames(config: JasperConfig, t: int) -> int:
    """Returns the smallest number of output frames of any conv if the input has `t` frames."""
    convs = (block for block in config.encoder.blocks for _ in range(block.repeat))
    return min(itertools.accumulate(convs, lambda count, block: block.out_length(count), initial=t))


def step(model: nn.Module, features, lengths, seed: int) -> dict[str, torch.Tensor]:
    """Runs one training step; returns its outputs, gradients and running statistics."""
    model.train()
    for bn in norms(model):
        bn.train(not bn.frozen)
    log_probs, out = model(features, lengths)
    weights = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    valid(log_probs * weights.to(log_probs.dtype), out).sum().backward()
    return {
        "log_probs": valid(log_probs.detach(), out),
        "lengths": out,
        **{f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        **{n: b.clone() for n, b in model.named_buffers()},
    }


@torch.no_grad()
def evaluate(call, features, lengths) -> dict[str, torch.Tensor]:
    log_probs, out = call(features, lengths)
    return {"log_probs": valid(log_probs, out), "lengths": out}


def compare(what: str, got: dict, lows: list[dict], ref: dict, floor: int = 64) -> None:
    """Fails unless `got` is within twice the error of the eager twin in fp32, plus `floor` eps of the values' size.

    `lows` are results of the eager twin in fp32, from the same inputs and from inputs changed by rounding errors. Batch
    norm over few values can magnify rounding without limit, and the spread of these results shows by how much. A value
    whose terms cancel consists only of rounding errors, so its own size is no scale for them. Therefore the size of a
    gradient is at least the largest gradient of the step, and that of a running mean at least the largest standard
    deviation of its channels.
    """
    assert got.keys() == ref.keys(), f"{what}: other entries: {got.keys() ^ ref.keys()}"
    largest = max((float(v.abs().max()) for k, v in ref.items() if k.startswith("grad")), default=0.0)
    for name, want in ref.items():
        mine = got[name]
        assert mine.shape == want.shape, f"{what}, {name}: shape {tuple(mine.shape)}, eager {tuple(want.shape)}"
        if not want.is_floating_point():
            assert torch.equal(mine, want), f"{what}, {name}: {mine.tolist()}, eager {want.tolist()}"
        elif want.numel():
            assert mine.isfinite().all(), f"{what}, {name}: not finite"
            error, *usual = (
                float((x.double() - want.double()).abs().max()) for x in (mine, *(low[name] for low in lows))
            )
            size = max(float(want.abs().max()), largest if name.startswith("grad") else 0.0)
            if name.endswith("running_mean"):
                size = max(size, float(ref[name.replace("mean", "var")].max()) ** 0.5)
            allowed = 2 * max(usual) + floor * torch.finfo(mine.dtype).eps * size
            assert error <= allowed, f"{what}, {name}: error {error:.2e}, eager {max(usual):.2e}, size {size:.2e}"


def low(eager: nn.Module, state: dict, features, moved: bool, lengths, seed: int) -> dict[str, torch.Tensor]:
    """Returns the step of `eager` from `state`. If `moved`, the weights are changed by about four eps first."""
    eager.load_state_dict(state)
    with torch.no_grad():
        for weight in eager.parameters() if moved else ():
            weight.mul_(1 + 4 * 2**-23 * torch.randn(weight.shape))
    eager.zero_grad()
    return step(eager, features, lengths, seed)


def case(seed: int) -> None:
    """Raises AssertionError if the random Jasper of this seed differs from its eager twin."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    config = draw_config(rng)
    n, t = rng.randint(1, 4), rng.choice([1, 2, 5, 16, 17, 33, 50])
    while frames(config, t) < 1:  # eager rejects a batch without output frames
        t += 7
    lengths = torch.tensor([rng.choice([0, 1, t, rng.randint(0, t)]) for _ in range(n)])
    if not config.encoder.use_conv_masks or rng.random() < 0.2:
        lengths[:] = t
    if n * frames(config, t) < 2:
        n, lengths = 2, torch.full((2,), t)  # batch norm needs two values
    lengths[rng.randrange(n)] = t
    backend = rng.choice(["reference", "cpu"] if native.cpu_available() else ["reference"])
    panes = rng.choice(["plain", "gram"])
    features = torch.randn(n, config.encoder.in_feats, t)

    eager = EagerJasper(config)
    draw_settings(eager, rng)
    state = {k: v.clone() for k, v in eager.state_dict().items()}
    double = EagerJasper(config).double()
    ours = Jasper(config, backend=backend, panes=panes)
    for model in (double, ours):
        model.load_state_dict(state)
        copy_settings(eager, model)

    try:
        near = [features, *(features + features * 2**-23 * torch.randn(features.shape) for _ in range(3))]
        for what, call in (("evaluation", ours.eval()), ("engine", InferenceEngine(ours))):
            lows = [evaluate(eager.eval(), x, lengths) for x in near]
            ref = evaluate(double.eval(), features.double(), lengths)
            compare(what, evaluate(call, features, lengths), lows, ref)
        # A variance that is computed from a covariance loses precision where its terms cancel. The error is hundreds of
        # eps if the channels of a source depend on one another, as with seed 799.
        floor = 512 if panes == "gram" else 64
        lows = [low(eager, state, x, i > 0, lengths, seed) for i, x in enumerate(near)]
        ref, mine = step(double, features.double(), lengths, seed), step(ours, features, lengths, seed)
        try:
            compare("training", mine, lows, ref, floor)
        except AssertionError:  # four results may not show how far rounding is magnified, so compare with many
            lows += [low(eager, state, x, True, lengths, seed) for _ in range(8) for x in near]
            compare("training", mine, lows, ref, floor)
    except Exception as error:
        where = f"{backend}, panes {panes}, n {n}, t {t}, lengths {lengths.tolist()}, {config.encoder}"
        raise AssertionError(f"{type(error).__name__}: {error} ({where})") from error
