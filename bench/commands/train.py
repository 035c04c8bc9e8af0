"""How fast a training step runs: forward and backward, and the full step with CTC and the optimiser.

`python -m bench train`; utterances per second, for fused and eager.
"""

from jasper_fast.bench.cases import train
from jasper_fast.bench.harness.run import Run

# (model, N, T): the first has a goal
CPU_GRID = (("small", 8, 400), ("medium", 4, 400))
GPU_GRID = (("jasper10x5", 32, 1680), ("jasper10x5", 8, 1680), ("jasper10x5", 32, 704), ("jasper10x5", 64, 1680))
MODES = ("forward+backward", "step")


def main(run: Run, grid: tuple = ()) -> list[dict]:
    """Measure the grid for the device, or the given one."""
    grid = grid or (GPU_GRID if run.device.type == "cuda" else CPU_GRID[: 1 if run.quick else None])
    found = []
    for model, N, T in grid:  # one at a time: each case holds a model per contender
        for mode in MODES[:1] if run.quick or (run.brief and model != "small") else MODES:
            found += run.cases(f"train {model}", [train.case(run, model, N, T, mode)])
    for model, N, T in grid[:1] if "eager_no_masks" in train.rivals_of(run) else ():
        found += run.cases(f"train {model}", [train.case(run, model, N, T, MODES[0] + train.FULL)])
    return found
