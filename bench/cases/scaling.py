"""The training step of one of several processes, with and without the exchange of gradients."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jasper_fast.bench.cases import models, train
from jasper_fast.bench.cases.full_step import full_step

OURS, EAGER = "jasper_fast", "eager"
APART = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}  # largest relative error of averaged gradients


class Setting(NamedTuple):
    """What is measured in this process: a model, its batch of N utterances of T frames, and how it is computed."""

    model: str
    N: int
    T: int
    device: torch.device
    dtype: torch.dtype
    backend: str


class Steps(NamedTuple):
    """A contender in this process. `shared` makes a step, and `silent` makes it without communication.

    `wrong` returns what is wrong with the averaged gradients.
    """

    shared: Callable[[], None]
    silent: Callable[[], None]
    wrong: Callable[[], str]


def parallel(module: nn.Module, device: torch.device, group: dist.ProcessGroup) -> DistributedDataParallel:
    """Returns `module` wrapped as in train.py, where forward passes do not broadcast the running statistics."""
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        process_group=group,
        gradient_as_bucket_view=True,
        **{buffers: False},
    )


def steps(contender: str, at: Setting, rank: int, group: dist.ProcessGroup | None) -> Steps:
    """Returns the steps of `contender` in process `rank` of `group`. Every process has a batch of its own. Without a
    group there is only this process."""
    cfg = models.config(at.model)
    state = models.weights(cfg, at.device)
    module = models.fused(cfg, state, at.backend) if contender == OURS else models.eager(cfg, state)
    batch = train.Batch(cfg, at.N, at.T, at.device)
    batch.refill(100 + rank)
    called: list[nn.Module] = []

    def wrap(trained: nn.Module) -> nn.Module:
        called.append(parallel(trained, at.device, group) if group is not None else trained)
        return called[0]

    run = full_step(module, module, cfg, batch.as_read, at.dtype, wrap)
    if group is None:
        return Steps(run, run, lambda: "")

    def silent() -> None:
        with called[0].no_sync():
            run()

    return Steps(run, silent, lambda: _wrong(called[0], batch, at, group))


def _wrong(model: DistributedDataParallel, batch: train.Batch, at: Setting, group: dist.ProcessGroup) -> str:
    """Returns which gradient is not the mean of the processes' own gradients, or an empty text."""

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        batch.loss(model, at.dtype)[0].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with models.dropout_off(model):
        with model.no_sync():
            wanted = gradients()
        found = gradients()
    model.zero_grad(set_to_none=True)
    for name, mean in wanted.items():
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
        apart = ((found[name] - mean).norm() / mean.norm().clamp(min=1e-20)).item()
        if not apart <= APART[at.dtype]:
            name = name.removeprefix("module.inner.")
            return f"the gradient of {name} differs by {apart:.1e} from the mean of all processes"
    return ""
