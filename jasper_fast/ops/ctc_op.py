"""The CTC loss with all lengths on the device. The host reads nothing, so a CUDA graph can contain the loss."""

import math

import torch
from torch import Tensor

from jasper_fast.dispatch import backends, choose
from jasper_fast.ops.registration import lib, op, register_autograd


@op(
    "ctc_loss(Tensor log_probs, Tensor lengths, Tensor targets, Tensor target_lengths, int blank, bool zero_infinity, "
    "str face) -> (Tensor, Tensor)"
)
def _forward(log_probs, lengths, targets, target_lengths, blank, zero_infinity, face):
    return backends.face("ctc", face).forward(log_probs, lengths, targets, target_lengths, blank)


@op(
    "ctc_loss_backward(Tensor dlosses, Tensor log_probs, Tensor lengths, Tensor targets, Tensor target_lengths, "
    "Tensor losses, Tensor alpha, int blank, bool zero_infinity, str face) -> Tensor"
)
def _backward(dlosses, log_probs, lengths, targets, target_lengths, losses, alpha, blank, zero_infinity, face):
    return backends.face("ctc", face).backward(
        dlosses, log_probs, lengths, targets, target_lengths, losses, alpha, blank, zero_infinity
    )


@torch.library.register_fake("jasper_fast::ctc_loss", lib=lib)
def _(log_probs, lengths, targets, target_lengths, blank, zero_infinity, face):
    n, t, _ = log_probs.shape
    wide = targets.shape[1] + 1
    return log_probs.new_empty(n), log_probs.new_empty(n, t, 2, wide if face == "reference" else (wide + 3) // 4 * 4)


@torch.library.register_fake("jasper_fast::ctc_loss_backward", lib=lib)
def _(dlosses, log_probs, *_args):
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    *tensors, ctx.blank, ctx.zero_infinity, ctx.face = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


@register_autograd("ctc_loss", _save)
def _grad(ctx, dlosses, _dalpha):
    how = ctx.blank, ctx.zero_infinity, ctx.face
    return torch.ops.jasper_fast.ctc_loss_backward(dlosses, *ctx.saved_tensors, *how), *(None,) * 6


def ctc_loss(
    log_probs: Tensor,
    lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    *,
    blank: int | None = None,
    zero_infinity: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Returns the CTC loss of each utterance, (N,). All arguments are on one device.

    The host never waits for the device. `log_probs` (N, T, V) are log-softmax values in fp32 or fp64. `lengths` (N,) in
    frames, `targets` (N, U) and `target_lengths` (N,) are int64; targets beyond their length may have any values.
    `blank`: None means V - 1. If a target does not fit into its frames, the loss is infinite and its gradient NaN; with
    `zero_infinity` both are 0. The gradient is 0 at t >= length. Lengths beyond T and U are clamped to them. The Triton
    face takes only fp32. All other cases run in plain PyTorch (`reference`), which makes some 20 launches per frame.

    Raises ValueError for shapes and dtypes that do not fit. Equivalent to `F.ctc_loss(log_probs.transpose(0, 1),
    targets, lengths, target_lengths, blank, "none", zero_infinity)`.
    """
    if log_probs.dim() != 3 or log_probs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_probs must be (N, T, V), fp32 or fp64, got {tuple(log_probs.shape)} {log_probs.dtype}")
    n, _, v = log_probs.shape
    blank = v - 1 if blank is None else blank
    sizes = targets.shape[:1], lengths.shape, target_lengths.shape
    if targets.dim() != 2 or any(size != (n,) for size in sizes):
        found = ", ".join(str(tuple(x.shape)) for x in (targets, lengths, target_lengths))
        raise ValueError(f"targets (N, U), lengths, target_lengths (N,) must have N = {n} like log_probs, got {found}")
    if any(x.dtype != torch.int64 or x.device != log_probs.device for x in (targets, lengths, target_lengths)):
        raise ValueError(f"targets, lengths and target_lengths must be int64, on {log_probs.device} like log_probs")
    if not 0 <= blank < v:
        raise ValueError(f"blank must be one of the {v} symbols, got {blank}")
    face = choose.ctc_face(backend, log_probs.device) if log_probs.dtype == torch.float32 else "reference"
    if face == "triton" and log_probs.stride(2) != 1:
        log_probs = log_probs.contiguous()
    given = lengths.clamp(0, log_probs.shape[1]), targets.contiguous(), target_lengths.clamp(0, targets.shape[1])
    losses, _ = torch.ops.jasper_fast.ctc_loss(log_probs, *given, blank, zero_infinity, face)
    return torch.where(losses == math.inf, 0.0, losses) if zero_infinity else losses
