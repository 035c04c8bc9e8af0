"""The case of `python -m bench optimizer`: train.py's optimiser step, compared with a copy of the same number of
bytes."""

import functools
import itertools
import math

import torch
from torch import Tensor

from jasper_fast import Jasper, NovoGrad
from jasper_fast.bench.cases import counts, models
from jasper_fast.bench.cases.full_step import DECAY, LR, WEIGHT_DECAY
from jasper_fast.bench.harness.case import Case, Contender, Rule, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.bench.rivals.optimizers import ForeachNovoGrad
from jasper_fast.kernels.novograd import reference
from jasper_fast.kernels.novograd.operands import Settings, Tensors, Watched
from jasper_fast.training.optim import EMA
from jasper_fast.training.step import update

# Bytes per parameter in fp32: the gradient is read twice; moment, parameter and average are read and written once.
BYTES = 32
ALIGNED = 64  # each tensor begins at a multiple of this many elements in the buffer
DRAWN = 1 << 20  # random numbers that are drawn and repeated, because drawing a billion would take too long
COMPARED = 24  # number of parameter tensors that are compared: the smallest ones, and one of middle size
BETA1, EPS = 0.95, 1e-8


class Inputs:
    """The gradients, parameters, moments and averages of a network. Each of the four kinds is a quarter of one buffer.

    `model` and `ema` use these tensors.
    """

    def __init__(self, cfg, device: torch.device) -> None:
        with torch.device("meta"):
            self.model = Jasper(cfg)
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        sizes = [math.ceil(shape.numel() / ALIGNED) * ALIGNED for shape in shapes.values()]
        self.flat = torch.empty(4, sum(sizes), device=device)
        starts = dict(zip(shapes, itertools.accumulate([0, *sizes]), strict=False))
        views = [{n: of[starts[n] :][: s.numel()].view(s) for n, s in shapes.items()} for of in self.flat]
        buffers = {name: torch.zeros_like(b, device=device) for name, b in self.model.named_buffers()}
        self.grads, params, self.moments, averages = views
        self.model.load_state_dict(params | buffers, assign=True)
        self.params = dict(self.model.requires_grad_().named_parameters())
        for name, p in self.params.items():
            p.grad = self.grads[name]
        self.ema = EMA.__new__(EMA)  # without its __init__, which would copy the model
        self.ema.decay, self.ema.warmup, self.ema.updates, self.ema.model = DECAY, False, 0, self.model
        self.ema.average = averages | {name: b.clone() for name, b in buffers.items()}
        small = sorted(shapes, key=lambda name: shapes[name].numel())
        self.compared = [*small[: COMPARED - 1], small[len(small) // 2]]
        self.refill(0)

    @torch.no_grad()
    def refill(self, seed: int) -> None:
        """Writes new random numbers into the whole buffer."""
        g = seeded(stable_seed("optimizer", seed), self.flat.device)
        drawn = torch.randn(DRAWN, generator=g, device=self.flat.device)
        for part in self.flat.view(-1).split(DRAWN):
            part.copy_(drawn[: len(part)])

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """Returns copies of the tensors of the compared parameters."""
        of = (self.grads, self.params, self.moments, self.ema.average)
        grads, params, moments, averages = ([d[n].detach().to(dtype, copy=True) for n in self.compared] for d in of)
        squares = [torch.zeros((), dtype=dtype, device=self.flat.device) for _ in self.compared]
        return Tensors(grads, params, moments, squares, averages, [0] * len(grads))


def answer(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the answer of our `reference` implementation to the current inputs."""
    tensors = inputs.tensors(dtype)
    settings = torch.tensor(
        [Settings(LR, BETA1, 1.0, 0.0, 1.0, EPS, WEIGHT_DECAY, 1 - DECAY)],
        dtype=torch.float64,
        device=inputs.flat.device,
    )
    reference.step(tensors, Watched([], []), settings, None, None, 0.0, True, {})
    return named(inputs, tensors.params, tensors.exp_avgs, tensors.averages)


def named(inputs: Inputs, *lists: list[Tensor]) -> dict[str, Tensor]:
    """Returns parameters, moments and averages by name."""
    kinds = zip(("parameter", "moment", "average"), lists, strict=True)
    return {f"{kind} {n}": x for kind, of in kinds for n, x in zip(inputs.compared, of, strict=True)}


def stepping(inputs: Inputs, backend: str | None) -> Runner:
    """Returns the runner of our optimiser with this backend. If `backend` is None, it is the runner of the foreach
    optimiser followed by `EMA.update`."""
    model, params = inputs.model, list(inputs.params.values())
    if backend is not None:
        optimizer = NovoGrad(params, LR, (BETA1, 0.0), EPS, WEIGHT_DECAY, ema=inputs.ema, backend=backend)
        for p in params:
            optimizer.state[p]["exp_avg_sq"] = torch.zeros((), device=p.device)
    else:
        optimizer = ForeachNovoGrad(params, LR, BETA1, EPS, WEIGHT_DECAY)
    for name, p in inputs.params.items():
        optimizer.state[p]["exp_avg"] = inputs.moments[name]
    scaler = torch.amp.GradScaler(inputs.flat.device.type, enabled=False)

    def run() -> None:
        update(model, optimizer, scaler)
        if backend is None:
            inputs.ema.update(model)

    @torch.no_grad()
    def outputs() -> dict[str, Tensor]:
        """Makes the same step, and then restores the compared tensors."""
        before = inputs.tensors(torch.float32)
        run()
        after = inputs.tensors(torch.float32)
        for i, name in enumerate(inputs.compared):
            for held, old in ((inputs.params, before.params), (inputs.moments, before.exp_avgs)):
                held[name].copy_(old[i])
            inputs.ema.average[name].copy_(before.averages[i])
        return named(inputs, after.params, after.exp_avgs, after.averages)

    return Runner(run, outputs)


def copying(inputs: Inputs) -> Runner:
    """Returns the runner that copies half of the buffer over the other half, twice. Per parameter this reads 16 bytes
    and writes 16."""

    @torch.no_grad()
    def run() -> None:
        for _ in range(2):
            inputs.flat[2:].copy_(inputs.flat[:2])

    rule = Rule("none", "a copy of the same number of bytes; nothing is compared", lambda *_: [])
    return Runner(run, dict, rule=rule)


def case(run: Run, model: str) -> Case:
    """Returns the case of one network's parameters."""
    cfg = models.config(model)
    inputs = functools.cache(lambda: Inputs(cfg, run.device))
    count = counts.parameters(cfg)
    return Case(
        "optimizer",
        {"model": model, "parameters": count, "dtype": "float32", "mode": "step with check and average"},
        [
            Contender("jasper_fast", lambda: stepping(inputs(), run.backend)),
            Contender("foreach", lambda: stepping(inputs(), None)),
            Contender("copy", lambda: copying(inputs())),
        ],
        refill=lambda seed: inputs().refill(seed),
        reference=lambda: answer(inputs(), torch.float64),
        low=lambda: answer(inputs(), torch.float32),
        nbytes=BYTES * count,
        seeds=(1,),
        needs=("novograd",),
    )
