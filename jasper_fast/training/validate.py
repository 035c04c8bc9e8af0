"""Validation: loss, WER and CER of a model over the batches of all ranks."""

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jasper_fast.data.batch import Batch
from jasper_fast.speech.decoding import greedy_decode
from jasper_fast.speech.metrics import cer, wer
from jasper_fast.speech.text import Vocabulary
from jasper_fast.training.randomness import own_randomness
from jasper_fast.training.runs import Ranks, RunError
from jasper_fast.training.state import TrainingState
from jasper_fast.training.step import Frontend, ctc_loss


@dataclass
class Validation:
    """The figures of a validation. Error rates are fractions."""

    loss: float  # the mean over utterances with a finite loss
    wer: float
    cer: float
    bad: list[str] = field(default_factory=list)  # utterances whose loss is NaN or infinite
    examples: list[tuple[str, str]] = field(default_factory=list)  # (reference, hypothesis) of the first two utterances


def heard(log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary) -> list[str]:
    """Decodes `log_probs` (N, T, V) like `greedy_decode`, which raises an error for NaN. Here NaN counts as -1e4."""
    return greedy_decode(torch.nan_to_num(log_probs, nan=-1e4), lengths, vocabulary)


@torch.no_grad()
def validate(
    model: nn.Module,
    frontend: Frontend,
    batches: Iterable[Batch],
    vocabulary: Vocabulary,
    ranks: Ranks,
    amp_dtype: torch.dtype | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """Returns loss, WER and CER of `model` by greedy decoding, over the batches of all ranks.

    Runs the model in evaluation mode. Utterances whose loss is NaN or infinite are listed in `bad` and left out of the
    mean loss. If the output of an utterance has a NaN, its transcript counts as empty. Waits for the device. Returns
    None as soon as `stopped` returns True on any of `ranks`. Raises RunError if there is no utterance.
    """
    device, modes = ranks.device, [(module, module.training) for module in (model, frontend)]
    references, hypotheses, losses, bad = [], [], [], []
    for module, _ in modes:
        module.eval()
    try:
        waiting = iter(batches)
        while True:
            batch = next(waiting, None)
            stop, more = ranks.vote(stopped(), batch is not None)
            if stop:
                return None
            if not more:
                break
            if not batch:  # only other ranks have a batch left, or no file of this batch could be read
                continue
            features, lengths, frames = frontend(batch.audio.to(device, non_blocking=True), batch.audio_lengths)
            with torch.autocast(device.type, amp_dtype or torch.float32, enabled=amp_dtype is not None):
                log_probs, out_lengths = model(features, lengths)
            values = ctc_loss(log_probs, model.out_lengths(frames), batch.targets, batch.target_lengths).tolist()
            losses += filter(math.isfinite, values)
            bad += [f"{n}: its loss is {v}" for n, v in zip(batch.names, values, strict=True) if not math.isfinite(v)]
            texts = heard(log_probs, out_lengths, vocabulary)
            broken = torch.isnan(log_probs).any(2) & (
                torch.arange(log_probs.shape[1], device=device) < out_lengths.to(device)[:, None]
            )
            hypotheses += ["" if nan else text for nan, text in zip(broken.any(1).tolist(), texts, strict=True)]
            references += batch.texts
    finally:
        for module, training in modes:
            module.train(training)
    parts = ranks.gather((references, hypotheses, losses, bad))
    references, hypotheses, losses, bad = (list(itertools.chain(*of)) for of in zip(*parts))
    if not references:
        raise RunError("the validation manifests have no usable utterance: see the report of skipped utterances")
    return Validation(
        loss=sum(losses) / len(losses) if losses else math.nan,
        wer=wer(references, hypotheses),
        cer=cer(references, hypotheses),
        bad=bad,
        examples=list(zip(references[:2], hypotheses[:2], strict=True)),
    )


def validate_state(
    state: TrainingState,
    ranks: Ranks,
    frontend: Frontend,
    batches: Callable[[], Iterable[Batch]],
    vocabulary: Vocabulary,
    amp_dtype: torch.dtype | None = None,
    seed: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Validation] | None:
    """Returns the results of `validate` with the current weights ("live") and with the moving average ("ema"), if any.

    First, the buffers and the moving average of rank 0 are copied to all ranks. The states of the random generators do
    not change. `batches` returns this rank's batches; it is called once for each result. Returns None if `validate`
    returns None.
    """
    ranks.same_buffers(state.model, state.ema.average.values() if state.ema else ())
    results = {}
    for weights in ("live", "ema") if state.ema else ("live",):
        with own_randomness(seed), state.ema.applied_to(state.model) if weights == "ema" else nullcontext():
            results[weights] = validate(state.model, frontend, batches(), vocabulary, ranks, amp_dtype, stopped)
        if results[weights] is None:
            return None
    return results
