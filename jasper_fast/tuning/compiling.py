"""Compiles the Triton kernels of all contenders in parallel processes, before any of them is launched.

The contenders are called on tensors without data, and their launches are recorded. Workers compile each distinct launch
once, as Triton's own launcher would, into Triton's cache on disk. The measuring process finds the kernels there.
Workers need no GPU.
"""

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from jasper_fast.kernels import launch
from jasper_fast.kernels.tables import Cell
from jasper_fast.tuning.faces import Proposal
from jasper_fast.tuning.held import Held

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
    """Returns the kernel launches of a contender on the job's architecture, and those that pack its inputs."""
    held, packing = _held(job.cell, job.proposal.face, job.arch)
    found = [*packing]
    with launch.recorded(found.append, job.arch):
        held.call(job.proposal)()
    return found


@functools.cache
def _held(cell: Cell, face: str, arch: int) -> tuple[Held, list[launch.Launch]]:
    """Returns a cell's inputs for a face, without data, and the launches that pack them. The contenders of a cell share
    them, because making them takes much longer than recording a contender."""
    held, packing = Held(cell, META), []
    with launch.recorded(packing.append, arch):
        held.case(face)
    return held, packing


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
        # TimeoutError: the time is over, or no kernel was finished for SILENCE seconds
        with contextlib.suppress(multiprocessing.TimeoutError):
            while len(built) < len(kinds):
                digest, found = results.next(timeout=max(0.0, min(left(), SILENCE)))
                built[digest] = found
                progress(len(built), len(kinds))
    whole = {key: [built[d] for d in of] for key, of in digests.items() if all(built.get(d) for d in of)}
    return {key: {name: max(facts[name] for facts in of) for name in FACTS} for key, of in whole.items()}
