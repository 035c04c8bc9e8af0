"""Batch statistics over all ranks of a process group, as nn.SyncBatchNorm defines them, without waiting for the device.

Ranks may have different numbers of rows, so the number is sent with the statistics and stays on the device. Every rank
must call the same functions in the same order. An op gets its group by name, because a registered op takes no group
objects.

torch.compile keeps these ops, but Inductor reorders them to save memory, and the order depends on tensor sizes. If
batches differ in shape between ranks, compile with options={"reorder_for_peak_memory": False}, which keeps the order.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def group_of(bn: nn.Module) -> dist.ProcessGroup | None:
    """Returns the process group whose ranks share the batch statistics of `bn`; None if this rank has its own.

    Ranks share them if `bn` is an nn.SyncBatchNorm (see nn.SyncBatchNorm.convert_sync_batchnorm) and torch.distributed
    runs with more than one rank. Only the module's parameters and group are used, because its forward rejects CPU
    tensors.
    """
    if not (isinstance(bn, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def name(group: dist.ProcessGroup | None) -> str:
    """Returns the name under which the functions here find `group`; "" for None."""
    return "" if group is None else group.group_name


def _find(name: str) -> dist.ProcessGroup:
    """Returns the group with that name from PyTorch's registry.

    A registry of our own might still be empty when a compiled graph runs.
    """
    return dist.distributed_c10d._resolve_process_group(name)


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Returns the sum of `x` over the ranks of `group`, in place. Returns `x` unchanged if `group` is ""."""
    if group:
        dist.all_reduce(x, group=_find(group))
    return x


def merge_stats(mean: Tensor, m2: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Merges each rank's `mean` (C,) and `m2` (C,) over its `count` rows (Chan's formula). Returns (mean, M2, rows).

    rows, the number of rows of all ranks, is a 0-d tensor. Ranks are merged in order, so the result is bit-identical on
    every rank.
    """
    mine, found = torch.cat([mean, m2, mean.new_full((1,), count)]), _find(group)
    if count == 0:  # the statistics of no rows are NaN
        mine.zero_()
    ranks = mine.new_empty(dist.get_world_size(found) * mine.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.11 has only the latter
    gather(ranks, mine, group=found)
    ranks, c = ranks.view(-1, mine.numel()), mean.numel()
    means, counts = ranks[:, :c], ranks[:, -1:]
    total = counts.sum()
    mean = (means * (counts / total)).sum(0)
    m2 = (ranks[:, c:-1] + counts * (means - mean).square()).sum(0)
    return mean, m2, total


def merge_covariance(
    mean: Tensor, cov: Tensor, count: int, group: str, form: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges each rank's mean and covariance over its `count` rows. Returns (mean (C,), covariance, rows (0-d)).

    form: turns a symmetric matrix (C, C) into the form in which `cov` is stored.
    """
    if count == 0:  # the statistics of no rows are NaN
        mean, cov = torch.zeros_like(mean), torch.zeros_like(cov)
    sums = all_reduce(torch.cat([mean * count, mean.new_full((1,), count)]), group)
    total = sums[-1]
    merged = sums[:-1] / total
    apart = mean - merged
    return merged, all_reduce((cov + form(torch.outer(apart, apart))) * (count / total), group), total.clone()
