"""What a training loop is made of: the loss, one step that survives bad batches, figures, validation.

N utterances, T frames, V classes (blank last). Nothing here waits for the device unless its docstring says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast.augment import Augment
from jasper_fast.decoding import greedy_decode
from jasper_fast.features import LogMelFeatures
from jasper_fast.runs import RunError
from jasper_fast.text import Vocabulary

AMP_DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC loss of each utterance, (N,) fp32, not divided by its target's length.

    `log_probs` (N, T, V) with the blank last, `lengths` (N,) frames, `targets` (N, U) or concatenated, `target_lengths`
    (N,). Infinite where a target does not fit its frames. On a GPU, lengths that are already on the host save a wait.
    Semantics: the reference's `CTCLossNM`. Equivalent to `F.ctc_loss(log_probs.transpose(0, 1), ...,
    blank=V - 1, reduction="none")` in fp32.
    """
    with torch.autocast(log_probs.device.type, enabled=False):
        rows = log_probs.float().transpose(0, 1)
        return F.ctc_loss(rows, targets, lengths, target_lengths, blank=rows.shape[2] - 1, reduction="none")


def batch_loss(losses: Tensor) -> Tensor:
    """Mean of `losses` (N,); if one of them is NaN or infinite, NaN, so that every gradient shows it (on all ranks)."""
    bad = torch.where(torch.isfinite(losses).all(), 1.0, math.nan)
    return losses.mean() * bad


class Frontend(nn.Module):
    """Audio to features on the device, with the augmentation in training: masks and all."""

    def __init__(self, features: LogMelFeatures, augment: Augment | None = None):
        super().__init__()
        self.features, self.augment = features, augment or Augment()

    def forward(self, audio: Tensor, audio_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`audio` (N, samples), `audio_lengths` (N,) samples -> features, lengths on the device, lengths as given."""
        features, lengths = self.features(audio, audio_lengths.to(audio.device, non_blocking=True))
        return self.augment(features, lengths), lengths, self.features.frames(audio_lengths)


class BufferGuard:
    """Undoes what a bad batch did to a model's buffers (running statistics): one NaN would stay in them for ever."""

    def __init__(self, model: nn.Module):
        groups: dict[tuple, list[Tensor]] = {}
        for buffer in model.buffers():
            groups.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        self.groups = list(groups.values())
        self.before: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """To be called before the forward of a step."""
        self.before = [torch.cat([b.flatten() for b in buffers]) for buffers in self.groups]

    @torch.no_grad()
    def settle(self, good: Tensor) -> None:
        """Keeps the buffers where `good` (a boolean scalar on their device) holds, else puts the old values back."""
        for buffers, before in zip(self.groups, self.before, strict=True):
            chosen = torch.where(good, torch.cat([b.flatten() for b in buffers]), before)
            pieces = chosen.split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(pieces, buffers, strict=True)])


@dataclass
class StepResult:
    """What a step leaves, on the device: its utterances' losses, the gradient's norm, the last micro-batch's output."""

    losses: list[Tensor]
    names: list[str]
    grad_norm: Tensor
    log_probs: Tensor
    lengths: Tensor
    texts: list[str]


def train_step(
    model: nn.Module,
    frontend: Frontend,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: BufferGuard,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    clip_norm: float = 0.0,
) -> StepResult:
    """Forward and backward over `batches` (their gradients are averaged), then one step of `optimizer`.

    A NaN or an infinity in the loss or the gradient makes the step change nothing: parameters, optimiser state and
    running statistics stay, decided on the device. `model` may be a DistributedDataParallel. The optimiser must
    understand `found_inf`, as NovoGrad and PyTorch's fused AdamW do.
    """
    core = getattr(model, "module", model)
    guard.remember()
    optimizer.zero_grad(set_to_none=True)
    losses, names = [], []
    for i, batch in enumerate(batches):
        audio, targets = (t.to(device, non_blocking=True) for t in (batch.audio, batch.targets))
        silent = model.no_sync() if core is not model and i + 1 < len(batches) else nullcontext()
        with silent:
            features, lengths, frames = frontend(audio, batch.audio_lengths)
            with torch.autocast(device.type, amp_dtype or torch.float32, enabled=amp_dtype is not None):
                log_probs, out_lengths = model(features, lengths)
            each = ctc_loss(log_probs, core.out_lengths(frames), targets, batch.target_lengths)
            scaler.scale(batch_loss(each) / len(batches)).backward()
        losses.append(each.detach())
        names += batch.names
    good = torch.isfinite(torch.cat(losses)).all()
    scaler.unscale_(optimizer)
    grads = [p.grad for p in core.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if clip_norm:
        torch._foreach_mul_(grads, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    guard.settle(good)
    return StepResult(losses, names, norm, log_probs.detach(), out_lengths, batch.texts)


class Meter:
    """Collects the steps of a logging interval on the device and reads them in one go.

    Counts skipped steps (`bad_losses`: a loss that is NaN or infinite; `overflows`: only the gradient is), and stops
    the training after `max_bad` of them in a row.
    """

    def __init__(self, max_bad: int = 20):
        self.max_bad, self.bad_in_a_row, self.bad_losses, self.overflows = max_bad, 0, 0, 0
        self._pending: list[StepResult] = []
        self._start = time.perf_counter()

    def add(self, step: StepResult) -> None:
        """Takes a step in; nothing is read yet."""
        self._pending.append(step)

    def flush(self) -> dict[str, Any]:
        """Waits for the device and returns the interval's figures; empty if there was no step.

        `loss`: mean over the utterances of good steps; `grad_norm`: of the last step; `utterances`, `utterances_per_s`,
        and `bad`: the names of utterances whose loss was NaN or infinite. Raises RunError after `max_bad` skipped steps
        in a row, naming the last culprit.
        """
        if not self._pending:
            return {}
        sizes = [sum(map(len, step.losses)) for step in self._pending]
        flat = torch.cat([loss for step in self._pending for loss in step.losses])
        norms = torch.stack([step.grad_norm for step in self._pending])
        values, norms = flat.tolist(), norms.tolist()
        good, bad, at = [], [], 0
        for step, size, norm in zip(self._pending, sizes, norms, strict=True):
            mine = values[at : at + size]
            at += size
            if wrong := [(name, v) for name, v in zip(step.names, mine, strict=True) if not math.isfinite(v)]:
                bad += wrong
                self.bad_losses += 1
            elif not math.isfinite(norm):
                self.overflows += 1
            else:
                good += mine
            self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
        now = time.perf_counter()
        figures = {
            "loss": sum(good) / len(good) if good else None,
            "grad_norm": norms[-1] if math.isfinite(norms[-1]) else None,
            "utterances": len(values),
            "utterances_per_s": len(values) / (now - self._start),
            "bad": [f"{name} ({value})" for name, value in bad],
        }
        self._pending, self._start = [], now
        if self.bad_in_a_row >= self.max_bad:
            culprit = f"the loss of {figures['bad'][-1]}" if figures["bad"] else "the gradient"
            raise RunError(
                f"{self.bad_in_a_row} steps in a row were skipped because of NaN or infinity, at last in {culprit}. "
                f"Listen to such files, or lower the learning rate, lengthen the warm-up, or use bf16 or fp32"
            )
        return figures

    def restart_clock(self) -> None:
        """Leaves the time since the last `flush` (validation, a checkpoint) out of the next interval."""
        self._start = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        return {"bad_in_a_row": self.bad_in_a_row, "bad_losses": self.bad_losses, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


@dataclass
class Validation:
    """Figures of a validation: means over utterances, word and character error rates as fractions, some transcripts."""

    loss: float
    wer: float
    cer: float
    utterances: int
    bad: list[str] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)


@torch.no_grad()
def validate(
    model: nn.Module,
    frontend: Frontend,
    batches: Iterable[Any],
    vocabulary: Vocabulary,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    examples: int = 3,
) -> Validation:
    """Loss, WER and CER of `model` by greedy decoding, over the batches of all ranks; the model's mode is put back.

    Utterances with a loss that is NaN or infinite are named in `bad`, and left out of the mean loss; where the output
    itself is NaN the transcript counts as empty. Waits for the device. Raises RunError if there is no utterance.
    """
    from jasper_fast.metrics import cer, wer

    core = getattr(model, "module", model)
    modes = [(m, m.training) for m in (core, frontend)]
    references, hypotheses, losses, bad = [], [], [], []
    for module, _ in modes:
        module.eval()
    try:
        for batch in batches:
            features, lengths, frames = frontend(batch.audio.to(device, non_blocking=True), batch.audio_lengths)
            with torch.autocast(device.type, amp_dtype or torch.float32, enabled=amp_dtype is not None):
                log_probs, out_lengths = core(features, lengths)
            each = ctc_loss(log_probs, core.out_lengths(frames), batch.targets.to(device), batch.target_lengths)
            for name, value in zip(batch.names, each.tolist(), strict=True):
                (losses if math.isfinite(value) else bad).append(value if math.isfinite(value) else f"{name} ({value})")
            texts = greedy_decode(torch.nan_to_num(log_probs, nan=-1e4), out_lengths, vocabulary)
            broken = torch.isnan(log_probs).any(2) & (
                torch.arange(log_probs.shape[1], device=device) < out_lengths.to(device)[:, None]
            )
            hypotheses += ["" if nan else text for nan, text in zip(broken.any(1).tolist(), texts, strict=True)]
            references += batch.texts
    finally:
        for module, training in modes:
            module.train(training)
    if dist.is_initialized():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (references, hypotheses, losses, bad))
        references, hypotheses, losses, bad = ([x for part in parts for x in part[i]] for i in range(4))
    if not references:
        raise RunError("the validation manifests hold no usable utterance; see the report of skipped ones")
    return Validation(
        loss=sum(losses) / len(losses) if losses else math.nan,
        wer=wer(references, hypotheses),
        cer=cer(references, hypotheses),
        utterances=len(references),
        bad=bad,
        examples=list(zip(references[:examples], hypotheses[:examples], strict=True)),
    )
