"""How many bytes does a training forward keep for its backward, and how many are allocated at the peak of the step?

`python -m bench memory`. Bytes are counted, not sampled. The kept bytes are those of all storages that the forward of
the second step creates and that are still alive after it.
"""

import gc
from collections.abc import Callable

from rich.text import Text
from torch import nn

from jasper_fast.bench.cases import memory
from jasper_fast.bench.cases.train import Batch
from jasper_fast.bench.harness import checking, cudnn_search
from jasper_fast.bench.harness.case import Case
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.measurement import Row
from jasper_fast.bench.harness.run import Run

# (model, N, T)
CPU_GRID = (("jasper10x5", 2, 400), ("small", 8, 400), ("medium", 4, 400))
GPU_GRID = (("jasper10x5", 32, 1680), ("jasper10x5", 2, 400))


def measure(run: Run, case: Case, modules: dict[str, nn.Module], batch: Callable[[], Batch]) -> list[Row]:
    """Counts the bytes kept for backward and the peak bytes, ours and eager's; returns the rows.

    The arguments after `run` are the values that `memory.case` returns.
    """
    found = {}
    with run.begun(case) as m:
        m.build()
        checking.check(m, case.seeds)
        gc.collect()
        for name in list(m.runners):
            with m.caught(name):
                found[name] = memory.step(modules[name], batch(), run.dtype, run.device)
    rows = [m.begin_row(name) for name in case.names]
    ours = {} if case.ours in m.failed else found[case.ours]
    for row in (row for row in rows if row["status"] == "ok"):
        row["memory"] = its = dict(found[row["contender"]])
        if ours and not row["ours"]:
            its |= {f"ours_over_{k}": ours[f"{k}_bytes"] / its[f"{k}_bytes"] for k in ("kept", "peak")}
    return rows


def main(run: Run, grid: tuple = ()) -> list[Row]:
    """Measures `grid` or the default grid of the device; returns the rows."""
    found = []
    for model, N, T in grid or (GPU_GRID if run.device.type == "cuda" else CPU_GRID)[: 1 if run.quick else None]:
        case, modules, batch = memory.case(run, model, N, T)
        if run.out_of_time() or run.results.has(case.id, case.names):
            continue
        gc.collect()
        with console.status(Text(f"memory: counting the bytes of {case.label()}")), cudnn_search.off():
            rows = measure(run, case, modules, batch)
        run.results.add(rows)
        found += rows
    return found
