"""How fast is the optimiser's step, with its check for NaN and the moving average, compared with a copy of the same
number of bytes?

`python -m bench optimizer`. The time depends only on the parameters, so no batch is needed.
"""

from jasper_fast.bench.cases import optimizer
from jasper_fast.bench.harness.run import Run


def main(run: Run, models: tuple[str, ...] = ()) -> list[dict]:
    """Measures the optimiser's step for each of `models`; returns the rows.

    The default is Jasper 10x5, and with `--quick` the small Jasper.
    """
    return [
        row
        for model in models or ("small" if run.quick else "jasper10x5",)
        for row in run.cases(f"optimizer {model}", [optimizer.case(run, model)])
    ]
