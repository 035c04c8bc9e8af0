"""Learning-rate schedules against their formulas."""

import argparse
import math

import pytest

from jasper_fast.training import options
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


def described(policy: str, steps_per_epoch: int, extra: int = 0, **given) -> Schedule:
    """Returns the schedule of a run of 20 epochs: two of warm-up, one at the peak rate, and 17 of decay. `given`
    replaces options."""
    settings = {
        "lr": 0.1, "min_lr": 0.0, "lr_power": 2.0, "lr_gamma": 0.9, "epochs": 20, "steps": None,
        "warmup_epochs": 2.0, "warmup_steps": None, "hold_epochs": 1.0, "hold_steps": None,
    }  # fmt: skip
    return options.make_schedule(argparse.Namespace(lr_policy=policy, **(settings | given)), steps_per_epoch, extra)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("before", "after"), [(8, 2), (2, 8)])
@pytest.mark.parametrize("epoch", [1, 2, 3, 9])
def test_a_change_of_batches_after_an_epoch_leaves_the_rate_to_the_epoch(policy, before, after, epoch):
    extra = epoch * (before - after)
    resumed, whole = described(policy, after, extra), described(policy, after)
    assert resumed.total_steps == 20 * after + extra
    rates = [resumed(step + extra) for step in range(epoch * after, 20 * after)]
    assert rates == pytest.approx([whole(step) for step in range(epoch * after, 20 * after)])


@pytest.mark.parametrize("policy", ["polynomial", "cosine"])
def test_a_schedule_in_steps_does_not_depend_on_the_batches(policy):
    given = {"steps": 100, "warmup_steps": 10, "hold_steps": 5}
    before, after = described(policy, 8, **given), described(policy, 2, extra=54, **given)
    assert [before(step) for step in range(100)] == [after(step) for step in range(100)]
    exponential = described("exponential", 8, extra=-60, **given)
    assert max(exponential(step) for step in range(100)) == 0.1
