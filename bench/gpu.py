"""Everything that is worth knowing about a GPU in nine minutes, the most valuable numbers first.

`python -m bench gpu`; each case is on disk as soon as it is measured, and `--resume` goes on after the last one. With
`--device cpu` the same plan runs on a stand-in: the small Jasper and small shapes.
"""

import dataclasses
import signal
import time
from collections.abc import Callable

from bench import kernels, latency, launches, memory, sub_blocks, train
from bench.harness import OutOfTime, Run, console

BUDGET = 540.0
LIGHT = "eager,eager_no_masks,eager_2d_channels_last,cuda_graph"
LIGHT_TRAINING = "eager,eager_2d_channels_last"
GOOD = 10.0  # seconds that must be left for another part to be worth starting


def plan(run: Run) -> list[tuple[str, Callable[[Run], object]]]:
    """(title, what to run) in order of value; slow compilers come last, where they can cost nothing but themselves."""
    light, light_training = ({"rivals": r} for r in (LIGHT, LIGHT_TRAINING))
    if run.device.type == "cpu":
        shapes = ((2, 64, 100), (2, 96, 100))
        return [
            (
                "bn_relu_dropout",
                lambda r: r.cases("kernels", [kernels.bn_relu_dropout(r, s, "both", False, False) for s in shapes]),
            ),
            ("latency", lambda r: latency.main(with_(r, light), "small", grid=((1, 2.0), (2, 2.0)))),
            ("training step", lambda r: train.main(with_(r, light_training), (("small", 2, 64),))),
            ("memory", lambda r: memory.main(r, (("small", 2, 64),))),
            (
                "sub-blocks",
                lambda r: r.cases("kernels", [sub_blocks.case(r, "sub_block", 2, 64, (64, 64, 11, 1), "both")]),
            ),
            ("launches", launches.main),
        ]
    model = "jasper10x5"
    return [
        (
            "bn_relu_dropout",
            lambda r: r.cases("kernels", kernels.cases_bn_relu_dropout(with_(r, {"quick": True, "rivals": "eager"}))),
        ),
        (
            "latency of one utterance",
            lambda r: latency.main(with_(r, light), model, grid=((1, 2.0), (1, 7.0), (1, 16.7))),
        ),
        ("training step", lambda r: train.main(with_(r, light_training), ((model, 32, 1680),))),
        ("memory", lambda r: memory.main(r, ((model, 8, 1680),))),
        ("sub-blocks", lambda r: kernels.main(with_(r, {"brief": True}), "sub_block")),
        ("latency grid", lambda r: latency.main(with_(r, light), model)),
        ("convs", lambda r: kernels.main(with_(r, {"quick": True}), "conv1d")),
        ("every width of bn_relu_dropout", lambda r: kernels.main(with_(r, {"rivals": "eager"}), "bn_relu_dropout")),
        ("launches", lambda r: launches.main(with_(r, {"rivals": "eager,cuda_graph"}))),
        ("training grid", lambda r: train.main(with_(r, light_training))),
        (
            "bn_relu_dropout beside torch.compile",
            lambda r: kernels.main(with_(r, {"quick": True, "rivals": "compile"}), "bn_relu_dropout"),
        ),
        (
            "training beside torch.compile",
            lambda r: train.main(with_(r, {"rivals": "eager,compile"}), ((model, 32, 1680),)),
        ),
        (
            "latency beside torch.compile",
            lambda r: latency.main(
                with_(r, {"rivals": "eager,compile,compile_reduce_overhead"}), model, grid=((1, 2.0),)
            ),
        ),
        (
            "latency beside other runtimes",
            lambda r: latency.main(with_(r, {"rivals": "eager,onnxruntime,tensorrt"}), model, grid=((1, 2.0),)),
        ),
        (
            "latency beside frozen blocks",
            lambda r: latency.main(with_(r, {"rivals": "eager,compile_blocks_frozen"}), model, grid=((1, 2.0),)),
        ),
    ]


def with_(run: Run, changes: dict) -> Run:
    """The same run with other settings."""
    return dataclasses.replace(run, **changes)


def main(run: Run, budget: float = BUDGET) -> None:
    """Work through the plan until it is done or the budget, counted from the run's start, is spent."""
    run = with_(
        run,
        {
            "deadline": run.started + budget,
            "effort": dataclasses.replace(run.effort, seconds=min(run.effort.seconds, 3.0)),
        },
    )
    parts = run.results.data.setdefault("parts", {})
    for title, part in plan(run):
        if parts.get(title) == "finished":
            continue
        left = run.deadline - time.monotonic()
        if left < GOOD:
            parts[title] = "no time left"
            run.results.write()
            continue
        try:
            with interrupted_after(left):
                part(run)
            parts[title] = "finished" if not run.out_of_time() else "cut off"
        except OutOfTime:
            parts[title] = "cut off"
        except Exception as error:  # one part's failure costs the others nothing
            parts[title] = f"failed: {type(error).__name__}: {error}"
        console.print(f"gpu: {title}: {parts[title]}, {run.deadline - time.monotonic():.0f} s left")
        run.results.write()


class interrupted_after:
    """Raise OutOfTime in the main thread after `seconds`, between two lines of Python: it stops compilers too."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise OutOfTime

        self.before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
