"""How does a training step scale over processes? `torchrun --nproc-per-node 8 -m jasper_fast.bench train`.

The step is measured with n = 1, 2, 4, ... of the processes, each with its own batch. A row has the rate (utterances
per second of all n processes), the efficiency, and the exposed communication. The efficiency is rate / (n * rate of a
single process). The exposed communication is the time of a step minus the time of the same step without an exchange of
gradients (DDP's no_sync). Steps with and without the exchange are timed in turns. The time of a step is that of the
slowest process.
"""

import argparse
import contextlib
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from jasper_fast.bench.cases import counts, models, scaling
from jasper_fast.bench.commands import train
from jasper_fast.bench.harness import devices, ratios
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.measurement import Row
from jasper_fast.bench.harness.run import Run
from jasper_fast.kernels import tables

SAMPLE = 0.2  # seconds that the consecutive steps of one sample should take together
WARM = 3  # steps before the timing; in the second one DDP rebuilds its buckets


@dataclass
class Team:
    """The rank of this process, and the numbers of processes to measure with, one after another."""

    rank: int
    sizes: tuple[int, ...]


def grouped() -> bool:
    """Whether torchrun started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def sizes(text: str) -> tuple[int, ...]:
    """Reads "1,2,4" as (1, 2, 4). 1 is always included, because the efficiency needs it."""
    try:
        found = {int(word) for word in text.split(",")}
    except ValueError:
        found = {0}
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of processes such as 1,2,4")
    return tuple(sorted(found | {1}))


def check_options(args: argparse.Namespace) -> None:
    """Raises SystemExit for an option of `train` that the measurement with several processes would ignore."""
    for option, given, measured in (("--mode", args.mode or "step", "step"), ("--rivals", args.rivals, "default")):
        if given != measured:
            raise SystemExit(f"{option} {given}: several processes measure only the full step of jasper_fast and eager")


def launch(arguments: Sequence[str], world: int) -> int:
    """Runs the same command in `world` processes on this machine; returns the exit status of the process that failed
    first, or 130 after Ctrl-C. Raises KeyboardInterrupt if Ctrl-C comes before it has started them."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--standalone", "--nproc-per-node", str(world), "-m", "jasper_fast.bench", *arguments])
    except SignalException:  # the first of the processes has said what is saved
        return 130
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return error.get_first_failure()[1].exitcode
    return 0


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[Team]:
    """A context in which this process belongs to the process group, with nccl on GPUs and gloo on CPUs.

    Each process gets the GPU of its local rank, unless `--device` is cpu or names one GPU.
    """
    rank, world, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available() and (args.device or "cuda") == "cuda":
        args.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    wanted = args.world or (*(2**i for i in range(world) if 2**i < world), world)
    if max(wanted) > world:
        raise SystemExit(f"--world {max(wanted)}: torchrun started {world} processes")
    on_gpu = torch.device(args.device or "cpu").type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=1))
    try:
        yield Team(rank, wanted)
        dist.barrier()  # the first process serves the group's store, so it must not end before the others
    finally:
        dist.destroy_process_group()


def main(
    team: Team,
    grid: Sequence[tuple[str, int, int]],
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    run: Run | None,
) -> None:
    """Measures each (model, N, T) of the grid, which is the same in every process.

    Only the first process has a `run`, and it writes the rows.
    """
    grid = grid or (train.GPU_GRID[:1] if device.type == "cuda" else train.CPU_GRID[:1])
    groups = {w: dist.new_group(list(range(w))) for w in team.sizes if w > 1}
    seconds = _all(dist.group.WORLD, run and run.effort.seconds)[0]  # those of the first process
    for model, N, T in grid:
        for contender in (scaling.OURS, scaling.EAGER):
            at = scaling.Setting(model, N, T, device, dtype, backend)
            alone = 0.0
            for world in team.sizes:
                row = _begin_row(at, contender, world)
                measured = run and run.results.has(row["id"].rsplit(" / ", 1)[0], (contender,))
                if _all(dist.group.WORLD, measured)[0]:
                    kept = run.results.data["rows"] if run else ()
                    alone = alone or next((r.get("items_per_s", 0.0) for r in kept if r["id"] == row["id"]), 0.0)
                    continue
                if run:
                    console.print(f"train {model}: {contender}, {world} process{'es' * (world > 1)}")
                if team.rank < world:
                    made = _measured(contender, at, team.rank, groups.get(world), seconds)
                    if run:
                        alone = alone or N / statistics.median(made["shared"])
                        run.results.add([_finish(row, made, N, alone)])
                dist.barrier()
                devices.tidy(device)


def _measured(
    contender: str, at: scaling.Setting, rank: int, group: dist.ProcessGroup | None, seconds: float
) -> dict[str, Any]:
    """Returns samples of the seconds of a step with exchange of gradients (`shared`) and without (`silent`).

    Each sample is that of the slowest process. If the gradients are wrong, only the reason is returned, as `wrong`.
    """
    found = scaling.steps(contender, at, rank, group)
    if wrong := next(filter(None, _all(group, found.wrong())), ""):
        return {"wrong": wrong}
    for each in (found.shared, found.silent):
        for _ in range(WARM):
            each()
    inner = max(1, round(SAMPLE / max(_all(group, _sample(found.shared, 1, at.device, group)))))
    samples: dict[str, list[float]] = {"shared": [], "silent": []}
    kinds, begun = ["shared", "silent"] if group else ["shared"], time.monotonic()
    while True:
        for kind in kinds:
            samples[kind].append(_sample(getattr(found, kind), inner, at.device, group))
        kinds.reverse()  # A B, B A, ..., so that neither always runs after the other
        done, spent = len(samples["shared"]), time.monotonic() - begun
        if _all(group, done >= 300 or (spent > seconds and done >= 6) or spent > 9 * seconds)[0]:
            break
    return {kind: [max(each) for each in zip(*_all(group, mine))] for kind, mine in samples.items()} | {"inner": inner}


def _all(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Returns the values of all processes of the group, on every process."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _sample(step: Callable[[], None], inner: int, device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Returns the mean seconds of `inner` steps, which all processes begin together."""
    if group is not None:
        dist.all_reduce(torch.zeros(1), group=group)  # the processes wait for each other, on the host
    devices.synchronize(device)
    started = time.perf_counter()
    for _ in range(inner):
        step()
    devices.synchronize(device)
    return (time.perf_counter() - started) / inner


def _begin_row(at: scaling.Setting, contender: str, world: int) -> Row:
    """Returns the fields that a row has before it is measured. FLOPs and bytes are those of one process."""
    cfg, name = models.config(at.model), tables.DTYPES[at.dtype]
    key = {
        "model": at.model, "batch": f"({at.N}, {cfg.encoder.in_feats}, {at.T})", "dtype": name, "mode": "step",
        "processes": world,
    }  # fmt: skip
    return {
        "id": f"train {' '.join(f'{k}={v}' for k, v in key.items())} / {contender}",
        "bench": "train",
        "key": key,
        "contender": contender,
        "dtype": name,
        "ours": contender == scaling.OURS,
        "clock": "wall",
        "flops": counts.training_flops(cfg, at.N, at.T),
        "bytes": counts.training_bytes(cfg, at.N, at.T, at.dtype.itemsize),
    }


def _finish(row: Row, made: dict[str, Any], N: int, alone: float) -> Row:
    """Returns the row with the measured values. `N`: utterances per process. `alone`: utterances per second when only
    one process runs."""
    world = row["key"]["processes"]
    if "wrong" in made:
        return row | {"status": "wrong", "why": made["wrong"]}
    shared, silent = made["shared"], made["silent"]
    spent = ratios.summary(shared, made["inner"])
    row |= {"status": "ok", "time_s": spent, "items_per_s": world * N / spent["median"]}
    row |= {f"{k}_per_s": row[k] / spent["median"] for k in ("flops", "bytes")}
    row["scaling"] = {"processes": world, "efficiency": row["items_per_s"] / (world * alone)}
    if world > 1:
        exposed = [a - b for a, b in zip(shared, silent, strict=True)]
        low, high = ratios.interval(exposed)
        row["scaling"] |= {
            "silent_s": statistics.median(silent), "exposed_s": statistics.median(exposed), "exposed_low_s": low,
            "exposed_high_s": high, "pairs": len(exposed),
        }  # fmt: skip
    return row
