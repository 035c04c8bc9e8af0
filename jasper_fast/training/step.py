"""One training step: features, forward, CTC loss, backward, and an update that is skipped after a bad batch.

N utterances, T frames, V classes (blank last), U labels. A function waits for the device only if its docstring says so.
"""

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast import ops
from jasper_fast.data.batch import Batch
from jasper_fast.dispatch import choose
from jasper_fast.speech.augment import Augment
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.training.optim import EMA, NovoGrad
from jasper_fast.training.runs import RunError

AMP_DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Returns the CTC loss of each utterance, (N,) fp32, not divided by its target's length.

    `log_probs` (N, T, V) with the blank last, `lengths` (N,) frames, `targets` (N, U) or concatenated, `target_lengths`
    (N,). The loss is infinite if the target does not fit into the frames. If `loss_is_capturable(device)` and the
    targets are (N, U), this calls `ops.ctc_loss` and moves the lengths to the device. Otherwise it calls PyTorch's
    loss, which waits for the device unless the lengths are on the host. The targets are moved to the device in both
    cases. Raises ValueError for a target that is no label of the model. Targets that are already on a GPU are not
    checked, because that would wait for the GPU. Semantics: NVIDIA's `CTCLossNM`. Equivalent to
    `F.ctc_loss(log_probs.transpose(0, 1), ..., blank=V - 1, reduction="none")` in fp32.
    """
    blank = log_probs.shape[2] - 1
    if targets.is_cpu and target_lengths.is_cpu:
        used = targets.numpy()
        if used.ndim == 2:  # numbers beyond the lengths do not matter
            used = used[np.arange(used.shape[1]) < target_lengths.numpy()[:, None]]
        if len(wrong := used[(used < 0) | (used >= blank)]):
            raise ValueError(
                f"target {wrong[0]} is not one of the model's {blank} labels; encode texts with the model's Vocabulary"
            )
    with torch.autocast(log_probs.device.type, enabled=False):
        rows = log_probs.float()
        if targets.dim() == 2 and loss_is_capturable(rows.device):
            given = (x.to(rows.device, torch.int64, non_blocking=True) for x in (lengths, targets, target_lengths))
            return ops.ctc_loss(rows, *given)
        targets = targets.to(rows.device, non_blocking=rows.is_cuda)  # a copy to the host would not be waited for
        return F.ctc_loss(rows.transpose(0, 1), targets, lengths, target_lengths, blank, "none")


def loss_is_capturable(device: torch.device) -> bool:
    """Returns whether a CUDA graph can capture the CTC loss: Triton's kernel reads the lengths on the device, whereas
    PyTorch's loss reads them on the host."""
    return device.type != "cpu" and choose.ctc_face("auto", device) == "triton"


def batch_loss(losses: Tensor) -> Tensor:
    """Returns the mean of `losses` (N,), or NaN if one of them is NaN or infinite.

    A NaN makes every gradient NaN, on all ranks, so that all of them skip the step.
    """
    return losses.mean() * torch.where(torch.isfinite(losses).all(), 1.0, math.nan)


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns `model` compiled by `torch.compile` for batches of any length.

    The result shares its parameters with `model` and draws the same dropout. Use `model` itself for validation and for
    checkpoints, because in the result the names of all weights have a prefix. Raises RunError if PyTorch finds no
    compiler.
    """
    try:
        torch.compile(nn.Sigmoid())(torch.zeros(8, device=device))
    except RuntimeError as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
        raise RunError(f"--compile: PyTorch cannot compile ({said}): install {what}, or omit --compile") from error
    return torch.compile(model, dynamic=True, options={"fallback_random": True})


def inner(model: nn.Module) -> nn.Module:
    """Returns the module that DistributedDataParallel or `torch.compile` or both have wrapped, or `model` itself."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


class Frontend(nn.Module):
    """Computes features from audio on the device, and augments them in training."""

    def __init__(self, features: LogMelFeatures, augment: Augment | None = None):
        super().__init__()
        self.features, self.augment = features, augment or Augment()

    def forward(self, audio: Tensor, audio_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the features, their lengths on the device of `audio`, and their lengths on that of `audio_lengths`.

        `audio`: (N, samples). `audio_lengths`: (N,), in samples.
        """
        features, lengths = self.features(audio, audio_lengths.to(audio.device, non_blocking=True))
        return self.augment(features, lengths), lengths, self.features.frames(audio_lengths)


class BufferGuard:
    """Undoes the changes that a bad batch made to a model's buffers. Running statistics would keep a NaN for ever."""

    def __init__(self, model: nn.Module):
        groups: dict[tuple, list[Tensor]] = {}
        for buffer in model.buffers():
            groups.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        self.groups = list(groups.values())
        self.before: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Copies the buffers. Call it before the forward of a step."""
        self.before = [torch.cat([b.flatten() for b in buffers]) for buffers in self.groups]

    @torch.no_grad()
    def settle(self, good: Tensor) -> None:
        """Restores the copies unless `good`, a boolean scalar on the buffers' device, is true."""
        for buffers, before in zip(self.groups, self.before, strict=True):
            chosen = torch.where(good, torch.cat([b.flatten() for b in buffers]), before)
            pieces = chosen.split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(pieces, buffers, strict=True)])


@dataclass
class StepResult:
    """The results of a step. Its tensors are on the device; `losses` and `heard` have one tensor per micro-batch."""

    losses: list[Tensor]  # one loss per utterance
    heard: list[Tensor]  # whether each utterance's features are finite
    names: list[str]  # names of all utterances
    grad_norm: Tensor
    log_probs: Tensor  # of the last micro-batch
    lengths: Tensor  # of `log_probs`
    texts: list[str]  # transcripts of the last micro-batch
    unread: str = ""  # why a rank could read none of its files, if the step was skipped for this reason


def missed_step(device: torch.device, batches: Sequence[Batch]) -> StepResult:
    """Returns the result of a step that is skipped because a rank (this one or another) could read no file."""
    causes = [skipped.detail for batch in batches for skipped in batch.skipped]
    if any(map(len, batches)) or not causes:
        causes = ["another process could read none of its files"]
    nothing = torch.zeros(0, device=device)
    return StepResult([nothing], [nothing.bool()], [], nothing.new_tensor(math.nan), nothing, nothing, [], causes[-1])


def train_step(
    model: nn.Module,
    frontend: Frontend,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: BufferGuard,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    clip_norm: float = 0.0,
    ema: EMA | None = None,
) -> StepResult:
    """Runs forward and backward over `batches`, averages their gradients, and makes one step of `optimizer`.

    If the loss or the gradient has a NaN or an infinity, parameters and optimiser state do not change. If a loss of
    this process is not finite, running statistics do not change either. With NovoGrad and PyTorch's fused optimisers
    the device decides whether to skip the step. With other optimisers the host decides, and waits for the device.
    `model` may be compiled or a DistributedDataParallel. `ema` is updated at the end of every step, or in the
    optimiser's step if the optimiser was made with `ema`.
    """
    core = inner(model)
    guard.remember()
    optimizer.zero_grad(set_to_none=True)
    losses, heard, names, on_device = [], [], [], loss_is_capturable(device)
    for i, batch in enumerate(batches):
        with model.no_sync() if hasattr(model, "no_sync") and i + 1 < len(batches) else nullcontext():
            samples = batch.audio_lengths.to(device, non_blocking=True) if on_device else batch.audio_lengths
            features, lengths, frames = frontend(batch.audio.to(device, non_blocking=True), samples)
            with torch.autocast(device.type, amp_dtype or torch.float32, enabled=amp_dtype is not None):
                log_probs, out_lengths = model(features, lengths)
            frames = out_lengths if on_device else core.out_lengths(frames)
            each = ctc_loss(log_probs, frames, batch.targets, batch.target_lengths)
            loss = batch_loss(each)
            # If no utterance has a frame, the loss is NaN, but its gradient is 0. Adding 0 * loss makes it NaN.
            log_probs.register_hook(functools.partial(torch.add, other=loss.detach(), alpha=0))
            scaler.scale(loss / len(batches)).backward()
        losses.append(each.detach())
        heard.append(torch.isfinite(features).flatten(1).all(1))
        names += batch.names
    norm = finish(core, losses, optimizer, scaler, guard, clip_norm, ema)
    return StepResult(losses, heard, names, norm, log_probs.detach(), out_lengths, batch.texts)


def finish(
    model: nn.Module,
    losses: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: BufferGuard,
    clip_norm: float = 0.0,
    ema: EMA | None = None,
) -> Tensor:
    """Ends a step after the backward of `losses`: keeps or restores the buffers, and updates weights and `ema`.

    Returns the gradient's norm. Waits for the device only where `update` does.
    """
    guard.settle(torch.isfinite(torch.cat(list(losses))).all())
    norm = update(model, optimizer, scaler, clip_norm)
    if ema is not None and getattr(optimizer, "ema", None) is not ema:
        ema.update(model)
    return norm


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float = 0.0
) -> Tensor:
    """Makes one step of `optimizer` with the gradients of `model`, which `scaler` has scaled.

    Returns the norm of the unscaled gradients. If the norm is not finite, the weights do not change and the loss scale
    (with fp16) falls. NovoGrad needs two passes over memory and does not change the gradients. For other optimisers the
    gradients are unscaled and clipped in place. With an optimiser that is neither NovoGrad nor a fused one of PyTorch,
    this waits for the device.
    """
    if isinstance(optimizer, NovoGrad):
        scale = scaler._scale if scaler.is_enabled() else None
        norm, found_inf = optimizer.guarded_step(scale, clip_norm).unbind()
        if scale is not None:  # `scaler.step` would check each gradient again, so set its result here
            scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {norm.device: found_inf.reshape(1)}
            scaler.update()
        return norm
    scaler.unscale_(optimizer)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if clip_norm:
        torch._foreach_mul_(grads, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    found_inf = (~torch.isfinite(norm)).float()
    if scaler.is_enabled():  # `unscale_` has looked at the elements, but the norm of finite elements can overflow
        scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {norm.device: found_inf}
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, found_inf
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not found_inf:
        optimizer.step()
    return norm
