"""How fast is the optimiser's step, with its check for NaN and the moving average, beside a copy of as many bytes?

`python -m bench optimizer`; by parameters alone, whatever the batch.
"""

from jasper_fast.bench.cases import optimizer
from jasper_fast.bench.harness.run import Run


def main(run: Run, models: tuple[str, ...] = ()) -> list[dict]:
    """Measure the step of these networks, or of Jasper 10x5; of the small one where time is short."""
    found = []
    for model in models or ("small" if run.quick else "jasper10x5",):
        found += run.cases(f"optimizer {model}", [optimizer.case(run, model)])
    return found
