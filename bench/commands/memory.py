"""How many bytes does a training forward keep for its backward, and how many are alive at the worst moment?

`python -m bench memory`; counted, not sampled: every storage born in the second step's forward and alive after it,
however it is held, is one that the step keeps.
"""

import gc

from jasper_fast.bench.cases import memory
from jasper_fast.bench.cases.common import name as dtype_name
from jasper_fast.bench.harness import checking, cudnn_search
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.run import Run

# (model, N, T)
CPU_GRID = (("jasper10x5", 2, 400), ("small", 8, 400), ("medium", 4, 400))
GPU_GRID = (("jasper10x5", 32, 1680), ("jasper10x5", 2, 400))


def measure(run: Run, model: str, N: int, T: int) -> list[dict]:
    """Rows of one model and batch: bytes kept for backward and peak bytes, ours and eager's."""
    made, modules, batch = memory.case(run, model, N, T)
    found = {}
    with run.blamed(made):
        for contender in (c for c in made.contenders if c.name not in made.failed):
            with checking.caught(made, contender.name):
                made.runners[contender.name] = contender.build()
        checking.check(made, made.seeds)
        gc.collect()
        for name in list(made.runners):
            with checking.caught(made, name):
                found[name] = memory.step(modules[name], batch(), run.dtype, run.device)
    rows = []
    for contender in made.contenders:
        name = contender.name
        row = {
            "id": f"{made.id} / {name}",
            "bench": "memory",
            "key": made.key,
            "contender": name,
            "ours": name == made.ours,
            "dtype": made.dtype,
            "flops": 0,
            "bytes": 0,
        }
        if name in made.failed:
            row |= dict(zip(("status", "why"), made.failed[name], strict=True))
        else:
            row |= {"status": "ok", "memory": found[name]}
            if name != made.ours and made.ours in found:
                row["memory"] |= {
                    f"ours_over_{kind}": found[made.ours][f"{kind}_bytes"] / found[name][f"{kind}_bytes"]
                    for kind in ("kept", "peak")
                }
        rows.append(row)
    return rows


def main(run: Run, grid: tuple = ()) -> list[dict]:
    """Measure the grid for the device, or the given one."""
    found = []
    usual = GPU_GRID if run.device.type == "cuda" else CPU_GRID
    for model, N, T in grid or usual[: 1 if run.quick else None]:
        done = f"memory model={model} batch=({N}, 64, {T}) dtype={dtype_name(run.dtype)} mode=training step"
        if run.out_of_time() or run.results.has(done, ("jasper_fast", "eager")):
            continue
        gc.collect()
        with console.status(f"memory: count {model} ({N}, 64, {T})"), cudnn_search.off():
            rows = measure(run, model, N, T)
        run.results.add(rows)
        found += rows
    return found
