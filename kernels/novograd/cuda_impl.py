"""The CUDA face of NovoGrad: C++ kernels (csrc/cuda) in fp32, for sm_75 and later, on the current stream.

A step is two launches; csrc/cuda/novograd.cuh describes them. Sums are made in a fixed order, so runs are
bit-identical.
"""

import math

import torch
from torch import Tensor

from jasper_fast.kernels import nvrtc
from jasper_fast.kernels.novograd import cuda_launch, reference, table
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

    All tensors in `tensors` are fp32. held: a dict that the caller keeps between steps; the table is stored in it.
    """
    ours, others = watched.split((torch.float32, torch.int64))
    rows, runs, size, partials, programs, _ = table.keep(tensors, ours, settings.device, held)
    like = tensors.params[0]
    partial, old, outcome = like.new_empty(partials), like.new_empty(len(rows)), like.new_empty(2)
    scale, found = (x if x is None else x.float() for x in (grad_scale, found_inf))
    places = (
        None if x is None else x.data_ptr() for x in (rows, runs, like, partial, old, settings, scale, found, outcome)
    )
    args = cuda_launch.Args(*places, size, partials, clip_norm or math.inf, guard, bool(tensors.averages))
    functions = cuda_launch.functions()
    with nvrtc.device_of(like) as stream:
        for launch, grid in ((functions.jf_novograd_squares, partials), (functions.jf_novograd_update, programs)):
            if (error := launch(stream, grid, args)) is not None:
                raise RuntimeError(f"novograd (cuda): {error.decode()}")
    torch.autograd.graph.increment_version([*tensors.params, *tensors.averages, *ours.averages])
    reference.average(*others, settings[0, -1])
    return outcome
