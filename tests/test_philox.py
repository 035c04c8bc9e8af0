"""Philox gives its published known answers, and dropout bits follow the rule that all faces share."""

import itertools
import math

import pytest
import torch

from jasper_fast.kernels import philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, answer):
    assert tuple(map(int, philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key))) == answer


def test_words_split_counter_and_seed_in_halves():
    start, seed = (7 << 32) - 1, -(5 << 32) + 3  # the upper halves of the two counters differ; the seed is negative
    got = philox.words(start, 2, torch.tensor([seed]))
    key = (seed & ONES, (seed >> 32) & ONES)
    for row, c in zip(got, (start, start + 1), strict=True):
        want = philox.philox4x32(tuple(map(torch.tensor, (c & ONES, c >> 32, 0, 0))), key)
        assert row.tolist() == list(map(int, want))
    assert torch.equal(got, philox.words(start, 2, seed))


def test_keep_mask_follows_the_counter_rule():
    n, c, t, p, seed = 2, 5, 3, 0.3, 1234
    keep = philox.keep_mask(n, c, t, p, seed)
    drawn = philox.words(0, 8, seed)
    for i, j, k in itertools.product(range(n), range(c), range(t)):
        e = (i * t + k) * c + j
        assert bool(keep[i, j, k]) == (int(drawn[e // 4, e % 4]) >= p * 2**32)


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
def test_keep_rate_and_independence_of_seeds(p):
    keep, other = (philox.keep_mask(4, 64, 500, p, seed).double() for seed in (1, 2))
    for kept, rate in ((keep, 1 - p), (keep * other, (1 - p) ** 2)):
        assert abs(kept.mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / kept.numel())


def test_threshold_is_exact_and_bounded():
    assert [philox.threshold(p) for p in (0.0, 0.1, 0.5)] == [0, math.ceil(0.1 * 2**32), 2**31]
    for p in (-0.1, 1.0, 1 - 2.0**-40, float("nan")):
        with pytest.raises(ValueError, match="dropout p"):
            philox.threshold(p)
