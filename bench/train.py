"""How fast does a training step run: forward and backward, and the full step with CTC and the optimiser.

`python -m bench train`; utterances per second, fused beside eager.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bench import correct, counts, models, rivals
from bench.harness import Case, Contender, Run, Runner
from bench.kernels import name as dtype_name
from jasper_fast import NovoGrad

# (model, N, T): the first is the one that a goal is set for
CPU_GRID = (("small", 8, 400), ("medium", 4, 400))
GPU_GRID = (("jasper10x5", 32, 1680), ("jasper10x5", 8, 1680), ("jasper10x5", 32, 704), ("jasper10x5", 64, 1680))
MODES = ("forward+backward", "step")
LARGE = 50e6  # parameters from which an fp64 answer is no small matter
TRAINS = ("bn_relu_dropout", "conv1d", "panes")  # what a training step is made of, as the self-check names it
# The forward's results are held to roundings. A gradient of a whole network is not: one ReLU that falls to the other
# side moves it by a per cent, in eager PyTorch as in any kernel (bench.kernels holds each op's gradients to roundings).
GRADIENTS = correct.Tolerance(factor=4.0, floor=0.03 / torch.finfo(torch.float32).eps, relative=0.03, peak=10.0)
TOLERANCE = correct.Tolerance(factor=4.0, floor=256.0, relative=1e-4, gradients=GRADIENTS)


class Batch:
    """Features, lengths and transcripts, refilled in place."""

    def __init__(self, cfg, N: int, T: int, device: torch.device) -> None:
        self.cfg, self.N, self.T, self.device = cfg, N, T, device
        self.features, self.lengths = models.features(cfg, N, T, device, 0, ragged=True)
        self.targets, self.target_lengths = models.targets(N, T // 2, device, 0)

    def refill(self, seed: int) -> None:
        """New values everywhere."""
        for mine, new in zip(
            (self.features, self.lengths),
            models.features(self.cfg, self.N, self.T, self.device, seed, ragged=True),
            strict=True,
        ):
            mine.copy_(new)
        self.targets.copy_(models.targets(self.N, self.T // 2, self.device, seed)[0])

    def loss(self, model: rivals.Model, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, log-probabilities, their lengths), under autocast for a low precision."""
        with autocast(self.device, dtype):
            log_probs, lengths = model(self.features.to(_parameter_dtype(model)), self.lengths)
        return models.ctc(log_probs, lengths, self.targets, self.target_lengths), log_probs, lengths


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision for fp16 and bf16, nothing otherwise."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def runner(
    module: nn.Module, call: rivals.Model, batch: Batch, state: Mapping[str, Tensor], dtype: torch.dtype, mode: str
) -> Runner:
    """`call` runs `module`'s parameters (renamed, perhaps). Timed as it trains, dropout on."""
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = NovoGrad(parameters, lr=1e-4, weight_decay=1e-3) if mode == "step" else None

    def run() -> None:
        for p in parameters:
            p.grad = None
        batch.loss(call, dtype)[0].backward()
        if optimizer is not None:
            optimizer.step()

    return Runner(run, lambda: answer(module, call, batch, state, dtype))


def answer(
    module: nn.Module, call: rivals.Model, batch: Batch, state: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Loss, log-probabilities, every gradient and every running statistic of one step from `state`, dropout off."""
    restore(module, state)
    module.train()
    module.zero_grad(set_to_none=True)
    with models.dropout_off(module):
        loss, log_probs, lengths = batch.loss(call, dtype)
        loss.backward()
    found = {"loss": loss.detach(), "log_probs": models.valid(log_probs.detach(), lengths)}
    for name, p in module.named_parameters():
        if p.grad is not None:
            found[f"grad {original(name)}"] = p.grad.reshape(state[original(name)].shape)
    found |= {name: b for name, b in ((original(n), b) for n, b in module.named_buffers()) if "running" in name}
    module.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`state` into a module whose names or shapes a rival may have wrapped."""
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        t.copy_(state[original(name)].reshape(t.shape))


def original(name: str) -> str:
    """The state-dict name behind a wrapped one."""
    if name.startswith("weights."):  # ChannelsLast2d keeps its 2D weights under escaped names
        return name.removeprefix("weights.").replace("/", ".") + ".weight"
    return name.removeprefix("_orig_mod.").removeprefix("model.")


def judged_size(device: torch.device, cfg, N: int, T: int) -> tuple[int, int]:
    """(N, T) of the batch on which a step's answers are compared with fp64: the timed one, unless that is a large
    network's on a GPU, whose fp64 step would take tens of seconds and tens of GiB. Each of its ops is compared at full
    size by `python -m bench kernels`."""
    large = device.type == "cuda" and counts.parameters(cfg) >= LARGE
    return (min(N, 2), T) if large else (N, T)


def case(run: Run, model: str, N: int, T: int, mode: str) -> Case:
    """One model, batch and mode."""
    cfg = models.config(model)
    state = functools.cache(lambda: models.weights(cfg, run.device))
    batch = functools.cache(lambda: Batch(cfg, N, T, run.device))
    judged_at = judged_size(run.device, cfg, N, T)
    judged = batch if judged_at == (N, T) else functools.cache(lambda: Batch(cfg, *judged_at, run.device))
    exact = torch.float64 if counts.parameters(cfg) < LARGE or run.device.type == "cuda" else torch.float32

    def runner_of(module: nn.Module, call: rivals.Model) -> Runner:
        timed = runner(module, call, batch(), state(), run.dtype, mode)
        return dataclasses.replace(timed, outputs=lambda: answer(module, call, judged(), state(), run.dtype))

    def ours() -> Runner:
        fused = models.fused(cfg, state(), run.backend)
        return runner_of(fused, fused)

    def rival(build: Callable[[nn.Module], rivals.Model]) -> Callable[[], Runner]:
        def make() -> Runner:
            plain = models.eager(cfg, state())
            call = build(plain)
            module = call if isinstance(call, rivals.ChannelsLast2d) else plain
            if module is not plain:  # the 1D weights it replaced take no part
                for conv in (m for m in plain.modules() if isinstance(m, nn.Conv1d)):
                    conv.weight.requires_grad_(False)
            return runner_of(module, call)

        return make

    def plain(dtype: torch.dtype, autocast_dtype: torch.dtype) -> dict[str, Tensor]:
        module = models.eager(cfg, state(), dtype)
        return answer(module, module, judged(), state(), autocast_dtype)

    def refill(seed: int) -> None:
        for held in {id(b): b for b in (batch(), judged())}.values():
            held.refill(seed)

    chosen = rivals.choose("training", run.device, "default" if run.rivals == "compile" else run.rivals)
    return Case(
        "train",
        {"model": model, "batch": f"({N}, {cfg.encoder.in_feats}, {T})", "dtype": dtype_name(run.dtype), "mode": mode},
        [Contender("jasper_fast", ours), *(Contender(n, rival(b)) for n, b in chosen.items())],
        refill=refill,
        reference=lambda: plain(exact, exact),
        low=(lambda: plain(torch.float32, run.dtype)) if exact is torch.float64 else None,
        tolerance=TOLERANCE,
        flops=counts.training_flops(cfg, N, T),
        nbytes=counts.training_bytes(cfg, N, T, run.dtype.itemsize),
        items=N,
        dtype=dtype_name(run.dtype),
        seeds=(1, 2) if judged is batch else (1,),
        needs=TRAINS,
    )


def main(run: Run, grid: tuple = ()) -> list[dict]:
    """Measure the grid for the device, or the given one."""
    grid = grid or (GPU_GRID if run.device.type == "cuda" else CPU_GRID[: 1 if run.quick else None])
    found = []
    for model, N, T in grid:  # one at a time: each case holds a model per contender
        for mode in MODES[:1] if run.quick or (run.brief and model != "small") else MODES:
            found += run.cases(f"train {model}", [case(run, model, N, T, mode)])
    return found


def _parameter_dtype(model: rivals.Model) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32) if isinstance(model, nn.Module) else torch.float32
