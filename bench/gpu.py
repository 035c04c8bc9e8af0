"""Everything that is worth knowing about a GPU in nine minutes, the most valuable numbers first.

`python -m bench gpu`; each case is on disk as soon as it is measured, and `--resume` goes on after the last one. Every
part has a share of the time, so that none can take what the later ones need; what is left at the end goes to those that
were cut off. `--backend auto` is Triton here: these are the numbers that dispatch is decided from. With `--device cpu`
the same plan runs on a stand-in: the small Jasper and small shapes.
"""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench import kernels, latency, launches, memory, sub_blocks, train
from bench.harness import OutOfTime, Run, console
from bench.machine import ROOT

BUDGET = 540.0
LIGHT = "eager,eager_no_masks,eager_2d_channels_last,cuda_graph"
LIGHT_TRAINING = "eager,eager_2d_channels_last"
SLOW = "compile_max_autotune"
GOOD = 10.0  # seconds that must be left for another part to be worth starting


@dataclass(frozen=True)
class Part:
    """`measure(run)` takes at most `seconds` of `BUDGET`, and more only when all the others had theirs."""

    title: str
    seconds: float
    measure: Callable[[Run], object]


def plan(run: Run) -> list[Part]:
    """The parts in order of value; slow compilers come last, where they can cost nothing but themselves."""
    light, light_training = ({"rivals": r} for r in (LIGHT, LIGHT_TRAINING))
    if run.device.type == "cpu":
        shapes = ((2, 64, 100), (2, 96, 100))
        layer = sub_blocks.Layer(64, 64, 11)
        return [
            Part("self-check", 60, lambda r: selfcheck(r, quick=True, ops=("bn_relu_dropout",), faces=("cpu",))),
            Part(
                "bn_relu_dropout",
                60,
                lambda r: r.cases("kernels", [kernels.bn_relu_dropout(r, s, "both", False, False) for s in shapes]),
            ),
            Part("latency", 60, lambda r: latency.main(with_(r, light), "small", grid=((1, 2.0), (2, 2.0)))),
            Part("training step", 60, lambda r: train.main(with_(r, light_training), (("small", 2, 64),))),
            Part("memory", 60, lambda r: memory.main(r, (("small", 2, 64),))),
            Part(
                "sub-blocks",
                60,
                lambda r: r.cases(
                    "kernels",
                    sub_blocks.layer_cases(r, "sub_block", 2, 64, layer, ("forward", "backward", "inference")),
                ),
            ),
            Part("launches", 60, launches.main),
        ]
    model = "jasper10x5"
    return [
        Part("self-check", 60, lambda r: selfcheck(r, quick=True)),
        Part(
            "bn_relu_dropout",
            40,
            lambda r: r.cases("kernels", kernels.cases_bn_relu_dropout(with_(r, {"quick": True, "rivals": "eager"}))),
        ),
        Part(
            "latency of one utterance",
            60,
            lambda r: latency.main(with_(r, light), model, grid=((1, 2.0), (1, 7.0), (1, 16.7))),
        ),
        Part("training step", 60, lambda r: train.main(with_(r, light_training), ((model, 32, 1680),))),
        Part("memory", 20, lambda r: memory.main(r, ((model, 8, 1680),))),
        Part(
            "sub-blocks",
            140,
            lambda r: all_layers(r, LIGHT_TRAINING, "sub_block", ("forward", "backward", "inference")),
        ),
        Part("the five largest convs", 30, lambda r: all_layers(r, LIGHT_TRAINING, "conv1d", ("forward",), 5)),
        Part("tuning", 60, tuning),
        Part("sub-blocks beside max-autotune and cuDNN", 90, slow_rivals),
        Part("latency grid", 60, lambda r: latency.main(with_(r, light), model)),
        Part("convs", 60, lambda r: all_layers(r, LIGHT_TRAINING, "conv1d", ("forward", "both"))),
        Part(
            "every width of bn_relu_dropout",
            40,
            lambda r: kernels.main(with_(r, {"rivals": "eager"}), "bn_relu_dropout"),
        ),
        Part("launches", 20, lambda r: launches.main(with_(r, {"rivals": "eager,cuda_graph"}))),
        Part("training grid", 60, lambda r: train.main(with_(r, light_training))),
        Part(
            "bn_relu_dropout beside torch.compile",
            40,
            lambda r: kernels.main(with_(r, {"quick": True, "rivals": "compile"}), "bn_relu_dropout"),
        ),
        Part(
            "training beside torch.compile",
            120,
            lambda r: train.main(with_(r, {"rivals": "eager,compile"}), ((model, 32, 1680),)),
        ),
        Part(
            "latency beside torch.compile",
            120,
            lambda r: latency.main(
                with_(r, {"rivals": "eager,compile,compile_reduce_overhead"}), model, grid=((1, 2.0),)
            ),
        ),
        Part(
            "latency beside other runtimes",
            120,
            lambda r: latency.main(with_(r, {"rivals": "eager,onnxruntime,tensorrt"}), model, grid=((1, 2.0),)),
        ),
        Part(
            "latency beside frozen blocks",
            120,
            lambda r: latency.main(with_(r, {"rivals": "eager,compile_blocks_frozen"}), model, grid=((1, 2.0),)),
        ),
        Part("self-check in full", 240, lambda r: selfcheck(r, quick=False)),
    ]


def with_(run: Run, changes: dict) -> Run:
    """The same run with other settings."""
    return dataclasses.replace(run, **changes)


def selfcheck(run: Run, *, quick: bool, **which: tuple[str, ...]) -> None:
    """The verdicts of `jasper-fast selfcheck` for this device, kept for dispatch and in the result; `which`: `ops` and
    `faces` to check, not all."""
    from jasper_fast import selfcheck as check
    from jasper_fast import trust

    started = time.monotonic()
    rows = check.supervise(run.device, quick=quick, **which)
    found = check.verdicts(rows, quick)
    with trust.locked():
        trust.keep(run.device, found)
    bad = [check.failure_of(row) for row in rows if row["status"] != "ok"]
    run.results.data["selfcheck"] = {
        "quick": quick,
        "seconds": round(time.monotonic() - started, 1),
        "verdicts": [vars(verdict) for verdict in found],
        "failures": bad,
    }
    for line in bad[:5]:
        console.print(f"[red]self-check: {line}[/]")
    run.results.write()


def all_layers(run: Run, chosen: str, op: str, modes: tuple[str, ...], count: int | None = None) -> None:
    """An op at the `count` largest layers (default: all), layer by layer, in a second or so a case."""
    run = with_(
        run, {"rivals": chosen, "effort": dataclasses.replace(run.effort, seconds=min(run.effort.seconds, 1.0))}
    )
    for layer in sub_blocks.layers()[:count]:
        run.cases(
            f"{op} {layer.C_in}->{layer.C_out}",
            sub_blocks.layer_cases(run, op, *sub_blocks.batch(run, layer), layer, modes),
        )


def slow_rivals(run: Run) -> None:
    """Sub-blocks beside what takes long to prepare: cuDNN's patterns at every layer first, then max-autotune."""
    modes = ("forward", "inference", "backward")
    all_layers(run, "cudnn", "sub_block", ("forward", "inference"))
    all_layers(run, SLOW, "sub_block", modes)


def tuning(run: Run) -> None:
    """Tiles of the most valuable shapes, as far as the time goes: `python -m bench tune` in a process of its own, which
    a kernel may take down, with a result of its own, which `--install` takes."""
    out, left = run.results.path.parent, run.deadline - time.monotonic() - 5.0
    dtype = {"float16": "fp16", "bfloat16": "bf16"}.get(kernels.name(run.dtype), "fp32")
    command = ["-m", "bench", "tune", "--device", str(run.device), "--dtype", dtype, "--out", str(out), "--resume"]
    command += ["--budget", f"{left:.0f}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    run.results.data["tuning"] = {"command": " ".join(["python", *command]), "status": done.returncode}
    if done.returncode:
        raise RuntimeError(f"bench tune ended with status {done.returncode}")


def main(run: Run, budget: float = BUDGET) -> None:
    """Work through the plan until it is done or the budget, counted from the run's start, is spent."""
    end, scale = run.started + budget, budget / BUDGET
    changes = {"effort": dataclasses.replace(run.effort, seconds=min(run.effort.seconds, 3.0))}
    if run.device.type == "cuda" and run.backend == "auto":
        changes["backend"] = "triton"
    run = with_(run, changes)
    run.results.data["backend"] = run.backend
    todo = plan(run)
    parts = run.results.data.setdefault("parts", {})
    for again in (False, True):  # once in its share of the time, and once more in what is left
        for part in todo:
            if parts.get(part.title) == "finished" or (again and parts.get(part.title) != "cut off"):
                continue
            left = end - time.monotonic()
            if left < GOOD:
                parts.setdefault(part.title, "no time left")
                continue
            parts[part.title] = _measure(run, part, left if again else min(left, part.seconds * scale))
            console.print(f"gpu: {part.title}: {parts[part.title]}, {end - time.monotonic():.0f} s left")
            run.results.write()
    run.results.write()


def _measure(run: Run, part: Part, seconds: float) -> str:
    """How the part ended; one part's failure costs the others nothing."""
    run = with_(run, {"deadline": time.monotonic() + seconds})
    try:
        with interrupted_after(seconds):
            part.measure(run)
        return "cut off" if run.out_of_time() else "finished"
    except OutOfTime:
        return "cut off"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


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
