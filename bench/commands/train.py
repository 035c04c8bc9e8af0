"""How fast does a training step run: forward and backward, and the full step, which is train.py's own.

`python -m bench train`; utterances per second, for fused and eager.
"""

from jasper_fast.bench.cases import train
from jasper_fast.bench.harness.run import Run

# (model, N, T): the first has a goal
CPU_GRID = (("small", 8, 400), ("medium", 4, 400))
GPU_GRID = (("jasper10x5", 32, 1680), ("jasper10x5", 8, 1680), ("jasper10x5", 32, 704), ("jasper10x5", 64, 1680))
MODES = ("forward+backward", "step")


def main(run: Run, grid: tuple = (), mode: str | None = None) -> list[dict]:
    """Measure the grid for the device, or the given one, in one of the modes or in those that the run has time for."""
    grid = grid or (GPU_GRID if run.device.type == "cuda" else CPU_GRID[: 1 if run.quick else None])
    found = []
    for model, N, T in grid:  # one at a time: each case holds a model per contender
        for each in (mode,) if mode else MODES[:1] if run.quick or (run.brief and model != "small") else MODES:
            found += run.cases(f"train {model}", [train.case(run, model, N, T, each)])
    for model, N, T in grid[:1] if "eager_no_masks" in train.rivals_of(run) and mode is None else ():
        found += run.cases(f"train {model}", [train.case(run, model, N, T, MODES[0] + train.FULL)])
    return found
