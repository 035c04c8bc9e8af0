"""How fast is a training step? Measures forward + backward, and the full step of train.py.

`python -m bench train` measures utterances per second, for jasper_fast and its rivals.
"""

from jasper_fast.bench.cases import train
from jasper_fast.bench.harness.run import Run

# (model, N, T): the first entry of CPU_GRID has a goal
CPU_GRID = (("small", 8, 400), ("medium", 4, 400))
GPU_GRID = (("jasper10x5", 32, 1680), ("jasper10x5", 8, 1680), ("jasper10x5", 32, 704), ("jasper10x5", 64, 1680))
MODES = ("forward+backward", "step")


def main(run: Run, grid: tuple = (), mode: str | None = None) -> list[dict]:
    """Measures `grid` or the default grid of the device; returns the rows.

    Without `mode` it measures all MODES, but with `--quick`, and in `all` for models other than "small", only forward +
    backward. If eager_no_masks is a rival and `mode` is None, it also measures forward + backward on a batch without
    padding, for the first entry of the grid.
    """
    grid = grid or (GPU_GRID if run.device.type == "cuda" else CPU_GRID[: 1 if run.quick else None])
    found = []
    for model, N, T in grid:  # one case at a time, because each contender of a case keeps a model in memory
        for each in (mode,) if mode else MODES[:1] if run.quick or (run.brief and model != "small") else MODES:
            found += run.cases(f"train {model}", [train.case(run, model, N, T, each)])
    for model, N, T in grid[:1] if "eager_no_masks" in train.rivals_of(run) and mode is None else ():
        found += run.cases(f"train {model}", [train.case(run, model, N, T, MODES[0] + train.FULL)])
    return found
