"""What a training loop is made of: the loss, one step that survives bad batches, figures, validation.

N utterances, T frames, V classes (blank last). Nothing here waits for the device unless its docstring says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast.augment import Augment
from jasper_fast.decoding import greedy_decode
from jasper_fast.ema import EMA
from jasper_fast.features import LogMelFeatures
from jasper_fast.metrics import cer, wer
from jasper_fast.runs import Ranks, RunError, own_randomness
from jasper_fast.text import Vocabulary

if TYPE_CHECKING:
    from jasper_fast.data import Batch

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
    heard: list[Tensor]  # whether each utterance's features are finite
    names: list[str]
    grad_norm: Tensor
    log_probs: Tensor
    lengths: Tensor
    texts: list[str]


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
) -> StepResult:
    """Forward and backward over `batches` (their gradients are averaged), then one step of `optimizer`.

    A NaN or an infinity in the loss or the gradient makes the step change nothing: parameters, optimiser state and
    running statistics stay, decided on the device. `model` may be a DistributedDataParallel. The optimiser must
    understand `found_inf`, as NovoGrad and PyTorch's fused AdamW do.
    """
    core = getattr(model, "module", model)
    guard.remember()
    optimizer.zero_grad(set_to_none=True)
    losses, heard, names = [], [], []
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
        heard.append(torch.isfinite(features).flatten(1).all(1))
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
    return StepResult(losses, heard, names, norm, log_probs.detach(), out_lengths, batch.texts)


class Meter:
    """Collects steps on the device, and reads many of them in one go.

    Counts skipped steps (`bad_losses`: a loss that is NaN or infinite; `overflows`: only the gradient is), and stops
    the training after `max_bad` of them in a row.
    """

    def __init__(self, max_bad: int = 20):
        self.max_bad, self.bad_in_a_row, self.bad_losses, self.overflows = max_bad, 0, 0, 0
        self._pending: list[StepResult] = []
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self._sum, self._good, self._seen, self._norm = 0.0, 0, 0, math.nan
        self._start = time.perf_counter()

    def add(self, step: StepResult) -> None:
        """Takes a step in; nothing is read yet."""
        self._pending.append(step)

    def read(self) -> list[str]:
        """Waits for the device, and returns, by name, what made a loss NaN or infinite since the last call.

        That is the utterances whose features are not finite (batch norm spreads them over their whole batch), or where
        there is none, all whose loss is not. Raises RunError after `max_bad` skipped steps in a row, naming the last.
        """
        if not self._pending:
            return []
        losses = torch.cat([loss for step in self._pending for loss in step.losses]).tolist()
        heard = torch.cat([flag for step in self._pending for flag in step.heard]).tolist()
        norms = torch.stack([step.grad_norm for step in self._pending]).tolist()
        bad: list[str] = []
        for step, norm in zip(self._pending, norms, strict=True):
            count = len(step.names)
            mine, losses, finite, heard = losses[:count], losses[count:], heard[:count], heard[count:]
            wrong = [f"{n}: its loss is {v}" for n, v in zip(step.names, mine, strict=True) if not math.isfinite(v)]
            deaf = [f"{n}: its features are not finite" for n, f in zip(step.names, finite, strict=True) if not f]
            bad += (deaf or wrong) if wrong else []
            self.bad_losses += bool(wrong)
            self.overflows += not wrong and not math.isfinite(norm)
            self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
            self._seen += len(mine)
            if math.isfinite(norm):
                self._sum, self._good, self._norm = self._sum + sum(mine), self._good + len(mine), norm
        self._pending = []
        if self.bad_in_a_row >= self.max_bad:
            culprit = bad[-1] if bad else "the gradient has no finite norm"
            raise RunError(
                f"{self.bad_in_a_row} steps in a row were skipped because of NaN or infinity; the last: {culprit}. "
                f"Listen to such files, or lower the learning rate, lengthen the warm-up, or use bf16 or fp32"
            )
        return bad

    def figures(self) -> dict[str, float]:
        """The interval's figures after `read`; then a new interval starts.

        `loss` is the mean over the utterances of good steps, `grad_norm` that of the last good step.
        """
        seconds = time.perf_counter() - self._start
        loss = self._sum / self._good if self._good else math.nan
        result = {"loss": loss, "grad_norm": self._norm, "utterances_per_s": self._seen / seconds}
        self.restart()
        return result | {"bad_losses": self.bad_losses, "overflows": self.overflows}

    def state_dict(self) -> dict[str, int]:
        return {"bad_in_a_row": self.bad_in_a_row, "bad_losses": self.bad_losses, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


@dataclass
class Run:
    """Everything that a run must save to go on exactly where it stands, but for the random generators."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    ema: EMA | None = None
    epoch: int = 0  # the one under way, from 0
    position: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    best_wer: float = math.inf
    minutes: float = 0.0  # of earlier parts of the run

    _PARTS = ("optimizer", "scaler", "meter")
    _PLACES = ("epoch", "position", "step", "best_wer", "minutes")

    def state_dict(self) -> dict[str, Any]:
        """Model and moving average under the reference's keys, the rest by name."""
        state = {name: getattr(self, name).state_dict() for name in self._PARTS}
        state |= {name: getattr(self, name) for name in self._PLACES}
        state["ema_state_dict"] = self.ema.state_dict() if self.ema else None
        state["ema_updates"] = self.ema.updates if self.ema else 0
        return state | {"state_dict": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes everything back. A moving average that starts only now starts from the saved weights."""
        self.model.load_state_dict(state["state_dict"])
        for name in self._PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self._PLACES:
            setattr(self, name, state[name])
        if self.ema:
            average = state["ema_state_dict"] or state["state_dict"]
            self.ema.load_state_dict(average, state["ema_updates"])


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
    batches: Iterable[Batch],
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
    core = getattr(model, "module", model)
    modes = [(m, m.training) for m in (core, frontend)]
    references, hypotheses, losses, bad = [], [], [], []
    for module, _ in modes:
        module.eval()
    try:
        for batch in batches:
            if not len(batch):  # nothing of it could be read; the dataset has the report
                continue
            features, lengths, frames = frontend(batch.audio.to(device, non_blocking=True), batch.audio_lengths)
            with torch.autocast(device.type, amp_dtype or torch.float32, enabled=amp_dtype is not None):
                log_probs, out_lengths = core(features, lengths)
            each = ctc_loss(log_probs, core.out_lengths(frames), batch.targets.to(device), batch.target_lengths)
            for name, value in zip(batch.names, each.tolist(), strict=True):
                (losses if math.isfinite(value) else bad).append(
                    value if math.isfinite(value) else f"{name}: its loss is {value}"
                )
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


def validate_run(
    run: Run,
    ranks: Ranks,
    frontend: Frontend,
    batches: Callable[[], Iterable[Batch]],
    vocabulary: Vocabulary,
    amp_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Validation]:
    """`validate` with the live weights ("live"), then with the moving average ("ema") where there is one.

    All ranks first take the running statistics of rank 0. The random generators stay where they are. `batches` makes
    this rank's batches anew.
    """
    ranks.same_buffers(run.model, run.ema.average.values() if run.ema else ())
    results = {}
    for weights in ("live", "ema") if run.ema else ("live",):
        with own_randomness(seed), run.ema.applied_to(run.model) if weights == "ema" else nullcontext():
            results[weights] = validate(
                run.model, frontend, batches(), vocabulary, device=ranks.device, amp_dtype=amp_dtype
            )
    return results
