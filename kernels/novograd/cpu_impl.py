"""The CPU face of NovoGrad in fp32: threaded C++ kernels (csrc/cpu) that pick their vector instructions at run time.

Sums of squares are fp64 and merged in a fixed order, so results are bit-identical for any number of threads.
"""

import torch
from torch import Tensor

from jasper_fast.kernels import native
from jasper_fast.kernels.novograd import reference
from jasper_fast.kernels.novograd.operands import Tensors, Watched


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

    All tensors in `tensors` are fp32. held: not used.
    """
    outcome = torch.empty(2)
    ours, others = watched.split((torch.float32,))
    groups = torch.tensor(tensors.groups, dtype=torch.int64)
    native.cpu().novograd_step(*tensors[:-1], groups, *ours, settings, grad_scale, found_inf, clip_norm, guard, outcome)
    torch.autograd.graph.increment_version([*tensors.params, *tensors.averages, *ours.averages])
    reference.average(*others, settings[0, -1])
    return outcome
