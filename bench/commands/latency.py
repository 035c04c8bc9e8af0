"""How long does one batch take? Measures percentiles by batch size and audio length.

There are two kinds of cases: the acoustic model only, and the whole way from sound to text.

On a GPU, `python -m bench latency` measures the grid of NVIDIA's published table: batches of 1, 2, 4, 8 and 16
utterances of 2, 7 and 16.7 s.
"""

import itertools

from jasper_fast.bench.cases import latency
from jasper_fast.bench.harness.run import Run

# (N, seconds)
GRID = tuple(itertools.product((1, 2, 4, 8, 16), (2.0, 7.0, 16.7)))
CPU_GRID = ((1, 2.0), (1, 7.0), (4, 2.0), (2, 2.0))  # all of GRID would take an hour on a small CPU (see --full)


def grids(run: Run, full: bool, grid: tuple) -> tuple[tuple, tuple]:
    """Returns the (N, seconds) to measure: those for the acoustic model, and those from sound to text.

    An empty `grid` means the default grid of the device. From sound to text, a `quick` run measures nothing. On a CPU
    without `full`, any other run measures only the first one or two of CPU_GRID from sound to text.
    """
    everything = full or run.device.type == "cuda"
    alone = grid or (GRID if everything else CPU_GRID[: 1 if run.quick else 3 if run.brief else None])
    if run.quick:
        return alone, ()
    return alone, alone if everything else CPU_GRID[: 1 if run.brief or grid else 2]


def main(run: Run, model: str = "jasper10x5", full: bool = False, grid: tuple = ()) -> list[dict]:
    """Measures the acoustic model, and then the way from sound to text, at the sizes that `grids` returns.

    With `full` the default grid of a CPU is GRID, as on a GPU. Returns the rows.
    """
    shared = latency.Models(run, model)
    alone, heard = grids(run, full, grid)
    cases = [latency.case(shared, model, N, seconds) for N, seconds in alone]
    cases += [latency.sound_case(shared, model, N, seconds) for N, seconds in heard]
    found = run.cases(f"latency {model}", cases)
    run.close(shared.close)
    return found
