"""The definition of the CTC loss in plain PyTorch, for any device, fp64 included. The host reads no tensor."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each utterance (N,), infinite if its target does not fit, and the forward variables.

    The forward variables, (N, T, 2, W) with W > U, are those of the blanks and of the labels in every frame.
    """
    n, t, _ = log_probs.shape
    labels, differs, _ = _states(targets, target_lengths)
    low, at = log_probs.new_full((), -math.inf), torch.arange(labels.shape[1], device=log_probs.device)
    b, lab = torch.where(at == 0, 0.0, low).expand(labels.shape), low.expand(labels.shape)
    alpha = log_probs.new_full((n, t, 2, labels.shape[1]), -math.inf)
    for i in range(t):
        at_blank, at_label = _emissions(log_probs[:, i], labels, blank)
        before = F.pad(lab[:, :-1], (1, 0), value=-math.inf)
        going = (i < lengths)[:, None]
        new = at_blank + _lse(b, before), at_label + _lse(lab, b, torch.where(differs, before, low))
        b, lab = torch.where(going, new[0], b), torch.where(going, new[1], lab)
        alpha[:, i] = torch.stack([b, lab], 1)
    last = target_lengths[:, None]
    end = _lse(b.gather(1, last), torch.where(last > 0, lab.gather(1, (last - 1).clamp(min=0)), low))
    return -end[:, 0], alpha


def backward(
    dlosses: Tensor,
    log_probs: Tensor,
    lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    losses: Tensor,
    alpha: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """Returns the gradient of `log_probs`, 0 beyond the lengths. For an infinite loss it is NaN within the length, or 0
    with `zero_infinity`."""
    labels, differs, blanks = _states(targets, target_lengths)
    low, at = log_probs.new_full((), -math.inf), torch.arange(labels.shape[1], device=log_probs.device)
    b = torch.where(at == target_lengths[:, None], 0.0, low)
    lab = torch.where(at == target_lengths[:, None] - 1, 0.0, low)
    infinite = (losses == math.inf)[:, None]
    grads = torch.zeros_like(log_probs, memory_format=torch.contiguous_format)
    for i in reversed(range(log_probs.shape[1])):
        row, going = log_probs[:, i], (i < lengths)[:, None]
        of_blanks, of_labels = ((alpha[:, i, k] + x + losses[:, None]).exp() for k, x in ((0, b), (1, lab)))
        posterior = torch.zeros_like(row).scatter_add_(1, labels.clamp(min=0), torch.where(labels >= 0, of_labels, 0.0))
        posterior[:, blank] += torch.where(blanks, of_blanks, 0.0).sum(1)
        posterior = torch.where(infinite, math.nan, posterior)
        grads[:, i] = torch.where(going & ~(infinite & zero_infinity), dlosses[:, None] * (row.exp() - posterior), 0.0)
        at_blank, at_label = _emissions(row, labels, blank)
        x, y = b + at_blank, lab + at_label
        later = F.pad(_lse(x, torch.where(differs, y, low))[:, 1:], (0, 1), value=-math.inf)
        b, lab = torch.where(going, _lse(x, y), b), torch.where(going, _lse(y, later), lab)
    return grads


def _states(targets: Tensor, target_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three (N, U + 1) tensors: the labels (-1 beyond the last), and two masks.

    The first mask is true for labels that differ from the label before (so not for the first label), the second for
    blanks that exist.
    """
    at = torch.arange(targets.shape[1] + 1, device=targets.device)
    labels = torch.where(at < target_lengths[:, None], F.pad(targets, (0, 1)), -1)
    before = F.pad(labels[:, :-1], (1, 0), value=-1)
    return labels, (labels >= 0) & (before >= 0) & (labels != before), at <= target_lengths[:, None]


def _emissions(row: Tensor, labels: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities of the blank (N, 1) and of the labels (N, U + 1) in one frame `row` (N, V)."""
    return row[:, blank, None], torch.where(labels >= 0, row.gather(1, labels.clamp(min=0)), -math.inf)


def _lse(*xs: Tensor) -> Tensor:
    """log(sum(exp(x))), which is -inf where all x are -inf."""
    highest = functools.reduce(torch.maximum, xs)
    highest = torch.where(highest == -math.inf, 0.0, highest)
    return highest + sum((x - highest).exp() for x in xs).log()
