"""The operands of `step`: lists with one entry per parameter that has a gradient (`Tensors`), tensors that are only
averaged (`Watched`), and the settings of the parameter groups (`Settings`)."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """Lists of equal length. Gradients, moments and averages have the memory order of their parameter, without gaps.

    exp_avg_sqs are one-element tensors, fp32 or wider. `averages` is empty without a moving average. The settings have
    one row per parameter group; `groups[i]` is the number of the row that applies to parameter i.
    """

    grads: list[Tensor]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    averages: list[Tensor]
    groups: list[int]


class Watched(NamedTuple):
    """Tensors that the step only averages, such as running statistics, and their averages.

    Floating-point tensors are averaged, others are copied. Both lists are empty without a moving average.
    """

    lives: list[Tensor]
    averages: list[Tensor]

    def split(self, dtypes: tuple[torch.dtype, ...]) -> tuple[Self, Self]:
        """Returns the pairs that are contiguous and whose average has one of `dtypes`, and the other pairs."""
        parts = Watched([], []), Watched([], [])
        for live, average in zip(*self, strict=True):
            mine = average.dtype in dtypes and live.is_contiguous() and average.is_contiguous()
            parts[not mine].lives.append(live)
            parts[not mine].averages.append(average)
        return parts


class Settings(NamedTuple):
    """The columns of the settings, fp64 (groups, 8), named as in the formulas of this package.

    `rest2` is 1 - beta2 and `decay` is share*weight_decay. `weight` is 1 minus the decay of the moving average; it is
    the same in all rows.
    """

    lr: float
    beta1: float
    share: float
    beta2: float
    rest2: float
    eps: float
    decay: float
    weight: float
