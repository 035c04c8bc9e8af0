"""Learning-rate schedules against their formulas."""

import math

import pytest

from jasper_fast.training.schedules import POLICIES, Schedule


@pytest.mark.parametrize("policy", POLICIES)
def test_warm_up_and_hold(policy):
    lr = Schedule(0.01, policy, warmup_steps=9, hold_steps=5, steps_per_epoch=7, total_steps=100)
    assert [lr(s) for s in range(9)] == pytest.approx([0.01 * (s + 1) / 10 for s in range(9)])
    assert [lr(s) for s in range(9, 14)] == [0.01] * 5


def test_exponential_steps_once_per_epoch():
    lr = Schedule(0.01, "exponential", warmup_steps=20, hold_steps=30, steps_per_epoch=10, gamma=0.9, min_lr=0.004)
    for epoch in range(5, 40):
        want = max(0.01 * 0.9 ** (epoch + 1 - 5), 0.004)
        assert [lr(epoch * 10 + s) for s in range(10)] == pytest.approx([want] * 10)
    assert lr(10**6) == 0.004


def test_polynomial_and_cosine_end_at_the_floor():
    quadratic = Schedule(1.0, "polynomial", hold_steps=10, total_steps=110, min_lr=1e-3)
    assert quadratic(60) == pytest.approx(0.25)
    assert quadratic(109) == 1e-3  # (1/100) ** 2 lies below the floor
    cosine = Schedule(1.0, "cosine", warmup_steps=10, total_steps=110, min_lr=1e-3)
    assert cosine(60) == pytest.approx(0.5)
    assert cosine(35) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert cosine(110) == cosine(500) == 1e-3


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"policy": "linear"}, "linear"), ({"gamma": 0.0}, "gamma"), ({"warmup_steps": -1}, "warmup"), ({"lr": -1}, "lr")],
)
def test_settings_out_of_range_are_named(settings, word):
    with pytest.raises(ValueError, match=word):
        Schedule(**({"lr": 0.1} | settings))
