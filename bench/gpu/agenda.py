"""The parts of `python -m bench gpu`, the most valuable first."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jasper_fast.bench.cases import bn_relu_dropout, by_layer, common, panes
from jasper_fast.bench.cases.layers import Layer, layers
from jasper_fast.bench.commands import kernels, latency, launches, memory, train
from jasper_fast.bench.gpu import ahead, first, preflight, self_check
from jasper_fast.bench.harness import cudnn_search
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice
from jasper_fast.dispatch import backends

MODEL = "jasper10x5"
ALL_MODES = ("backward", "forward", "inference")  # backward first: its fp64 answer is kept and includes forward's
LIGHT = "eager,eager_no_masks,eager_2d_channels_last,cuda_graph"
LIGHT_TRAINING = "eager,eager_2d_channels_last"
CONVS = f"{LIGHT_TRAINING},{choice.CUDA_FACE}"
SLOW = "compile_max_autotune"


@dataclass(frozen=True)
class Part:
    """A part of the plan: `measure(run)` is called and may take at most `seconds`.

    `seconds` are for the usual budget (BUDGET in gpu.py), and change in proportion with `--budget`. A part that was cut
    off is continued at the end of the plan if some of the budget is left.
    """

    title: str
    seconds: float
    measure: Callable[[Run], object]


def plan(run: Run) -> list[Part]:
    """Returns the parts, the most valuable first. On a CPU they are small stand-ins, to test the command."""
    if run.device.type == "cpu":
        shapes = ((2, 64, 100), (2, 96, 100))
        return [
            Part("preflight", 10, preflight.main),
            Part(
                "self-check",
                60,
                lambda r: self_check.selfcheck(r, quick=True, ops=("bn_relu_dropout",), faces=("cpu",)),
            ),
            Part(
                "bn_relu_dropout",
                60,
                lambda r: r.cases("kernels", [bn_relu_dropout.case(r, s, "both", False, False) for s in shapes]),
            ),
            Part("latency", 60, lambda r: latency.main(replace(r, rivals=LIGHT), "small", grid=((1, 2.0), (2, 2.0)))),
            Part("training step", 60, lambda r: train.main(replace(r, rivals=LIGHT_TRAINING), (("small", 2, 64),))),
            Part("memory", 60, lambda r: memory.main(r, (("small", 2, 64),))),
            Part(
                "sub-blocks",
                60,
                lambda r: r.cases("kernels", by_layer.layer_cases(r, "sub_block", 2, 64, Layer(64, 64, 11), ALL_MODES)),
            ),
            Part("panes", 60, lambda r: all_panes(r, [panes.Block((64, 64), 96)], (2, 64))),
            Part("launches", 60, launches.main),
            Part("tests", 30, lambda r: first.tests(r, files=("test_faces.py",), chosen="")),
            *(
                []
                if backends.why_missing("triton", "cpu")
                else [Part("tuning", 60, lambda r: first.tune(r, ("forward",)))]
            ),
        ]
    return [*first_nine_minutes(), *and_then()]


def first_nine_minutes() -> list[Part]:
    """Returns the parts for the first call, whose seconds add up to the budget."""
    return [
        Part("preflight", 5, preflight.main),
        Part("tests", 40, first.tests),
        Part("self-check", 75, ready),
        Part("tuning", 110, first.tune),
        Part(
            "bn_relu_dropout",
            20,
            lambda r: r.cases("kernels", bn_relu_dropout.cases(replace(r, quick=True, rivals=CONVS))),
        ),
        Part("the five largest convs", 25, lambda r: all_layers(r, CONVS, "conv1d", ("forward",), 5)),
        Part("training step", 60, lambda r: train.main(replace(r, rivals=LIGHT_TRAINING), ((MODEL, 32, 1680),))),
        Part(
            "latency of one utterance",
            45,
            lambda r: latency.main(replace(r, rivals=LIGHT), MODEL, grid=((1, 2.0), (1, 7.0), (1, 16.7))),
        ),
        Part("launches", 20, all_launches),
        Part("memory", 15, lambda r: memory.main(r, ((MODEL, 8, 1680),))),
        Part("panes", 20, lambda r: all_panes(r, panes.ends_and_middle())),
        Part("sub-blocks", 60, lambda r: all_layers(r, CONVS, "sub_block", ALL_MODES)),
        Part("self-check in full", 45, self_check.selfcheck_in_full),
    ]


def and_then() -> list[Part]:
    """Returns the parts after `first_nine_minutes`. Usually only later calls with `--resume` reach them."""
    return [
        Part("training grid", 40, lambda r: train.main(replace(r, rivals=f"{LIGHT_TRAINING},eager_no_masks"))),
        Part("sub-blocks beside max-autotune and cuDNN", 90, slow_rivals),
        Part("latency grid", 60, lambda r: latency.main(replace(r, rivals=LIGHT), MODEL)),
        Part("convs", 80, lambda r: all_layers(r, LIGHT_TRAINING, "conv1d", ("both", "forward", "backward"))),
        Part("panes of all blocks", 60, lambda r: all_panes(r, panes.blocks()[::-1])),
        Part(
            "every width of bn_relu_dropout",
            80,
            lambda r: kernels.main(in_a_second(r, "eager"), "bn_relu_dropout"),
        ),
        Part(
            "bn_relu_dropout beside torch.compile",
            40,
            lambda r: kernels.main(replace(r, quick=True, rivals="compile"), "bn_relu_dropout"),
        ),
        Part(
            "training beside torch.compile",
            120,
            lambda r: train.main(replace(r, rivals="eager,compile"), ((MODEL, 32, 1680),)),
        ),
        Part(
            "latency beside torch.compile",
            120,
            lambda r: latency.main(replace(r, rivals="eager,compile,compile_reduce_overhead"), MODEL, grid=((1, 2.0),)),
        ),
        Part(
            "latency beside other runtimes",
            120,
            lambda r: latency.main(replace(r, rivals="eager,onnxruntime,tensorrt"), MODEL, grid=((1, 2.0),)),
        ),
        Part(
            "latency beside frozen blocks",
            120,
            lambda r: latency.main(replace(r, rivals="eager,compile_blocks_frozen"), MODEL, grid=((1, 2.0),)),
        ),
    ]


def ready(run: Run) -> None:
    """Runs the quick self-check in the run's dtype, while other processes compile the kernels of later parts."""
    with ahead.compilers(run, ("bn_relu_dropout", "the five largest convs", "latency of one utterance", "sub-blocks")):
        self_check.selfcheck(run, quick=True, dtypes=(run.dtype_name,))


def all_launches(run: Run) -> None:
    """Counts and times the launches of small calls. cuDNN does not time its algorithms, because their speed does not
    matter here."""
    with cudnn_search.off():
        launches.main(replace(run, rivals="eager,cuda_graph"))


def in_a_second(run: Run, chosen: str) -> Run:
    """Returns the same run with the rivals `chosen` and about a second per case."""
    return replace(run, rivals=chosen, effort=run.effort.at_most(1.0))


def all_panes(run: Run, blocks: Sequence[panes.Block], size: tuple[int, int] | None = None) -> None:
    """Measures the panes of these blocks in both forms, one block after another."""
    run = in_a_second(run, LIGHT_TRAINING)
    for block in blocks:
        cases = panes.block_cases(run, block, common.MODES, *(size or common.size(run)))
        run.cases(f"panes {cases[0].key['panes']}", cases)


def all_layers(run: Run, chosen: str, op: str, modes: tuple[str, ...], count: int | None = None) -> None:
    """Measures an op at the `count` largest layers (default: all), one after another, with about a second per case."""
    run = in_a_second(run, chosen)
    for layer in layers()[:count]:
        run.cases(
            f"{op} {layer.C_in}->{layer.C_out}",
            by_layer.layer_cases(run, op, *common.batch(run, layer), layer, modes),
        )


def slow_rivals(run: Run) -> None:
    """Measures sub-blocks with rivals that take long to prepare.

    cuDNN's fused patterns are measured at all layers before torch.compile's max-autotune, which takes longer.
    """
    absent = importlib.util.find_spec("cudnn") is None
    if not absent:  # if it is absent, the last call of `all_layers` reports that
        all_layers(run, "cudnn", "sub_block", ("forward", "inference"))
    all_layers(run, f"cudnn,{SLOW}" if absent else SLOW, "sub_block", ("forward", "inference", "backward"))
