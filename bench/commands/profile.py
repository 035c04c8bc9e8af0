"""Where does the time of a step go? A torch.profiler trace with ranges named after layers, and tables by layer and op.

`python -m bench profile` writes `trace_<model>_<mode>_<contender>_<time>.json`, which chrome://tracing and Perfetto can
open. The outputs are checked first, as everywhere in bench.

A profiled step launches the same kernels as a usual step and has no backward hooks. On the host it opens one profiler
range per layer (in the engine, one per conv). The time of an autograd node is counted for the layer whose forward
created the node, which PyTorch's sequence numbers show. The time of the step is printed with and without the profiler.
In a CUDA graph the profiler does not see layers, so the engine is profiled without graphs.
"""

import contextlib
import copy
import dataclasses
import datetime
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType

from jasper_fast import InferenceEngine, Jasper
from jasper_fast.bench.cases import latency, memory, models, train
from jasper_fast.bench.harness import checking, clocks
from jasper_fast.bench.harness.case import Case, Runner
from jasper_fast.bench.harness.devices import synchronize
from jasper_fast.bench.harness.kineto import recorded
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.report import terminal, words
from jasper_fast.inference.plan import FoldedConv
from jasper_fast.kernels import tables

LAYER = "layer "
BACKWARD = "autograd::engine::evaluate_function: "
HEAD = "decoder.layers.0"


# ------------------------------------------------------------------ ranges


def in_range(name: str, function: Callable, device: torch.device) -> Callable:
    """Returns `function` such that every call is in a profiler range, and on a GPU in an NVTX range too."""

    def call(*args: object, **kwargs: object) -> object:
        nvtx = torch.cuda.nvtx.range(name) if device.type == "cuda" else contextlib.nullcontext()
        with torch.profiler.record_function(LAYER + name), nvtx:
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def ranges(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which the forward of every layer is in a profiler range.

    The decoder of a `Jasper` has no range, because its conv module is never called.
    """
    layers = {f"encoder.layers.{i}": layer for i, layer in enumerate(module.encoder.layers)}
    if not isinstance(module, Jasper):
        layers[HEAD] = module.decoder.layers[0]
    for name, layer in layers.items():
        layer.forward = in_range(name, layer.forward, device)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward  # removes our wrapper, so that the method of the class is used again


def conv_in_range(name: str, conv: FoldedConv, device: torch.device) -> FoldedConv:
    """Returns a copy of an engine's conv whose every call is in a range, see `in_range`. The class of the
    copy is a subclass of the conv's class, because the engine decides by the class how to launch a conv."""
    made, kind = copy.copy(conv), type(conv)
    made.__class__ = type(kind.__name__, (kind,), {"__call__": in_range(name, kind.__call__, device)})
    return made


@contextlib.contextmanager
def engine_ranges(engine: InferenceEngine, device: torch.device) -> Iterator[None]:
    """A context in which every step of an engine (a sub-block, or one of the two convs of a separable sub-block) is in
    a profiler range with the name of its layer.

    The engine does not call the layers' forward methods, so `ranges` would have no effect.
    """
    runner = engine._run
    plan, bound = runner.plan, runner.shapes.held
    blocks = [layer.b for layer in engine._model.encoder.layers]
    layers = [i for i, b in enumerate(blocks) for _ in range(b.repeat * (2 if b.separable else 1))]
    steps = [
        dataclasses.replace(step, conv=conv_in_range(f"encoder.layers.{i}", step.conv, device))
        for i, step in zip(layers, plan.steps, strict=True)
    ]
    bound.clear()  # the engine prepares calls once per shape; delete the calls prepared without ranges
    runner.plan = dataclasses.replace(plan, steps=tuple(steps), head=conv_in_range(HEAD, plan.head, device))
    try:
        yield
    finally:
        runner.plan = plan
        bound.clear()


# ------------------------------------------------------------------ profiling


def profile(step: Callable[[], object], device: torch.device, target: Path) -> list[dict]:
    """Runs `step` under the profiler and writes the trace. Returns one record per op, per layer, and per backward of a
    layer, longest time first.

    Raises RuntimeError if the profiler records no kernel on the GPU.
    """
    on_gpu, kinds = device.type == "cuda", torch.profiler.ProfilerActivity
    for _ in range(2):
        step()
    synchronize(device)
    with recorded([kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as trace:
        step()
        synchronize(device)
    target.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(target))
    if on_gpu and not any(event.device_type == DeviceType.CUDA for event in trace.events()):
        raise RuntimeError(
            f"the profiler recorded no kernel on {device}: CUPTI is missing or may not be used here "
            "(pip install nvidia-cuda-cupti; in a container the driver must allow profiling)"
        )
    records = []
    clock = "device_time_total" if on_gpu else "cpu_time_total"
    # The time of a GPU event is counted for the op or range that launched it.
    for event in (e for e in trace.key_averages() if e.device_type == DeviceType.CPU):
        kind = "layer" if event.key.startswith(LAYER) else "op"
        seconds = getattr(event, clock if kind == "layer" else f"self_{clock}") * 1e-6
        if seconds > 0:
            name = event.key.removeprefix(LAYER)
            records.append({"kind": kind, "name": name, "seconds": seconds, "calls": event.count})
    return sorted([*records, *backward(trace.events(), on_gpu)], key=lambda r: -r["seconds"])


def backward(events: Iterable, on_gpu: bool) -> list[dict]:
    """Returns one record per layer: the time of the autograd nodes that the layer's forward created.

    Nodes and the ops that created them have the same sequence numbers.
    """
    # For each sequence number: the start of the op that created the node, and the layer of that op.
    made: dict[int, tuple[float, str]] = {}
    nodes = []
    for event in (e for e in events if e.device_type == DeviceType.CPU and e.sequence_nr >= 0):
        if event.name.startswith(BACKWARD):
            nodes.append(event)
        elif within(event, BACKWARD) is None:
            # An op that creates no node has the sequence number of the next op that does. So if several ops have the
            # same number, the last of them to start created the node.
            found = (event.time_range.start, (within(event, LAYER) or "").removeprefix(LAYER))
            made[event.sequence_nr] = max(made.get(event.sequence_nr, found), found)
    spent: dict[str, list[float]] = {}
    for node in nodes:
        if layer := made.get(node.sequence_nr, (0.0, ""))[1]:
            spent.setdefault(layer, []).append(node.device_time_total if on_gpu else node.cpu_time_total)
    return [
        {"kind": "backward", "name": layer, "seconds": sum(times) * 1e-6, "calls": len(times)}
        for layer, times in spent.items()
        if sum(times) > 0
    ]


def within(event, prefix: str) -> str | None:
    """Returns the name of the innermost event, of `event` and those around it, whose name begins with `prefix`."""
    while event is not None and not event.name.startswith(prefix):
        event = event.cpu_parent
    return None if event is None else event.name


def show(title: str, records: list[dict]) -> None:
    """Prints tables of the time per layer, forward and backward, and of the time per op."""
    for kind, lines in words.profiled(records, 25):
        headings = (kind.partition(",")[0], *words.PROFILE)
        terminal.console.print(terminal.table(f"{title}\ntime per {kind}", headings, 1, lines))


# ------------------------------------------------------------------ contenders

Profiled = tuple[Callable[[], object], contextlib.AbstractContextManager]  # a step, and a context that names its layers


def inference(run: Run, model: str, N: int, T: int) -> tuple[Case, Callable[[str, Runner], Profiled]]:
    """Returns the case to check, and a function that returns the `Profiled` inference call of a contender."""
    shared = latency.Models(dataclasses.replace(run, rivals="eager"), model, graphs=False)
    at = f"{T} frames"  # a key of FRAMES that cannot be confused with a length in seconds
    models.FRAMES[at] = T
    case = latency.case(shared, model, N, at)

    def of(name: str, ready: Runner) -> Profiled:
        return ready.run, (engine_ranges if name == case.ours else ranges)(shared.contenders[name], run.device)

    return case, of


def training(run: Run, model: str, N: int, T: int) -> tuple[Case, Callable[[str, Runner], Profiled]]:
    """Returns the case to check, and a function that returns the `Profiled` training step of a contender."""
    case, modules, batch = memory.case(run, model, N, T)

    def of(name: str, _: Runner) -> Profiled:
        module, state = modules[name], models.weights(models.config(model), run.device)
        return train.runner(module, module, batch(), state, run.dtype, "step").run, ranges(module, run.device)

    return case, of


def main(run: Run, model: str = "small", mode: str = "train", N: int = 8, T: int = 400) -> list[dict]:
    """Profiles one training step or one inference call of jasper_fast and of eager, if their outputs are right.

    Returns a dict per contender, with the records of `profile` or the reason why there are none. The result file has
    the same dicts.
    """
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    case, of = {"train": training, "inference": inference}[mode](run, model, N, T)
    clock, watched, profiles = clocks.WallClock(run.device), [], {}
    with run.begun(case) as m:
        checking.prepare(m)
        for name in list(m.runners):
            with m.caught(name):
                step, named = of(name, m.runners[name])
                bare = [clock.sample(step, 1) for _ in range(4)]
                target = run.results.path.with_name(f"trace_{tables.slug(Path(model).stem)}_{mode}_{name}_{stamp}.json")
                with named:
                    records = profile(lambda step=step: watched.append(clock.sample(step, 1)), run.device, target)
                times = {"step_s": statistics.median(bare[1:]), "profiled_s": watched[-1]}
                profiles[name] = {"trace": target.name, "records": records} | times
    found = []
    for name in case.names:
        status, why = m.failed.get(name, ("ok", ""))
        about = {"contender": name, "model": model, "mode": mode, "batch": [N, T], "status": status}
        if name in m.failed:
            terminal.console.print(f"{status}: {name}: {why}", style=terminal.STYLES[status])
            found.append(about | {"why": why, "records": []})
            continue
        made = profiles[name]
        show(f"{name}, {model} {mode} ({N}, {models.config(model).encoder.in_feats}, {T})", made["records"])
        times = f"{words.duration(made['step_s'])} without the profiler, {words.duration(made['profiled_s'])} with it"
        terminal.console.print(f"{name}: {times}; trace: {made['trace']}")
        found.append(about | made)
    run.results.data["profiles"] = found
    run.results.write()
    return found
