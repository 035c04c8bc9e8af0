"""How many ops and kernels does one call launch, and how long does the host take to launch them?

`python -m bench launches` runs the models on one utterance of 32 frames. At this size almost all of the time is the
host's work to launch kernels.
"""

import dataclasses
import functools

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast.bench.cases import models
from jasper_fast.bench.cases.latency import Models, case as latency_case
from jasper_fast.bench.cases.train import case as train_case
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.devices import synchronize
from jasper_fast.bench.harness.kineto import recorded
from jasper_fast.bench.harness.measurement import Row
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice

FRAMES = 32
# Ops that only make views and launch nothing.
VIEWS = {
    "view", "_unsafe_view", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "detach", "expand", "alias",
    "as_strided",
}  # fmt: skip


class Ops(TorchDispatchMode):
    """Counts the ops that reach PyTorch's dispatcher, except VIEWS."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def count(runner: Runner, device: torch.device) -> dict[str, int]:
    """Returns how many ops one run dispatches, and on a GPU also how many kernels and copies it runs there, and how
    many launches the host makes."""
    for _ in range(2):  # an engine captures its CUDA graph in the second call
        runner.run()
    with Ops() as ops:
        runner.run()
    found = {"ops": ops.count}
    if device.type == "cuda":
        synchronize(device)
        with recorded([ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            runner.run()
            synchronize(device)
        if on_device := sum(e.device_type == DeviceType.CUDA for e in trace.events()):
            host = sum("Launch" in e.name for e in trace.events() if e.name.startswith("cu"))
            found |= {"kernels": on_device, "host_launches": host}
        else:
            console.print(
                f"launches: the profiler recorded no kernel on {device}: CUPTI is missing or may not be used here"
            )
    return found


def cases(run: Run) -> list[Case]:
    """Returns the cases: inference and training of the small Jasper, and on a GPU also of Jasper 10x5. The input is so
    short that almost all of the time is overhead."""
    made = []
    inference, training = (
        dataclasses.replace(run, rivals=choice.only(kind, run.rivals)) for kind in ("inference", "training")
    )
    for model in ("small", "jasper10x5") if run.device.type == "cuda" else ("small",):
        shared = Models(inference, model)
        models.FRAMES[0.32] = FRAMES
        made += [latency_case(shared, model, 1, 0.32), train_case(training, model, 1, FRAMES, "forward+backward")]
    return made


def main(run: Run) -> list[Row]:
    """Counts each contender's launches and times the same calls; returns the rows."""
    found = []
    for case in cases(run):
        counts: dict[str, dict[str, int]] = {}
        counted = [Contender(c.name, functools.partial(_counting, c, counts, run.device)) for c in case.contenders]
        case = dataclasses.replace(case, bench="launches", contenders=counted, flops=0.0, nbytes=0.0, wall=True)
        rows = run.cases("launches", [case])
        for row in rows:
            row["launches"] = counts.get(row["contender"], {})
        run.results.add(rows)
        found += rows
    for row in (r for r in found if r["status"] == "ok"):
        console.print(f"{row['key']['model']} {row['contender']}: {row['launches']} ({run.dtype_name})")
    return found


def _counting(contender: Contender, counts: dict[str, dict[str, int]], device: torch.device) -> Runner:
    """Builds the contender's runner, counts its launches into `counts`, and returns it."""
    runner = contender.build()
    counts[contender.name] = count(runner, device)
    return runner
