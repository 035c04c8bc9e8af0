"""Where does the time of a step go: a torch.profiler trace with ranges named after layers, and two tables.

`python -m bench profile` writes `trace_<contender>.json` (open it in chrome://tracing or Perfetto).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from bench import models, tables, train
from bench.harness import Run, synchronize
from jasper_fast import InferenceEngine

LAYER = "layer "


@contextlib.contextmanager
def ranges(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A profiler range (and on a GPU an NVTX range) around every layer's forward."""
    layers = [(f"encoder.layers.{i}", layer) for i, layer in enumerate(module.encoder.layers)]
    layers.append(("decoder.layers.0", module.decoder.layers[0]))
    opened: dict[str, list] = {name: [] for name, _ in layers}

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            opened[name].append(torch.profiler.record_function(LAYER + name).__enter__())
            if device.type == "cuda":
                torch.cuda.nvtx.range_push(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if device.type == "cuda":
                torch.cuda.nvtx.range_pop()
            opened[name].pop().__exit__(None, None, None)

        return hook

    hooks = [layer.register_forward_pre_hook(enter(name)) for name, layer in layers]
    hooks += [layer.register_forward_hook(leave(name)) for name, layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def profile(step: Callable[[], object], device: torch.device, target: Path) -> list[dict]:
    """Run `step` under the profiler; writes the trace and returns one record an op or layer, by time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(2):
        step()
    synchronize(device)
    with torch.profiler.profile(activities=activities) as trace:
        step()
        synchronize(device)
    target.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(target))
    records = []
    for event in trace.key_averages():
        layer = event.key.startswith(LAYER)
        on_gpu = device.type == "cuda"
        total, own = (
            (event.device_time_total, event.self_device_time_total)
            if on_gpu
            else (event.cpu_time_total, event.self_cpu_time_total)
        )
        seconds = (total if layer else own) * 1e-6
        if seconds > 0:
            records.append(
                {
                    "kind": "layer" if layer else "op",
                    "name": event.key.removeprefix(LAYER),
                    "seconds": seconds,
                    "calls": event.count,
                }
            )
    return sorted(records, key=lambda r: -r["seconds"])


def show(title: str, records: list[dict], limit: int = 25) -> None:
    """Time per layer (its forward) and per op (its own time, forward and backward)."""
    for kind in ("layer", "op"):
        mine = [r for r in records if r["kind"] == kind]
        if not mine:
            continue
        whole = sum(r["seconds"] for r in mine)
        table = Table(title=f"{title}: time per {kind}", title_justify="left")
        table.add_column(kind)
        for column in ("time", "share", "calls"):
            table.add_column(column, justify="right")
        for r in mine[:limit]:
            table.add_row(
                r["name"], tables.duration(r["seconds"]), f"{100 * r['seconds'] / whole:.1f} %", str(r["calls"])
            )
        tables.console.print(table)


def main(run: Run, model: str = "small", mode: str = "train", N: int = 8, T: int = 400) -> list[dict]:
    """Profile one training step or one inference call of jasper_fast and of eager."""
    cfg = models.config(model)
    state = models.weights(cfg, run.device)
    fused = models.fused(cfg, state, run.backend)
    found = []
    for name, module in (("jasper_fast", fused), ("eager", models.eager(cfg, state))):
        batch = train.Batch(cfg, N, T, run.device)
        if mode == "train":
            step = train.runner(module, module, batch, state, run.dtype, "step").run
        else:
            module = module.to(run.dtype).eval()
            call = InferenceEngine(module) if name == "jasper_fast" else module
            x = batch.features.to(run.dtype)
            step = _inference(call, x, batch.lengths)
        with ranges(module, run.device):
            records = profile(step, run.device, run.results.path.with_name(f"trace_{model}_{mode}_{name}.json"))
        show(f"{name}, {model} {mode} ({N}, {cfg.encoder.in_feats}, {T})", records)
        found.append({"contender": name, "model": model, "mode": mode, "batch": [N, T], "records": records})
    run.results.data["profiles"] = found
    run.results.write()
    return found


def _inference(call: Callable, x: torch.Tensor, lengths: torch.Tensor) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return call(x, lengths)

    return step
