"""How fast is each op at each Jasper layer's shape: forward, backward, both, inference; against the eager chain.

`python -m bench kernels --op bn_relu_dropout`
"""

from jasper_fast.bench.cases import bn_relu_dropout, by_layer, common, panes
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice

EVERY_MODE = (*common.MODES, "inference")


def operations() -> dict[str, common.Cases]:
    """What `--op` may name."""
    convs = {op: by_layer.cases(op) for op in ("sub_block", "conv1d")}
    return {"bn_relu_dropout": lambda run, mode: [bn_relu_dropout.cases(run, mode)], **convs, "panes": panes.cases}


def check_rivals(run: Run) -> None:
    """Raises UnknownRival for a name in `--rivals` that no op has; `python -m bench all` may name a model's too."""
    if run.rivals in ("default", "all"):
        return
    models = [name for kind in choice.KINDS.values() for name in kind] if run.brief else []
    known = dict.fromkeys((*choice.SUB_BLOCK, "compile", *models))
    if unknown := [n for n in run.rivals.split(",") if n not in known]:
        raise choice.UnknownRival(f"no rival {unknown[0]!r} for kernels; known: {', '.join(known)}")


def main(run: Run, op: str = "all", mode: str | None = None) -> list[dict]:
    """Measure one op, or all, in one of EVERY_MODE, or all that an op has."""
    check_rivals(run)
    known = operations()
    if run.brief:
        known.pop("conv1d")  # sub_block holds the same convs
    ops = known if op == "all" else {op: known[op]}
    groups = ((name, group) for name, cases in ops.items() for group in cases(run, mode))
    return [row for name, group in groups for row in run.cases(f"kernels {name}", group)]
