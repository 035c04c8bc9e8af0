"""The size of a step: how many micro-batches make a global batch, and whether the largest batch fits in memory."""

import torch
from torch import nn

from jasper_fast.data.batches import BatchSampler
from jasper_fast.training.randomness import own_randomness
from jasper_fast.training.runs import RunError
from jasper_fast.training.step import BufferGuard, Frontend, ctc_loss


def accumulation_for(wanted: int, sampler: BatchSampler, utterances: int) -> tuple[int, str]:
    """Returns how many micro-batches per process make a step of ``wanted`` utterances, and a message about it.

    The number is rounded to the nearest integer. A micro-batch has ``batch_size`` utterances. If its size is a limit in
    seconds, the mean over the first epoch is used instead. That epoch has ``utterances`` utterances in all. Raises
    RunError if one micro-batch per process is already more than 1.5 times ``wanted``.
    """
    world = sampler.world_size
    mean = utterances / max(sampler.steps(0) * world, 1)
    size = sampler.batch_size if sampler.max_seconds is None and sampler.batch_size else mean
    count = max(1, round(wanted / (size * world)))
    made = count * size * world
    if made > 1.5 * wanted:
        raise RunError(
            f"--global-batch {wanted}: one micro-batch on each of {world} processes already makes {made:.0f} "
            "utterances: lower --batch-size or --batch-seconds, or use fewer processes"
        )
    about = "" if made == wanted else f" ({wanted} were requested)"
    return count, (
        f"a step is {count} micro-batch{'es' * (count > 1)} of {size:g} utterances on each of {world} "
        f"process{'es' * (world > 1)}: {made:g}{about}"
    )


def largest_batches(sampler: BatchSampler, seconds: list[float], epoch: int = 0) -> list[tuple[int, float]]:
    """Returns [(utterances, seconds of the longest utterance)] of the epoch's largest batch, padding included.

    If another batch has the longest utterance, that batch is the second element.
    """
    shapes = [(len(batch), max(seconds[i] for i in batch)) for batch in sampler.batches(epoch)]
    return sorted({max(shapes, key=lambda s: s[0] * s[1]), max(shapes, key=lambda s: s[1])}, key=lambda s: -s[0] * s[1])


def _fits(model: nn.Module, frontend: Frontend, n: int, samples: int, device: torch.device, amp_dtype) -> bool:
    """Returns whether forward and backward over ``n`` utterances of noise fit in memory."""
    try:
        audio, lengths = 0.1 * torch.randn(n, samples, device=device), torch.full((n,), samples)
        features, frames, on_host = frontend(audio, lengths)
        with torch.autocast(device.type, amp_dtype or torch.float32, enabled=amp_dtype is not None):
            log_probs, _ = model(features, frames)
        targets, counts = torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, dtype=torch.int64)
        ctc_loss(log_probs, model.out_lengths(on_host), targets, counts).mean().backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def scan_memory(
    model: nn.Module,
    frontend: Frontend,
    shapes: list[tuple[int, float]],
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
) -> str:
    """Runs forward and backward over the batches ``shapes`` (utterances, seconds), and reports on the first one.

    ``shapes`` comes from `largest_batches`. Weights, running statistics and random generators do not change. If a batch
    does not fit, raises RunError with the number of utterances that fit.
    """
    guard, rate = BufferGuard(model), frontend.features.sample_rate
    guard.remember()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with own_randomness(0):
            for n, seconds in shapes:
                samples, fitting = round(seconds * rate), n
                while not _fits(model, frontend, fitting, samples, device, amp_dtype):
                    fitting //= 2
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    if not fitting:
                        raise RunError(f"not even one utterance of {seconds:.1f} s fits in memory: lower max_duration")
                if fitting < n:
                    raise RunError(
                        f"{n} utterances of {seconds:.1f} s do not fit in memory, but {fitting} do: use --batch-size "
                        f"{fitting} or --batch-seconds {fitting * seconds:.0f}, and multiply --grad-accumulation by "
                        f"{-(-n // fitting)} or use --global-batch"
                    )
    finally:
        guard.settle(torch.zeros((), dtype=torch.bool, device=device))
    n, seconds = shapes[0]
    took = ""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.mem_get_info(device)[1] / 2**30
        took = f" and takes {peak:.1f} of {total:.1f} GiB"
    return f"the largest batch, {n} utterances of {seconds:.1f} s, fits{took}"
