"""How fast is each op, compared with eager? Measures forward, backward, both together, and inference.

The shapes are those of Jasper's layers, and for depthwise convs those of QuartzNet's layers.

`python -m bench kernels --op bn_relu_dropout`
"""

import functools

from jasper_fast.bench.cases import bn_relu_dropout, by_layer, common, depthwise, panes
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice

OPERATIONS: dict[str, common.Cases] = {  # for each op that `--op` may name, the function that makes its cases
    "bn_relu_dropout": lambda run, mode: [bn_relu_dropout.cases(run, mode)],
    "sub_block": functools.partial(by_layer.cases, "sub_block"),
    "conv1d": functools.partial(by_layer.cases, "conv1d"),
    "panes": panes.cases,
    "depthwise": depthwise.cases,
}


def main(run: Run, op: str = "all", mode: str | None = None) -> list[dict]:
    """Measures one op or all ops, in one mode or in all modes of the op; returns the rows.

    Raises UnknownRival for a name in `--rivals` that no op has. A `brief` run also accepts the rivals of models.
    """
    models = (name for kind in choice.KINDS.values() for name in kind if run.brief)
    choice.check(run.rivals, dict.fromkeys((*choice.OF_KERNELS, *models)), " for kernels")
    every = [name for name in OPERATIONS if not (run.brief and name == "conv1d")]  # sub_block includes the same convs
    groups = ((name, group) for name in (every if op == "all" else (op,)) for group in OPERATIONS[name](run, mode))
    return [row for name, group in groups for row in run.cases(f"kernels {name}", group)]
