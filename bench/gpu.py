"""Everything that is worth knowing about a GPU in nine minutes, the most valuable numbers first.

`python -m bench gpu`; each case is on disk as soon as it is measured, and `--resume` goes on after the last one. Every
part has a share of the time, so that none can take what the later ones need; what is left at the end goes to those that
were cut off. A part that fails costs the others nothing: where it took the GPU's context with it, the run goes on in a
new process, and a part is tried twice at most. `--backend auto` is Triton here: these are the numbers that dispatch is
decided from; what the self-check finds bad is not timed. Tiles are `python -m bench tune`, a command of its own: one
case compiles up to 18. With `--device cpu` the same plan runs on a stand-in: the small Jasper and small shapes.
"""

import contextlib
import dataclasses
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench import cudnn_search, harness, kernels, latency, launches, memory, panes, result_file, sub_blocks, train, warm
from bench.harness import DeviceLost, OutOfTime, Run, console
from bench.machine import ROOT

BUDGET = 540.0
MODEL = "jasper10x5"
ALL_MODES = ("backward", "forward", "inference")  # the first one's fp64 answers hold the second's
LIGHT = "eager,eager_no_masks,eager_2d_channels_last,cuda_graph"
LIGHT_TRAINING = "eager,eager_2d_channels_last"
SLOW = "compile_max_autotune"
CASE = 3.0  # seconds, at most
GOOD = 10.0  # seconds that must be left for another part to be worth starting
AGAIN = 20.0  # seconds from one interruption to the next, where the first was lost
PATIENCE = 60.0  # seconds after a part's time in which the interpreter must have come back from a kernel or compiler
UNTIL = "BENCH_GPU_UNTIL"  # the time of day at which the budget ends, for the process that goes on with a run


@dataclass(frozen=True)
class Part:
    """`measure(run)` takes at most `seconds` of `BUDGET`, and more only when all the others had theirs."""

    title: str
    seconds: float
    measure: Callable[[Run], object]


def plan(run: Run) -> list[Part]:
    """The parts in order of value."""
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
                    sub_blocks.layer_cases(r, "sub_block", 2, 64, layer, ALL_MODES),
                ),
            ),
            Part("panes", 60, lambda r: all_panes(r, [panes.Block((64, 64), 96)], (2, 64))),
            Part("launches", 60, launches.main),
        ]
    return [*first_nine_minutes(light, light_training), *and_then(light, light_training)]


def first_nine_minutes(light: dict, light_training: dict) -> list[Part]:
    """What a GPU is asked first; the shares together are the budget. First come ops that the host hardly touches."""
    return [
        Part("self-check", 90, ready),
        Part(
            "bn_relu_dropout",
            25,
            lambda r: r.cases("kernels", kernels.cases_bn_relu_dropout(with_(r, {"quick": True, "rivals": "eager"}))),
        ),
        Part("the five largest convs", 30, lambda r: all_layers(r, LIGHT_TRAINING, "conv1d", ("forward",), 5)),
        Part("training step", 75, lambda r: train.main(with_(r, light_training), ((MODEL, 32, 1680),))),
        Part(
            "latency of one utterance",
            50,
            lambda r: latency.main(with_(r, light), MODEL, grid=((1, 2.0), (1, 7.0), (1, 16.7))),
        ),
        Part("launches", 30, all_launches),
        Part("memory", 20, lambda r: memory.main(r, ((MODEL, 8, 1680),))),
        Part("panes", 25, lambda r: all_panes(r, panes.ends_and_middle())),
        Part("sub-blocks", 110, lambda r: all_layers(r, LIGHT_TRAINING, "sub_block", ALL_MODES)),
        Part("training grid", 40, lambda r: train.main(with_(r, {"rivals": f"{LIGHT_TRAINING},eager_no_masks"}))),
        Part("self-check in full", 45, selfcheck_in_full),
    ]


def and_then(light: dict, light_training: dict) -> list[Part]:
    """What `--resume` goes on with; slow compilers come last, where they can cost nothing but themselves."""
    return [
        Part("sub-blocks beside max-autotune and cuDNN", 90, slow_rivals),
        Part("latency grid", 60, lambda r: latency.main(with_(r, light), MODEL)),
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
            lambda r: kernels.main(with_(r, {"quick": True, "rivals": "compile"}), "bn_relu_dropout"),
        ),
        Part(
            "training beside torch.compile",
            120,
            lambda r: train.main(with_(r, {"rivals": "eager,compile"}), ((MODEL, 32, 1680),)),
        ),
        Part(
            "latency beside torch.compile",
            120,
            lambda r: latency.main(
                with_(r, {"rivals": "eager,compile,compile_reduce_overhead"}), MODEL, grid=((1, 2.0),)
            ),
        ),
        Part(
            "latency beside other runtimes",
            120,
            lambda r: latency.main(with_(r, {"rivals": "eager,onnxruntime,tensorrt"}), MODEL, grid=((1, 2.0),)),
        ),
        Part(
            "latency beside frozen blocks",
            120,
            lambda r: latency.main(with_(r, {"rivals": "eager,compile_blocks_frozen"}), MODEL, grid=((1, 2.0),)),
        ),
    ]


def with_(run: Run, changes: dict) -> Run:
    """The same run with other settings."""
    return dataclasses.replace(run, **changes)


def ready(run: Run) -> None:
    """The quick self-check in the run's dtype, while other processes compile what the next parts run."""
    with warm.compilers(run, ("bn_relu_dropout", "the five largest convs", "latency of one utterance", "sub-blocks")):
        selfcheck(run, quick=True, dtypes=(kernels.name(run.dtype),))


def selfcheck(run: Run, *, quick: bool, **which: tuple[str, ...]) -> None:
    """The verdicts of `jasper-fast selfcheck` for this device, kept for dispatch and in the result; `which`: `ops`,
    `faces` and `dtypes` to check, not all. What was decided when the time ran out is kept too."""
    from jasper_fast import selfcheck as check

    started, report = time.monotonic(), check.Report()
    try:
        check.supervise(run.device, quick=quick, report=report, **which)
    finally:
        keep_verdicts(run, report.decided(), quick, time.monotonic() - started)


def keep_verdicts(run: Run, rows: Sequence[dict], quick: bool, seconds: float) -> None:
    """What the rows of a self-check say, for dispatch and in the result."""
    from jasper_fast import selfcheck as check
    from jasper_fast import trust

    found = check.verdicts(rows, quick)
    with trust.locked():
        trust.keep(run.device, found)
    bad = [check.failure_of(row) for row in rows if row["status"] != "ok"]
    told = run.results.data.setdefault("selfcheck", {"seconds": 0.0, "verdicts": [], "failures": []})
    told["seconds"] = round(told["seconds"] + seconds, 1)
    new = {group(vars(verdict)): vars(verdict) for verdict in found}
    told["verdicts"] = [v for v in told["verdicts"] if group(v) not in new] + list(new.values())
    told["failures"] += [line for line in bad if line not in told["failures"]]
    for line in bad[:5]:
        console.print(f"self-check: {line}", style="red", markup=False)
    run.results.write()


def group(verdict: dict) -> tuple[str, str, str]:
    """What a verdict is about."""
    return verdict["op"], verdict["face"], verdict["dtype"]


def selfcheck_in_full(run: Run) -> None:
    """All checks, those of the run's dtype first; a verdict that was reached is not asked for again."""
    from jasper_fast import checks

    verdicts = run.results.data.get("selfcheck", {}).get("verdicts", ())
    done = {group(v) for v in verdicts if not v["quick"]}
    left = [c for c in checks.plan(run.device) if (c.op, c.face, c.dtype) not in done]
    own = kernels.name(run.dtype)
    for dtype in sorted({c.dtype for c in left}, key=lambda dtype: (dtype != own, dtype)):
        ops = dict.fromkeys(c.op for c in left if c.dtype == dtype)
        selfcheck(run, quick=False, ops=tuple(ops), dtypes=(dtype,))


def all_launches(run: Run) -> None:
    """Launches of small calls; which algorithm cuDNN launches is no part of the question."""
    with cudnn_search.off():
        launches.main(with_(run, {"rivals": "eager,cuda_graph"}))


def in_a_second(run: Run, chosen: str) -> Run:
    """The same run with these rivals, in a second or so a case."""
    return with_(run, {"rivals": chosen, "effort": run.effort.at_most(1.0)})


def all_panes(run: Run, blocks: Sequence[panes.Block], size: tuple[int, int] | None = None) -> None:
    """The panes of these blocks in both forms, block by block: what decides which of them a GPU takes."""
    run = in_a_second(run, LIGHT_TRAINING)
    for block in blocks:
        cases = panes.block_cases(run, block, kernels.MODES, *(size or sub_blocks.size(run)))
        run.cases(f"panes {cases[0].key['panes']}", cases)


def all_layers(run: Run, chosen: str, op: str, modes: tuple[str, ...], count: int | None = None) -> None:
    """An op at the `count` largest layers (default: all), layer by layer, in a second or so a case."""
    run = in_a_second(run, chosen)
    for layer in sub_blocks.layers()[:count]:
        run.cases(
            f"{op} {layer.C_in}->{layer.C_out}",
            sub_blocks.layer_cases(run, op, *sub_blocks.batch(run, layer), layer, modes),
        )


def slow_rivals(run: Run) -> None:
    """Sub-blocks beside what takes long to prepare: cuDNN's patterns at every layer first, then max-autotune."""
    modes = ("forward", "inference", "backward")
    if importlib.util.find_spec("cudnn") is None:  # a row that says so is no reason to time the others twice
        all_layers(run, f"cudnn,{SLOW}", "sub_block", modes)
        return
    all_layers(run, "cudnn", "sub_block", ("forward", "inference"))
    all_layers(run, SLOW, "sub_block", modes)


def main(run: Run, budget: float = BUDGET) -> None:
    """Work through the plan until it is done or the budget, counted from the run's start, is spent."""
    scale = budget / BUDGET
    end = run.started + budget
    if UNTIL in os.environ:  # this process goes on with another's budget
        end = time.monotonic() + float(os.environ.pop(UNTIL)) - time.time()
    changes = {"effort": run.effort.at_most(CASE)}
    if run.device.type == "cuda" and run.backend == "auto":
        changes["backend"] = "triton"
    run = with_(run, changes)
    run.results.data["backend"] = run.backend
    parts, faults = (run.results.data.setdefault(name, {}) for name in ("parts", "faults"))
    begun = set()
    for again in (False, True):  # once in its share of the time, and once more in what is left
        for part in plan(run):
            how, failed = parts.get(part.title), faults.get(part.title, 0)
            if how == "finished" or failed >= result_file.TRIES:
                continue
            if (part.title in begun and how != "cut off") if again else failed:
                continue  # what failed in an earlier process waits for the others; in this one it is not tried again
            left = end - time.monotonic()
            if left < GOOD:
                parts.setdefault(part.title, "no time left")
                continue
            begun.add(part.title)

            def ended(how: str, gone: bool, part: Part = part) -> None:
                parts[part.title] = how
                if how.startswith("failed"):
                    faults[part.title] = faults.get(part.title, 0) + 1
                console.print(f"gpu: {part.title}: {how}, {end - time.monotonic():.0f} s left", markup=False)
                run.results.write()
                if gone:
                    go_on_elsewhere(run, end)

            share = left if again else min(left, part.seconds * scale)
            with outlasted(lambda ended=ended: ended("failed: a kernel or a compiler does not come back", True), share):
                how, gone = _measure(run, part, share)
            ended(how, gone)
            harness.tidy(run.device)
    run.results.write()


def _measure(run: Run, part: Part, seconds: float) -> tuple[str, bool]:
    """How the part ended, and whether the device ended with it; one part's failure costs the others nothing."""
    run, gone = with_(run, {"deadline": time.monotonic() + seconds}), False
    try:
        with interrupted_after(seconds):
            part.measure(run)
        how = "cut off" if run.out_of_time() else "finished"
    except OutOfTime:
        how = "cut off"
    except DeviceLost as error:
        how, gone = f"failed: {error}", True
    except (Exception, SystemExit) as error:
        how = f"failed: {harness.first_line(error)}"
    interrupted_after.no_more()
    if how == "cut off":
        end_compilers()
    if why := harness.lost(run.device):  # an error that came too late to belong to anyone
        how, gone = how if how.startswith("failed") else f"failed: {why}", True
    return how, gone


def end_compilers() -> None:
    """Ends the processes that torch.compile compiles in: what a part that was cut off has queued there would compile on
    beside the timing of the next ones. They start anew when they are needed."""
    compilers = sys.modules.get("torch._inductor.async_compile")
    if compilers is None:
        return
    for pool in list(compilers._pool_set):
        if (process := getattr(pool, "process", None)) is not None:
            process.kill()  # else the shutdown waits for its queue, up to five minutes
    compilers.shutdown_compile_workers()


def go_on_elsewhere(run: Run, end: float) -> None:
    """The same command with --resume in this process's place: an illegal access is for ever, in the process that made
    it. All that was found is on disk. Does not return."""
    console.print("gpu: nothing runs on the device any more in this process: going on in a new one", markup=False)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {UNTIL: str(time.time() + end - time.monotonic()), "PYTHONPATH": path}
    sys.stdout.flush()
    sys.stderr.flush()
    for entry in os.listdir("/proc/self/fd"):  # the driver's files must not keep the old context alive
        with contextlib.suppress(OSError):  # the listing's own
            if int(entry) > 2:
                os.set_inheritable(int(entry), False)
    signal.setitimer(signal.ITIMER_REAL, 0)  # timers outlive this
    arguments = [*run.arguments, *(["--resume"] if "--resume" not in run.arguments else [])]
    os.execve(sys.executable, [sys.executable, "-m", "bench", *arguments], env)


@contextlib.contextmanager
def outlasted(give_up: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `give_up` in a thread if the body takes PATIENCE longer than `seconds`: no signal ends a call into C++ that
    waits for a kernel that never ends."""
    timer = threading.Timer(seconds + PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class interrupted_after:
    """Raise OutOfTime in the main thread after `seconds`, between two lines of Python: it stops compilers too.

    And every AGAIN seconds from then on, until the body ends: Python drops what is raised in a destructor or a weak
    reference's callback, and a compiler's process is full of them. `no_more` is for who has caught it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @staticmethod
    def no_more() -> None:
        """Ends it where one came just as the body had ended."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            raise OutOfTime

        self.before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        self.no_more()
        signal.signal(signal.SIGALRM, self.before)
