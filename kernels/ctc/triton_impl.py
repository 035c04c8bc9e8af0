"""The CTC loss in Triton (NVIDIA sm_80 and later; on a CPU through Triton's interpreter), fp32: three kernels.

    alpha      one program per utterance: the forward variables of all frames, and the loss
    posterior  one program per utterance: from the last frame to the first, the posterior of every state
    gradient   one program per tile of frames and symbols: adds the posteriors of all states with the same symbol, as a
               product with a 0/1 matrix

The states of a frame depend on the frame before, so latency limits the first two kernels. They therefore keep the
states in registers, get the state of the neighbouring label by one exchange between threads, and load the next frame
while they compute the current one. Sums are made in a fixed order, so runs are bit-identical.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels import launch

FRAMES, STATES, SYMBOLS = 16, 32, 32  # tile of the gradient kernel
EACH = 2  # blanks of a thread, and also its labels; it has more if the program would otherwise need more than 8 warps
NONE = tl.constexpr(float("-inf"))


@triton.jit
def _lse(a, b):
    """log(exp(a) + exp(b)), which is -inf where both are -inf and NaN where one is NaN."""
    high = tl.where(a > b, a, b)
    high = tl.where(high == NONE, 0.0, high)
    return high + tl.log(tl.exp(a - high) + tl.exp(b - high))


@triton.jit
def _lse3(a, b, c):
    high = tl.where(a > b, a, b)
    high = tl.where(high > c, high, c)
    high = tl.where(high == NONE, 0.0, high)
    return high + tl.log(tl.exp(a - high) + tl.exp(b - high) + tl.exp(c - high))


@triton.jit
def _utterance(lengths_ptr, targets_ptr, target_lengths_ptr, n, T, U, V, BLOCK_U: tl.constexpr):
    """Returns, for utterance n: the numbers of frames and labels, the labels, and two masks.

    The first mask is true for labels that exist, the second for those that differ from the label before.
    """
    length = tl.minimum(tl.load(lengths_ptr + n), T).to(tl.int32)
    count = tl.minimum(tl.load(target_lengths_ptr + n), U).to(tl.int32)
    offs = tl.arange(0, BLOCK_U)
    there = offs < count
    at = targets_ptr + n * U + offs
    label = tl.load(at, mask=there, other=0)
    before = tl.load(at - 1, mask=there & (offs > 0), other=-1)
    differs = there & (offs > 0) & (label != before)
    return length, count, tl.minimum(tl.maximum(label, 0), V - 1), there, differs


@triton.jit(do_not_specialize=["T", "U", "V", "W", "stride_n", "stride_t", "blank"])
def _ctc_alpha_kernel(
    x_ptr, lengths_ptr, targets_ptr, target_lengths_ptr, losses_ptr, alpha_ptr,
    T, U, V, W, stride_n, stride_t, blank, BLOCK_U: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    length, count, label, there, differs = _utterance(lengths_ptr, targets_ptr, target_lengths_ptr, n, T, U, V, BLOCK_U)
    offs = tl.arange(0, BLOCK_U)
    shifted, kept = tl.maximum(offs - 1, 0), offs < W
    x_ptr += n * stride_n
    alpha_ptr += n * T * 2 * W + offs
    b = tl.where(offs == 0, 0.0, NONE)
    lab = tl.full([BLOCK_U], NONE, tl.float32)
    # The interpreter of Triton 3.9 takes no mask that combines a block with a scalar condition, hence tl.full.
    lengths = tl.full([BLOCK_U], length, tl.int32)
    at_blank = tl.load(x_ptr + blank, mask=length > 0, other=0.0)
    at_label = tl.load(x_ptr + label, mask=there & (lengths > 0), other=NONE)
    for t in range(length):
        x_ptr += stride_t
        next_blank = tl.load(x_ptr + blank, mask=t + 1 < length, other=0.0)
        next_label = tl.load(x_ptr + label, mask=there & (t + 1 < lengths), other=NONE)
        before = tl.where(offs == 0, NONE, tl.gather(lab, shifted, 0))
        lab = at_label + _lse3(lab, b, tl.where(differs, before, NONE))
        b = at_blank + _lse(b, before)
        tl.store(alpha_ptr, b, mask=kept)
        tl.store(alpha_ptr + W, lab, mask=kept)
        alpha_ptr += 2 * W
        at_blank, at_label = next_blank, next_label
    last_blank = tl.sum(tl.where(offs == count, b, 0.0), 0)
    last_label = tl.where(count > 0, tl.sum(tl.where(offs == count - 1, lab, 0.0), 0), NONE)
    tl.store(losses_ptr + n, -_lse(last_blank, last_label))


@triton.jit(do_not_specialize=["T", "U", "V", "W", "stride_n", "stride_t", "blank"])
def _ctc_posterior_kernel(
    x_ptr, lengths_ptr, targets_ptr, target_lengths_ptr, losses_ptr, alpha_ptr, posterior_ptr,
    T, U, V, W, stride_n, stride_t, blank, BLOCK_U: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    length, count, label, there, differs = _utterance(lengths_ptr, targets_ptr, target_lengths_ptr, n, T, U, V, BLOCK_U)
    offs = tl.arange(0, BLOCK_U)
    shifted, kept, loss = tl.minimum(offs + 1, BLOCK_U - 1), offs < W, tl.load(losses_ptr + n)
    last = tl.maximum(length - 1, 0)
    x_ptr += n * stride_n + last.to(tl.int64) * stride_t
    at = (n * T + last) * 2 * W + offs
    b = tl.where(offs == count, 0.0, NONE)
    lab = tl.where(offs == count - 1, 0.0, NONE)
    # The interpreter of Triton 3.9 takes no mask that combines a block with a scalar condition, hence tl.full.
    lengths = tl.full([BLOCK_U], length, tl.int32)
    at_blank = tl.load(x_ptr + blank, mask=length > 0, other=0.0)
    at_label = tl.load(x_ptr + label, mask=there & (lengths > 0), other=NONE)
    for t in range(length):
        x_ptr -= stride_t
        next_blank = tl.load(x_ptr + blank, mask=t + 1 < length, other=0.0)
        next_label = tl.load(x_ptr + label, mask=there & (t + 1 < lengths), other=NONE)
        of_blank = tl.load(alpha_ptr + at, mask=kept, other=NONE) + b
        of_label = tl.load(alpha_ptr + at + W, mask=kept, other=NONE) + lab
        tl.store(posterior_ptr + at, tl.exp(of_blank + loss), mask=kept)
        tl.store(posterior_ptr + at + W, tl.exp(of_label + loss), mask=kept)
        at -= 2 * W
        b += at_blank
        lab += at_label
        later = tl.gather(_lse(b, tl.where(differs, lab, NONE)), shifted, 0)
        later = tl.where(offs == BLOCK_U - 1, NONE, later)
        b, lab = _lse(b, lab), _lse(lab, later)
        at_blank, at_label = next_blank, next_label


@triton.jit(do_not_specialize=["T", "U", "V", "W", "stride_n", "stride_t", "blank", "zero_infinity"])
def _ctc_gradient_kernel(
    x_ptr, lengths_ptr, targets_ptr, target_lengths_ptr, losses_ptr, dlosses_ptr, posterior_ptr, dx_ptr,
    T, U, V, W, stride_n, stride_t, blank, zero_infinity,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n, t = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    v, u = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_U)
    length = tl.minimum(tl.load(lengths_ptr + n), T)
    count = tl.minimum(tl.load(target_lengths_ptr + n), U)
    within = t < length
    rows = posterior_ptr + (n * T + t)[:, None] * 2 * W
    total, blanks = tl.zeros([BLOCK_T, BLOCK_V], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, count + 1, BLOCK_U):
        at = first + u
        blanks += tl.sum(tl.load(rows + at[None, :], mask=within[:, None] & (at <= count)[None, :], other=0.0), 1)
        of_label = tl.load(rows + W + at[None, :], mask=within[:, None] & (at < count)[None, :], other=0.0)
        label = tl.load(targets_ptr + n * U + at, mask=at < count, other=-1)
        same = (label[:, None] == v[None, :]).to(tl.float32)
        total = tl.dot(of_label, same, total, input_precision=PRECISION)
    total += tl.where(v == blank, 1.0, 0.0)[None, :] * blanks[:, None]
    mask = (t < T)[:, None] & (v < V)[None, :]
    x = tl.load(x_ptr + n * stride_n + t[:, None].to(tl.int64) * stride_t + v[None, :], mask=mask, other=0.0)
    dx = tl.load(dlosses_ptr + n) * (tl.exp(x) - total)
    left_out = (zero_infinity != 0) & (tl.load(losses_ptr + n) == float("inf"))
    tl.store(dx_ptr + (n * T + t)[:, None] * V + v[None, :], tl.where(within[:, None] & ~left_out, dx, 0.0), mask=mask)


def forward(
    log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each utterance (N,), infinite if its target does not fit, and the forward variables.

    `log_probs` is fp32 with unit stride over symbols. The other tensors are int64, and `targets` is contiguous.
    """
    n, t, v = log_probs.shape
    u = targets.shape[1]
    w = triton.cdiv(u + 1, 4) * 4
    losses, alpha = log_probs.new_empty(n), log_probs.new_empty(n, t, 2, w)
    launch.run(
        _ctc_alpha_kernel, (n,), log_probs, log_probs, lengths, targets, target_lengths, losses, alpha,
        t, u, v, w, log_probs.stride(0), log_probs.stride(1), blank, **_states(u),
    )  # fmt: skip
    return losses, alpha


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
    """Returns the gradient of `log_probs`, contiguous, as `reference.backward` does."""
    n, t, v = log_probs.shape
    u, w = targets.shape[1], alpha.shape[3]
    sizes = (t, u, v, w, log_probs.stride(0), log_probs.stride(1), blank)
    given = lengths, targets, target_lengths, losses
    posterior, dx = torch.empty_like(alpha), log_probs.new_empty(n, t, v)
    launch.run(_ctc_posterior_kernel, (n,), log_probs, log_probs, *given, alpha, posterior, *sizes, **_states(u))
    launch.run(
        _ctc_gradient_kernel, (n, triton.cdiv(t, FRAMES), triton.cdiv(v, SYMBOLS)), log_probs,
        log_probs, *given, dlosses.contiguous(), posterior, dx, *sizes, int(zero_infinity), PRECISION="ieee",
        BLOCK_T=FRAMES, BLOCK_U=STATES, BLOCK_V=SYMBOLS, num_warps=4,
    )  # fmt: skip
    return dx


def _states(u: int) -> dict[str, int]:
    """Returns a block size with room for U + 1 blanks (and so for U labels), and the number of warps of the block."""
    block = triton.next_power_of_2(max(u + 1, 32 * EACH))
    return {"BLOCK_U": block, "num_warps": min(8, block // (32 * EACH))}
