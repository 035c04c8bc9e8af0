"""Checks the answers of a training step and counts its bytes, for `python -m bench memory`."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jasper_fast.bench.cases import counts, models
from jasper_fast.bench.cases.train import TRAINS, Batch, answer, eager_answer, judged_size, precision, tolerance
from jasper_fast.bench.harness import allocations
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.run import Run


def step(module: nn.Module, batch: Batch, dtype: torch.dtype, device: torch.device) -> dict:
    """Returns the kept and peak bytes of the second training step, with dropout on.

    The first step does not count, because it may allocate memory that later steps reuse. The peak is that of forward
    and backward, without the gradients of the parameters, which every kind of training keeps. In the peak, every
    allocation counts on a CPU, and on a GPU the tensors that ops take and return. `allocator_peak_bytes`, on a GPU, is
    the peak of PyTorch's allocator in a third step, with the gradients.
    """
    module.train()
    forward = lambda: batch.loss(module, dtype)[0]  # noqa: E731
    forward().backward()
    module.zero_grad(set_to_none=True)
    parameters, found = list(module.parameters()), {}

    def counted() -> None:
        found["kept_bytes"], births, loss = allocations.kept(forward, device)
        births.parameters = parameters
        with births:
            loss.backward()
        found["peak_bytes"] = births.peak

    if device.type == "cpu":
        found["peak_bytes"] = allocations.peak(counted, "cpu", parameters)
    else:
        counted()
        module.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward().backward()
        torch.cuda.synchronize(device)
        found["allocator_peak_bytes"] = torch.cuda.max_memory_allocated(device) - start
    module.zero_grad(set_to_none=True)
    return found


def case(run: Run, model: str, N: int, T: int) -> tuple[Case, dict[str, nn.Module], Callable[[], Batch]]:
    """Returns the case that checks the contenders of one model, their modules by name, and a function that returns the
    batch for counting.

    A module is added to the dict when its contender is built. A large model is checked on a smaller batch, which does
    not change the counts.
    """
    cfg = models.config(model)
    roomy = models.exact(cfg, run.device) is torch.float64  # else a tiny batch is checked, without `low`
    state = functools.cache(lambda: models.weights(cfg, run.device))
    batch = functools.cache(lambda: Batch(cfg, N, T, run.device))
    judged_at = judged_size(run.device, cfg, N, T) if roomy else (2, 64)
    judged = functools.cache(lambda: Batch(cfg, *judged_at, run.device))
    modules: dict[str, nn.Module] = {}

    def build(name: str) -> Runner:
        make = {"jasper_fast": functools.partial(models.fused, backend=run.backend), "eager": models.eager}[name]
        module = modules[name] = make(cfg, state())
        return Runner(lambda: None, lambda: answer(module, module, judged(), state(), run.dtype))

    def plain(dtype: torch.dtype, autocast_dtype: torch.dtype) -> dict[str, Tensor]:
        found = eager_answer(judged(), state(), dtype, autocast_dtype)
        return found if roomy else {name: t.float() for name, t in found.items()}  # half the memory of fp64

    made = Case(
        "memory",
        {
            "model": model,
            "batch": f"({N}, {cfg.encoder.in_feats}, {T})",
            "dtype": run.dtype_name,
            "mode": "training step",
        },
        [Contender(name, functools.partial(build, name)) for name in ("jasper_fast", "eager")],
        refill=lambda seed: judged().refill(seed),
        reference=lambda: plain(torch.float64, torch.float64),
        low=(lambda: plain(torch.float32, run.dtype)) if roomy else None,
        tolerance=tolerance(precision(run.device, run.dtype), cfg),
        seeds=(1, 2) if counts.parameters(cfg) < models.LARGE else (1,),
        needs=models.needs(cfg, TRAINS),
    )
    return made, modules, batch
