"""NovoGrad in Triton (NVIDIA sm_80 and later; on a CPU through Triton's interpreter), fp32: two kernels.

    squares  each program writes a partial sum of g*g
    update   each program computes the norm of all gradients and that of its tensor from the partial sums, decides
             whether to skip or to clip, and updates v, m, p and the average

A program owns a run: a range of elements of one tensor (see table.py). squares reads 4 bytes per element; update reads
16 and writes 12. Sums are made in a fixed order, so a repeated step gives identical bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels import launch
from jasper_fast.kernels.novograd import reference, table
from jasper_fast.kernels.novograd.operands import Settings, Tensors, Watched

BLOCK = table.BLOCK  # elements per iteration: each thread of 4 warps makes two 16-byte loads from each of four tensors
PARTIALS = 1024  # partial sums that a program reads in one iteration
GRAD, MOMENT, PARAM, MEAN, SQUARE, NUMEL, GROUP, KIND, FIRST, END = map(tl.constexpr, range(len(table.COLUMNS)))
IS_UPDATE, IS_COPY, WIDTH = (tl.constexpr(n) for n in (table.UPDATE, table.COPY, len(table.COLUMNS)))
SETTINGS = tl.constexpr(len(Settings._fields))
LR, BETA1, SHARE, BETA2, REST2, EPS, DECAY, WEIGHT = map(tl.constexpr, range(len(Settings._fields)))


@triton.jit
def _run(table_ptr, runs_ptr, size):
    """Returns the index of the program's tensor, its row in the table, and the start and length of the run."""
    tensor = tl.load(runs_ptr + 2 * tl.program_id(0))
    start = tl.multiple_of(tl.load(runs_ptr + 2 * tl.program_id(0) + 1), 16)
    row = table_ptr + tensor * WIDTH
    return tensor, row, start, tl.minimum(tl.load(row + NUMEL) - start, size).to(tl.int32)


@triton.jit
def _at(anchor_ptr, offset_ptr, start, ALIGNED: tl.constexpr):
    """Returns a pointer to element `start` of the fp32 tensor whose distance from the anchor is at `offset_ptr`.

    The table holds distances in elements instead of addresses, because the compiler cannot know the alignment of an
    address that is loaded.
    """
    offset = tl.load(offset_ptr)
    if ALIGNED:  # to 16 bytes
        offset = tl.multiple_of(offset, 4)
    return anchor_ptr + offset + start


@triton.jit(do_not_specialize=["size"])
def _squares_kernel(
    anchor_ptr, table_ptr, runs_ptr, partial_ptr, old_ptr, size, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the sum of squares of each run, and a copy of each tensor's second moment before the step."""
    tensor, row, start, count = _run(table_ptr, runs_ptr, size)
    g_ptr = _at(anchor_ptr, row + GRAD, start, ALIGNED) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    whole = count // BLOCK
    for _ in range(whole):
        g = tl.load(g_ptr)
        total += g * g
        g_ptr += BLOCK
    g = tl.load(g_ptr, mask=tl.arange(0, BLOCK) < count - whole * BLOCK, other=0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total + g * g, 0))
    if start == 0:
        tl.store(old_ptr + tensor, tl.load(_at(anchor_ptr, row + SQUARE, 0, False)))


@triton.jit
def _sums(partial_ptr, partials, first, end, PARTIALS: tl.constexpr):
    """Returns the sum of all partial sums, and the sum of those from `first` to `end` - 1."""
    total, own = tl.zeros([PARTIALS], tl.float32), tl.zeros([PARTIALS], tl.float32)
    for i in range(0, partials, PARTIALS):
        offs = i + tl.arange(0, PARTIALS)
        square = tl.load(partial_ptr + offs, mask=offs < partials, other=0.0)
        total += square
        own += tl.where((offs >= first) & (offs < end), square, 0.0)
    return tl.sum(total, 0), tl.sum(own, 0)


@triton.jit
def _average(a_ptr, p, weight, mask):
    a = tl.load(a_ptr, mask=mask)
    tl.store(a_ptr, a + weight * (p - a), mask=mask)


@triton.jit
def _step(g_ptr, m_ptr, p_ptr, a_ptr, beta1, factor, decay, lr, weight, mask, HAS_AVERAGE: tl.constexpr):
    p = tl.load(p_ptr, mask=mask)
    m = beta1 * tl.load(m_ptr, mask=mask) + factor * tl.load(g_ptr, mask=mask) + decay * p
    p -= lr * m
    tl.store(m_ptr, m, mask=mask)
    tl.store(p_ptr, p, mask=mask)
    if HAS_AVERAGE:
        _average(a_ptr, p, weight, mask)


@triton.jit(do_not_specialize=["size", "partials", "clip_norm", "guard"])
def _update_kernel(
    anchor_ptr, table_ptr, runs_ptr, partial_ptr, old_ptr, settings_ptr, scale_ptr, found_ptr, outcome_ptr,
    size, partials, clip_norm, guard,
    HAS_AVERAGE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Updates a run of a parameter, or averages or copies a run of another tensor."""
    tensor, row, start, count = _run(table_ptr, runs_ptr, size)
    kind = tl.load(row + KIND)
    s_ptr = settings_ptr + tl.load(row + GROUP) * SETTINGS
    weight = tl.load(s_ptr + WEIGHT).to(tl.float32)
    offs = tl.arange(0, BLOCK)
    whole = count // BLOCK
    rest = offs < count - whole * BLOCK
    p_ptr = _at(anchor_ptr, row + PARAM, start, ALIGNED) + offs
    a_ptr = _at(anchor_ptr, row + MEAN, start, ALIGNED) + offs

    total, own = _sums(partial_ptr, partials, tl.load(row + FIRST), tl.load(row + END), PARTIALS)
    inverse = 1.0 / tl.load(scale_ptr)
    norm = tl.sqrt(total) * inverse
    bad = ((guard != 0) & ~(norm < float("inf"))) | (tl.load(found_ptr) != 0)
    if tl.program_id(0) == 0:
        tl.store(outcome_ptr, norm)
        tl.store(outcome_ptr + 1, tl.where(bad, 1.0, 0.0))

    if kind == IS_UPDATE and not bad:
        inverse = tl.where(norm + 1e-6 > clip_norm, inverse * (clip_norm / (norm + 1e-6)), inverse)
        beta2, old, square = tl.load(s_ptr + BETA2).to(tl.float32), tl.load(old_ptr + tensor), own * inverse * inverse
        later = beta2 * old + tl.load(s_ptr + REST2).to(tl.float32) * square
        square = tl.where((old == 0) | (beta2 == 0), square, later)
        if start == 0:
            tl.store(_at(anchor_ptr, row + SQUARE, 0, False), square)
        share, eps = tl.load(s_ptr + SHARE).to(tl.float32), tl.load(s_ptr + EPS).to(tl.float32)
        factor = share * inverse / (tl.sqrt(square) + eps)
        beta1, decay = tl.load(s_ptr + BETA1).to(tl.float32), tl.load(s_ptr + DECAY).to(tl.float32)
        lr = tl.load(s_ptr + LR).to(tl.float32)
        g_ptr = _at(anchor_ptr, row + GRAD, start, ALIGNED) + offs
        m_ptr = _at(anchor_ptr, row + MOMENT, start, ALIGNED) + offs
        for _ in range(whole):
            _step(g_ptr, m_ptr, p_ptr, a_ptr, beta1, factor, decay, lr, weight, None, HAS_AVERAGE)
            g_ptr += BLOCK
            m_ptr += BLOCK
            p_ptr += BLOCK
            a_ptr += BLOCK
        _step(g_ptr, m_ptr, p_ptr, a_ptr, beta1, factor, decay, lr, weight, rest, HAS_AVERAGE)
    elif kind == IS_COPY:  # copies integers, because as fp32 the bits of a NaN might change
        bits, to = p_ptr.to(tl.pointer_type(tl.int32)), a_ptr.to(tl.pointer_type(tl.int32))
        for _ in range(whole):
            tl.store(to, tl.load(bits))
            bits += BLOCK
            to += BLOCK
        tl.store(to, tl.load(bits, mask=rest), mask=rest)
    elif HAS_AVERAGE:
        for _ in range(whole):
            _average(a_ptr, tl.load(p_ptr), weight, None)
            p_ptr += BLOCK
            a_ptr += BLOCK
        _average(a_ptr, tl.load(p_ptr, mask=rest), weight, rest)


def step(
    tensors: Tensors,
    watched: Watched,
    settings: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_norm: float,
    guard: bool,
    held: dict,
) -> Tensor:
    """Makes one step in place. Returns (2,): the unscaled gradients' norm before clipping, and 1 if skipped, else 0.

    All tensors in `tensors` are fp32. held: a dict that the caller keeps between steps; the table is stored in it.
    """
    ours, others = watched.split((torch.float32, torch.int64))
    rows, runs, size, partials, programs, aligned = table.keep(tensors, ours, settings.device, held)
    like = tensors.params[0]
    if "one" not in held:
        held.update(one=like.new_ones(1), zero=like.new_zeros(1))
    scale, found = held["one"] if grad_scale is None else grad_scale, held["zero"] if found_inf is None else found_inf
    partial, old, outcome = like.new_empty(partials), like.new_empty(len(rows)), like.new_empty(2)
    launch.run(
        _squares_kernel, (partials,), like, like, rows, runs, partial, old, size, ALIGNED=aligned, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    launch.run(
        _update_kernel, (programs,), like, like, rows, runs, partial, old, settings, scale, found, outcome,
        size, partials, clip_norm or math.inf, int(guard), HAS_AVERAGE=bool(tensors.averages), ALIGNED=aligned,
        BLOCK=BLOCK, PARTIALS=PARTIALS, num_warps=4,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*tensors.params, *tensors.averages, *ours.averages])
    reference.average(*others, settings[0, -1])
    return outcome
