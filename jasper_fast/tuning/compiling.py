"""Compiles the Triton kernels of all contenders in parallel processes, before any of them is launched.

The contenders are called on tensors without data, and their launches are recorded. Workers compile each distinct launch
once, as Triton's own launcher would, into Triton's cache on disk. The measuring process finds the kernels there.
Workers need no GPU.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from jasper_fast.dispatch import backends
from jasper_fast.kernels import launch, tables
from jasper_fast.kernels.operands import Geometry, Lengths, Mask, Norm
from jasper_fast.kernels.tables import Cell
from jasper_fast.selfcheck.checks import DTYPES
from jasper_fast.tuning.faces import Proposal
from jasper_fast.tuning.held import NORM_FUNCTIONS, is_decoder

META = torch.device("meta")
SILENCE = 60.0  # seconds to wait for the next compiled kernel before giving up
FACTS = ("registers", "shared", "spilled")
Facts = dict[str, int]


class Job(NamedTuple):
    """A contender to compile, in a form that can be sent to a worker."""

    cell: Cell
    proposal: Proposal
    arch: int


def launches(job: Job) -> list[launch.Launch]:
    """Returns the kernel launches of a contender on the job's architecture."""
    found: list[launch.Launch] = []
    tile, op = job.proposal.tile, job.cell.op
    forced = tables.forced(op, tile, job.proposal.face) if tile else contextlib.nullcontext()
    with launch.recorded(found.append, job.arch), forced:
        _call(job.cell)
    return found


def _call(cell: Cell) -> None:
    """Calls the cell's op on tensors without data, with the arguments that `Held` uses."""
    (n, frames), dtype = cell.batch, DTYPES[cell.dtype]
    t, lengths = frames * cell.stride, torch.empty(n, dtype=torch.int64, device=META)
    ntc = lambda c, t: torch.empty(n, t, c, dtype=dtype, device=META).transpose(1, 2)  # noqa: E731
    norm = Norm(*(torch.empty(cell.c_in, device=META) for _ in range(4)))
    zeroed = Mask(lengths, lengths[:1], 0.2)
    if cell.op in NORM_FUNCTIONS:
        bn, y = backends.face("bn_relu_dropout", "triton"), ntc(cell.c_in, frames)
        if NORM_FUNCTIONS[cell.op] == "backward":
            bn.backward_reduce(y, y, None, norm, zeroed)
            bn.backward_apply(y, y, None, norm, norm[:2], zeroed, False, 2)
        else:
            bn.stats(y)
            bn.forward(y, norm, None, zeroed)
        return
    conv = backends.face("conv1d", "triton")
    how = Geometry(cell.stride, (cell.taps // 2) * cell.dilation, cell.dilation)
    x, weight = ntc(cell.c_in, t), torch.empty(cell.c_out, cell.c_in, cell.taps, device=META)
    dy = ntc(cell.c_out, how.frames(t, cell.taps))
    if cell.op == "conv1d.fused":
        more = {"log_softmax": True} if is_decoder(cell) else {"workspace": conv.Workspace(META)}
        more |= {"bias": torch.empty(cell.c_out, device=META), "relu": not is_decoder(cell), "clean": True}
        conv.fused(x.transpose(1, 2), conv.pack(weight, dtype), how, lengths=Lengths(lengths, lengths), **more)
        return
    arguments = {
        "conv1d.dgrad": (dy, weight, t, how, lengths),
        "conv1d.dgrad_bn": (dy, weight, how, x, x, norm, zeroed),
        "conv1d.wgrad": (x, dy, cell.taps, how, lengths, torch.float32, True),
    }
    getattr(conv, cell.op.removeprefix("conv1d."))(*arguments.get(cell.op, (x, weight, how, lengths, None, True)))


def build(what: tuple[str, Job, int]) -> tuple[str, Facts]:
    """Compiles one launch in a worker. `what`: the launch's digest, the job, and the launch's index in the job.

    Returns the digest and the facts: registers, shared memory and spilled bytes of the kernel. If the kernel does not
    compile, there are no facts.
    """
    from jasper_fast.kernels import aot

    digest, job, place = what
    try:
        built = aot.compile_for(aot.source(launches(job)[place], job.arch), job.arch)
    except Exception:  # the tuner compiles the contender again, and reports the compiler's error then
        return digest, {}
    return digest, {name: getattr(built, name) for name in FACTS}


def ahead(
    jobs: Iterable[Job], progress: Callable[[int, int], None], left: Callable[[], float]
) -> dict[tuple[Cell, str], Facts]:
    """Compiles `jobs` in parallel processes for at most `left()` seconds. Equal launches are compiled once.

    Returns the facts of each contender, by cell and name: the largest number of registers, shared bytes and spilled
    bytes among its kernels. A contender with a kernel that did not compile, or not in time, is left out of the result.
    `progress(done, of)` is called after each kernel.
    """
    from jasper_fast.kernels import aot

    digests: dict[tuple[Cell, str], list[str]] = {}
    kinds: dict[str, tuple[Job, int]] = {}
    for job in jobs:
        of_job = [aot.source(one, job.arch).digest(job.arch) for one in launches(job)]
        digests[job.cell, job.proposal.name(job.cell)] = of_job
        for place, digest in enumerate(of_job):
            kinds.setdefault(digest, (job, place))
    built: dict[str, Facts] = {}
    cores = len(os.sched_getaffinity(0)) - 1  # one core is left to the measuring process
    with multiprocessing.get_context("spawn").Pool(max(1, min(16, cores, len(kinds)))) as pool:
        results = pool.imap_unordered(build, [(digest, *what) for digest, what in kinds.items()])
        with contextlib.suppress(multiprocessing.TimeoutError):  # no time left, or a compiler crashed its worker
            while len(built) < len(kinds):
                digest, found = results.next(timeout=max(0.0, min(left(), SILENCE)))
                built[digest] = found
                progress(len(built), len(kinds))
    whole = {key: [built[d] for d in of] for key, of in digests.items() if all(built.get(d) for d in of)}
    return {key: {name: max(facts[name] for facts in of) for name in FACTS} for key, of in whole.items()}
