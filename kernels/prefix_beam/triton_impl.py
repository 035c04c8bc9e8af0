"""The search in Triton (NVIDIA sm_80 and later; on a CPU through Triton's interpreter): one launch, in fp64.

A program owns an utterance and keeps its beam in registers. The candidates of a frame are a matrix [classes, beam].
Column i has the extensions of prefix i by each symbol, and in the row of the blank the prefix itself. Prefixes are
identified by 63-bit hashes, which also show whether the beam has both a prefix and its parent (the prefix without its
last symbol). If so, the probability of the parent's paths, extended by that symbol, is added to the prefix's.

Each candidate has an integer key. Its upper bits hold the distance of its score from the best score, in steps of at
most 2 ** -39, so closer scores may count as equal. So do all scores that are at least 2048 below the best. The lower
bits hold the candidate's place in the order of reference.py. Bisection finds a threshold that exactly `beam` keys do
not exceed (or all keys, if there are fewer). The place of such a key in the new beam is the number of smaller keys.
Sorting all keys, or comparing all prefixes in one operation, would spill registers.

For each frame and each prefix in the new beam, 4 bytes are stored: the place that the prefix, or the parent that it
extends, had in the old beam, and the new symbol. At the end these are read from the last frame to the first, which
gives the symbols of the best prefixes.

The n-gram is a table here, with 12 bytes for each state and class: what the class adds to the score, and the state that
follows.
"""

import functools
from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from jasper_fast.kernels import launch
from jasper_fast.kernels.prefix_beam.ngram import Ngram
from jasper_fast.kernels.prefix_beam.words import Words

BEAM = 128  # places for prefixes; a narrower beam leaves some of them idle; 256 would spill registers in Triton 3.6
MOST_CLASSES = 32  # a set of symbols is stored in the bits of an int32
MOST_TABLE = 4 << 30  # maximum size of the n-gram's table in bytes
STAY = tl.constexpr(63)  # stored instead of a symbol if the prefix did not change
NEVER = tl.constexpr(-inf)
PART = tl.constexpr(16)  # each iteration compares every prefix of the beam with this many others
# The hash of the empty prefix, and the factor by which hashes are mixed: bits of pi and of the golden ratio.
FIRST, SPREAD = tl.constexpr(0x243F6A8885A308D3), tl.constexpr(-0x61C8864680B583EB)


@triton.jit
def _add(a, b):
    """log(e^a + e^b)."""
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    gap = tl.where(low == NEVER, 0.0, low) - tl.where(low == NEVER, 0.0, high)
    return tl.where(low == NEVER, high, high + tl.log(1.0 + tl.exp(gap)))


@triton.jit
def _keys(score, order, BITS: tl.constexpr):
    """Returns the key of each candidate, and the key of those that do not exist, which is larger than all others.

    The upper bits of a key hold the distance of the score from the best score. The lower BITS bits hold `order`.
    """
    none: tl.constexpr = 1 << 62
    limit: tl.constexpr = float((1 << (62 - BITS)) - 1)
    there = score > NEVER
    best = tl.max(tl.max(tl.where(there, score, -1e300), 1), 0)
    below = tl.where(there, best - tl.where(there, score, 0.0), 0.0)
    fixed = tl.minimum(below * (1 << (51 - BITS)), limit).to(tl.int64)
    return tl.where(there, (fixed << BITS) | order, none), none


@triton.jit
def _beam(keys, beam, none, at, scratch_ptr, BLOCK_B: tl.constexpr):
    """Returns the `beam` smallest keys in ascending order; `none` takes the places of missing keys."""
    low = tl.full([], -1, tl.int64)
    high = tl.full([], none - 1, tl.int64)
    found = tl.sum(tl.sum((keys <= high).to(tl.int32), 1), 0)
    while found > beam:  # the loop ends, because no two keys are equal
        middle = low + (high - low) // 2
        below = tl.sum(tl.sum((keys <= middle).to(tl.int32), 1), 0)
        low = tl.where(below >= beam, low, middle)
        high = tl.where(below >= beam, middle, high)
        found = tl.where(below >= beam, below, found)
    chosen = (keys <= high).to(tl.int32)
    each = tl.sum(chosen, 1)
    place = (tl.cumsum(each, 0) - each)[:, None] + tl.cumsum(chosen, 1) - 1
    tl.store(scratch_ptr + place, keys, mask=chosen > 0)
    tl.debug_barrier()
    some = tl.load(scratch_ptr + at, mask=at < found, other=none)
    rank = tl.zeros([BLOCK_B], tl.int32)
    for first in range(0, beam, PART):
        others = first + tl.arange(0, PART)
        other = tl.load(scratch_ptr + others, mask=others < found, other=none)
        rank += tl.sum((other[:, None] < some[None, :]).to(tl.int32), 0)
    tl.store(scratch_ptr + BLOCK_B + rank, some, mask=at < found)
    tl.debug_barrier()
    return tl.load(scratch_ptr + BLOCK_B + at, mask=at < found, other=none)


@triton.jit
def _meetings(name, parent, last, at, beam, scratch_ptr, BLOCK_B: tl.constexpr):
    """Returns two numbers for each prefix, which link it to other prefixes in the beam.

    The first has bit s set if the prefix, extended by symbol s, is in the beam. The second is the place of the prefix's
    parent in the beam, or -1 if the parent is not in it.
    """
    tl.store(scratch_ptr + at, name)
    tl.store(scratch_ptr + BLOCK_B + at, parent)
    tl.store(scratch_ptr + 2 * BLOCK_B + at, tl.full([BLOCK_B], 1, tl.int64) << tl.maximum(last, 0).to(tl.int64))
    tl.debug_barrier()
    taken, place = tl.zeros([BLOCK_B], tl.int32), tl.zeros([BLOCK_B], tl.int32)
    for first in range(0, beam, PART):
        others = first + tl.arange(0, PART)
        names, parents = tl.load(scratch_ptr + others), tl.load(scratch_ptr + BLOCK_B + others)
        bits = tl.load(scratch_ptr + 2 * BLOCK_B + others).to(tl.int32)
        taken += tl.sum(tl.where(parents[:, None] == name[None, :], bits[:, None], 0), 0)
        place += tl.sum(tl.where(names[:, None] == parent[None, :], others[:, None] + 1, 0), 0)
    tl.debug_barrier()
    return taken, place - 1


@triton.jit
def _prefix_beam_kernel(
    log_probs_ptr, lengths_ptr, gain_ptr, next_ptr, scratch_ptr, back_ptr, symbols_ptr, counts_ptr, scores_ptr,
    frames, beam, n_best, start, CLASSES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + item).to(tl.int32)
    log_probs_ptr += item * frames * CLASSES
    back_ptr += item * frames * BLOCK_B
    scratch_ptr += item * 6 * BLOCK_B
    at, c = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_V)
    stays: tl.constexpr = CLASSES - 1  # the number of symbols; also the matrix row of the prefix itself
    nothing = tl.full([BLOCK_B], NEVER, tl.float64)
    b, n, bonus = tl.where(at == 0, 0.0, nothing), nothing, tl.zeros([BLOCK_B], tl.float64)
    total = b
    name = tl.where(at == 0, FIRST, (-1 - at).to(tl.int64))  # hashes of prefixes; negative where there is no prefix
    parent = tl.full([BLOCK_B], -(1 << 40), tl.int64)
    last, state = tl.full([BLOCK_B], -1, tl.int32), tl.zeros([BLOCK_B], tl.int32) + start
    tl.store(scratch_ptr + 5 * BLOCK_B + at, at.to(tl.int64))
    for t in range(length):
        row_ptr = log_probs_ptr + t * CLASSES
        row = tl.load(row_ptr + c, mask=c < stays, other=NEVER)
        again = tl.load(row_ptr + last, mask=last >= 0, other=NEVER).to(tl.float64)
        # paths from a prefix to another one in the beam that is one symbol longer
        taken, source = _meetings(name, parent, last, at, beam, scratch_ptr + 2 * BLOCK_B, BLOCK_B)
        met, source = source >= 0, tl.maximum(source, 0)
        repeats = tl.gather(last, source, 0) == last
        paths = tl.where(repeats, tl.gather(b, source, 0), tl.gather(total, source, 0))
        stay_b = total + tl.load(row_ptr + stays).to(tl.float64)
        stay_n = tl.where(met, _add(n + again, paths + again), n + again)
        stay_total = _add(stay_b, stay_n)
        # all candidates
        column = c[:, None]
        # column * 3 - column * 2 hides from the compiler that a state's classes are neighbours in memory. Otherwise it
        # would spread them over the lanes of a warp, each thread would hold many prefixes, and registers would spill.
        place = state[None, :].to(tl.int64) * CLASSES + (column * 3 - column * 2)
        gain = tl.load(gain_ptr + place, mask=column < stays, other=0.0)
        longer = tl.where(last[None, :] == column, b[None, :], total[None, :]) + row[:, None].to(tl.float64)
        free = (column < stays) & (((taken[None, :] >> column) & 1) == 0)
        score = tl.where(free, longer + (bonus[None, :] + gain), NEVER)
        score = tl.where(column == stays, (stay_total + bonus)[None, :], score)
        # loaded in each frame, so that the compiler does not compute `order` before the loop and keep it in registers
        mine = tl.load(scratch_ptr + 5 * BLOCK_B + at).to(tl.int32)[None, :]
        order = tl.where(column == stays, mine, BLOCK_B + mine * stays + column).to(tl.int64)
        keys, none = _keys(score, order, BITS)
        key = _beam(keys, beam, none, at, scratch_ptr, BLOCK_B)
        alive, chosen = key < none, (key & ((1 << BITS) - 1)).to(tl.int32)
        # the beam of the next frame
        chosen = tl.where(alive, chosen, 0)
        stay, pair = chosen < BLOCK_B, tl.maximum(chosen - BLOCK_B, 0)
        i, symbol = tl.where(stay, chosen, pair // stays), tl.where(stay, 0, pair % stays)
        before, context = tl.gather(last, i, 0), tl.gather(state, i, 0)
        paths = tl.where(before == symbol, tl.gather(b, i, 0), tl.gather(total, i, 0))
        paths += tl.load(row_ptr + symbol).to(tl.float64)
        place = context.to(tl.int64) * CLASSES + symbol
        had = tl.gather(bonus, i, 0)
        bonus = tl.where(stay, had, had + tl.load(gain_ptr + place))
        b = tl.where(stay, tl.gather(stay_b, i, 0), NEVER)
        n = tl.where(stay, tl.gather(stay_n, i, 0), paths)
        total = tl.where(stay, tl.gather(stay_total, i, 0), paths)
        b, n, total = tl.where(alive, b, NEVER), tl.where(alive, n, NEVER), tl.where(alive, total, NEVER)
        state = tl.where(stay, context, tl.load(next_ptr + place))
        last = tl.where(stay, before, symbol)
        old = tl.gather(name, i, 0)
        mixed = (old ^ ((symbol + 1).to(tl.int64) * SPREAD)) * SPREAD
        mixed = (mixed ^ (mixed >> 29)) & 0x7FFFFFFFFFFFFFFF
        parent = tl.where(stay, tl.gather(parent, i, 0), old)
        parent = tl.where(alive, parent, -(1 << 40))
        name = tl.where(alive, tl.where(stay, old, mixed), (-1 - at).to(tl.int64))
        tl.store(back_ptr + t * BLOCK_B + at, i * 64 + tl.where(stay, STAY, symbol))
    # Adds what the end of the text adds, ranks again, and traces the best prefixes back from their last symbol.
    end = tl.load(gain_ptr + state.to(tl.int64) * CLASSES + stays)
    score = tl.where(total > NEVER, total + bonus + end, NEVER)
    keys, none = _keys(score[None, :], at[None, :].to(tl.int64), BITS)
    key = _beam(keys, beam, none, at, scratch_ptr, BLOCK_B)  # its barriers also make the stores to back_ptr visible
    alive, shown = key < none, at < n_best
    chosen = tl.where(alive, (key & ((1 << BITS) - 1)).to(tl.int32), 0)
    score = tl.where(alive, tl.gather(score, chosen, 0), NEVER)
    total = tl.gather(total, chosen, 0)
    count, slot = tl.zeros([BLOCK_B], tl.int32), chosen
    for k in range(length):
        code = tl.load(back_ptr + (length - 1 - k) * BLOCK_B + slot, mask=shown & alive, other=STAY)
        count += tl.where(code % 64 == STAY, 0, 1)
        slot = code // 64
    symbols_ptr += (item * n_best + at) * frames
    place, slot = count, chosen
    for k in range(length):
        code = tl.load(back_ptr + (length - 1 - k) * BLOCK_B + slot, mask=shown & alive, other=STAY)
        said = code % 64 != STAY
        place -= said.to(tl.int32)
        tl.store(symbols_ptr + place, code % 64, mask=said & shown & alive)
        slot = code // 64
    tl.store(counts_ptr + item * n_best + at, tl.where(alive, count, -1), mask=shown)
    scores_ptr += (item * n_best + at) * 2
    tl.store(scores_ptr, score, mask=shown)
    tl.store(scores_ptr + 1, tl.where(alive, total, NEVER), mask=shown)


def why_not(classes: int, beam: int, lm: Ngram | None, words: Words | None) -> str | None:
    """Returns why this face cannot do a search, or None if it can."""
    if words is not None:
        return "it searches no words; the cpu face does"
    if beam > BEAM or classes > MOST_CLASSES:
        return f"it takes at most beam {BEAM} and {MOST_CLASSES} classes, not {beam} and {classes}"
    if lm and (size := len(lm.lower) * classes * 12) > MOST_TABLE:
        return f"the table of the n-gram would take {size / 2**30:.1f} GiB, more than {MOST_TABLE >> 30} GiB"
    return None


@functools.lru_cache(1)
def table(
    lm: Ngram | None, classes: int, alpha: float, beta: float, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Returns two tables over (state, class) and the first state. The tables have what the class adds to the score,
    (S, V) fp64, and the state that follows, (S, V) int32."""
    if lm is None:
        gain = torch.full((1, classes), beta, dtype=torch.float64, device=device)
        gain[:, -1] = 0.0
        return gain, torch.zeros(1, classes, dtype=torch.int32, device=device), 0
    states, lower = len(lm.lower), lm.lower.long()
    log10 = torch.zeros(states, classes, dtype=torch.float64)
    after = torch.zeros(states, classes, dtype=torch.int32)
    depth = torch.zeros(states, dtype=torch.int32)
    while not torch.equal(deeper := torch.where(torch.arange(states) > 0, depth[lower] + 1, 0).int(), depth):
        depth = deeper
    of = torch.repeat_interleave(torch.arange(states), lm.arc_begin.diff())
    for level in range(int(depth.max()) + 1):
        here = (depth == level).nonzero().flatten()
        if level:
            log10[here] = lm.back_off[here, None].double() + log10[lower[here]]
            after[here] = after[lower[here]]
        arcs = (depth[of] == level).nonzero().flatten()
        log10[of[arcs], lm.arc_symbol[arcs].long()] = lm.arc_log10[arcs].double()
        after[of[arcs], lm.arc_symbol[arcs].long()] = lm.arc_next[arcs]
    gain = alpha * log10
    gain[:, :-1] += beta
    return gain.to(device), after.to(device), lm.start


def search(
    log_probs: Tensor,
    lengths: Tensor,
    beam: int,
    n_best: int,
    lm: Ngram | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    words: Words | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `reference.search` does, on the device of log_probs. ``lm`` is on the CPU.

    log_probs are converted to fp32. The newest table is kept for later calls with the same ``lm``, alpha and beta.
    Raises ValueError for a search that ``why_not`` rejects.
    """
    count, frames, classes = log_probs.shape
    if why := why_not(classes, beam, lm, words):
        raise ValueError(f"prefix_beam (triton): {why}")
    log_probs, device = log_probs.float().nan_to_num(-inf, inf, -inf).contiguous(), log_probs.device
    gain, after, start = table(lm, classes, alpha, beta, device)
    block_v = triton.next_power_of_2(classes)
    symbols = torch.zeros(count, n_best, frames, dtype=torch.int32, device=device)
    counts = torch.full((count, n_best), -1, dtype=torch.int32, device=device)
    scores = torch.full((count, n_best, 2), -inf, dtype=torch.float64, device=device)
    back = torch.empty(count, frames, BEAM, dtype=torch.int32, device=device)
    scratch = torch.empty(count, 6, BEAM, dtype=torch.int64, device=device)
    launch.run(
        _prefix_beam_kernel, (count,), log_probs, log_probs, lengths.long().contiguous().to(device), gain, after,
        scratch, back, symbols, counts, scores, frames, beam, n_best, start, CLASSES=classes, BLOCK_B=BEAM,
        BLOCK_V=block_v, BITS=(BEAM * block_v).bit_length() - 1, num_warps=BEAM // 32,  # one thread per prefix
    )  # fmt: skip
    return symbols, counts, scores
