"""Which tile and which face: `python -m bench tune` measures, `--install RESULT` makes it the choice.

Every distinct conv of Jasper 10x5 and every width of its bn_relu_dropout, by op and by the power of two of the rows, in
the order of their share of the network's work, so that a run cut off has the most valuable rows. A conv's contenders
are the tiles that the kernels propose and ATen's own conv, those of bn_relu_dropout its faces. Each is compared with
fp64 first: what is wrong, spills or does not compile is a row that says so and is never chosen. The slow ones leave
after three rounds; the rest are timed in turns. On a GPU a contender is a CUDA graph of one call, so the host's part of
a launch counts for none, and all tiles of a case are compiled ahead, in threads. The result file holds the table as far
as it has come; `--resume` goes on, and skips a configuration that ended the process.

With TRITON_INTERPRET=1 and `--device cpu` the same code runs on tiny shapes in Triton's interpreter: a stand-in, whose
result cannot be installed.
"""

import argparse
import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import counts, harness, kernels, machine, models, options, rivals, sub_blocks
from bench.gpu import interrupted_after
from bench.harness import Case, Contender, DeviceLost, OutOfTime, Run, Runner, console
from jasper_fast import backends, checks
from jasper_fast.kernels import tables

LOST, OUT_OF_TIME, TERMINATED = 3, 4, 128 + signal.SIGTERM  # exit statuses
BUDGET = 1800.0
LONGEST_START = 120.0  # seconds from the process's start to this module: more, and /proc tells something else
LOADED = time.monotonic()
SECONDS = 1.5  # a case
FIRST_ROUNDS = harness.Effort(seconds=0.3, min_rounds=3, max_rounds=3, target=0.0)
SLOW = 1.3  # times the fastest after the first rounds: not timed further
CONV_OPS = ("forward", "forward_stats", "dgrad", "dgrad_bn", "wgrad", "fused")
OPS = (*CONV_OPS, *tables.NORM_OPS)
# what a training step calls of bn_relu_dropout, as a function of the checks: statistics and forward; reduce and apply
NORM_FUNCTIONS = dict(zip(tables.NORM_OPS, ("stats_forward", "backward"), strict=True))
# N and T' by bucket, 16.7 s being 840 frames behind the prologue, 2 s 104: the training batches, and inference at N = 1
TRAINING = ((32, 840), (16, 840), (8, 840))
INFERENCE = ((1, 104), (1, 840), (1, 352), (4, 840), (16, 840))
STAND_IN = ((2, 14),)
LIBRARY = "aten"  # cuDNN on a GPU
AHEAD = "all tiles, compiled ahead"  # what is being tried while no contender is
PLAIN = (LIBRARY, "reference")  # what is not ours


class Layer(NamedTuple):
    """A distinct conv of the network, or a width of its norms; `share`: of the network's arithmetic, or of a training
    step's bytes, all its copies together."""

    c_in: int
    c_out: int
    taps: int
    stride: int
    dilation: int
    kind: str
    share: float


class Terminated(BaseException):
    """SIGTERM: no error handling may swallow it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument(
        "--device", type=options.device, default=None, help="cuda, cuda:1, or cpu for the stand-in (default: the GPU)"
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default=None, help="default: bf16; fp32 on a CPU")
    parser.add_argument("--ops", default="all", help=f"all, or some of {','.join(OPS)}")
    parser.add_argument(
        "--seconds", type=options.seconds, default=SECONDS, help=f"time to spend on each case ({SECONDS})"
    )
    parser.add_argument(
        "--budget", type=options.seconds, default=BUDGET, metavar="SECONDS",
        help=f"of this process, when to stop ({BUDGET:.0f}), with exit status {OUT_OF_TIME}; --resume goes on",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "build" / "bench", metavar="DIR",
        help="folder for the JSON file (default: build/bench)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="go on with the last run cut off on this machine and commit"
    )
    parser.add_argument(
        "--install", type=Path, metavar="RESULT", help="no measuring: put a result's rows into the GPU's table"
    )
    parser.set_defaults(threads=None, quick=False, backend="triton", rivals="default")


def main(args: argparse.Namespace, start: Callable[[argparse.Namespace], Run]) -> int:
    """Run the subcommand; returns its exit status.

    0: all is measured; 1: an unusable result; 3: a kernel lost the device; 4: out of time; 143: ended by SIGTERM. After
    the last three what there is is on disk, and --resume goes on.
    """
    if args.install:
        return install(args.install)
    ops = OPS if args.ops == "all" else tuple(args.ops.split(","))
    if unknown := [op for op in ops if op not in OPS]:
        raise SystemExit(f"--ops {unknown[0]}: not one of all, {', '.join(OPS)}")
    on_cpu = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).type == "cpu"
    if on_cpu:
        args.quick = True
    elif args.dtype is None:
        args.dtype = "bf16"
    if reason := backends.why_missing("triton", "cpu" if on_cpu else "cuda"):
        raise SystemExit(reason)
    return tune(start(args), ops, args.budget, args.seconds)


def tune(run: Run, ops: tuple[str, ...], budget: float, seconds: float) -> int:
    """Work through the cases until they are done or the budget, counted from the process's start, is spent."""
    run.deadline = born() + budget
    run.effort = dataclasses.replace(run.effort, seconds=seconds)
    trial = Trial(run.results.path.with_suffix(".trying"))
    note_killer(run, trial)
    todo = plan(run.device, ops)
    try:
        with terminated(trial):
            status = work(run, todo, trial)
    except Terminated:
        status = TERMINATED
    if status != LOST:
        trial.forget()
    done = sum(finished(run, make_case(run, *what, trial)) for what in todo)
    run.results.data["finished"] = done == len(todo)
    run.results.data["seconds"] = round(time.monotonic() - run.started, 1)
    put_table(run)
    summary(run, done, len(todo))
    return status


def work(run: Run, todo: list[tuple[str, Layer, tuple[int, int]]], trial: "Trial") -> int:
    """Measure what is not measured yet, the file written after every case; returns the exit status."""
    for number, (op, layer, batch) in enumerate(todo, 1):
        case = make_case(run, op, layer, batch, trial)
        if finished(run, case):
            continue
        left = run.deadline - time.monotonic()
        if left <= 0:
            return OUT_OF_TIME
        trial.case, trial.key, trial.facts = case.id, case.key, {}
        console.print(f"tune {number} of {len(todo)}: {case.label()}, {left:.0f} s left")
        try:
            with interrupted_after(left):
                rows = attempt(run, (op, layer, batch), trial)
        except OutOfTime:
            interrupted_after.no_more()
            return OUT_OF_TIME
        except KeyboardInterrupt:  # by a person, not by the configuration that was being tried
            trial.forget()
            raise
        except DeviceLost as error:
            say(f"{error}: this process is of no more use, --resume goes on without it")
            return LOST
        trial.forget()
        run.results.add(rows)
        put_table(run)
    return 0


def born() -> float:
    """When this process started, on the monotonic clock: a parent counts from there, and importing takes seconds."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return LOADED
    started = time.monotonic() - age
    return started if LOADED - LONGEST_START < started <= LOADED else LOADED


@contextlib.contextmanager
def terminated(trial: "Trial") -> Iterator[None]:
    """SIGTERM raises Terminated between two lines of Python, and clears the trial at once: a parent that has no more
    time may kill before a compiler or a kernel comes back to Python."""

    def stop(*_: object) -> None:
        raise Terminated

    def watch() -> None:
        while (told := os.read(reader, 1)) and told[0] != signal.SIGTERM:
            pass
        if told:
            trial.forget()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = signal.signal(signal.SIGTERM, stop)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(writer)
        thread.join()
        os.close(reader)


def attempt(run: Run, what: tuple[str, Layer, tuple[int, int]], trial: "Trial") -> list[dict]:
    """The rows of a case; where it cannot be measured at all (no memory for its inputs, say), they say so."""
    case = make_case(run, *what, trial)
    case.device = run.device
    try:
        return measure(run, case, trial)
    except DeviceLost:
        accuse(case, trial)
        raise
    except Exception as error:  # one case's failure costs the others nothing
        if told := harness.lost(run.device):
            accuse(case, trial)
            raise DeviceLost(f"{case.label()}: {told}") from error
        why = harness.first_line(error)
    case = make_case(run, *what, trial)
    case.failed = {c.name: ("failed", why) for c in case.contenders}
    rows = harness.rows(case, {}, {}, run.device)
    return [row | {"tune": c.row} for row, c in zip(rows, case.contenders, strict=True)]


def accuse(case: Case, trial: "Trial") -> None:
    """Notes who lost the device: it may have been another than the last that was tried first."""
    for name, (_, why) in case.failed.items():
        if why.startswith(harness.LOST) or "CUDA error" in why:
            trial.begin(name)
            return


def finished(run: Run, case: Case) -> bool:
    """Whether the result has all rows of a case."""
    return run.results.has(case.id, [c.name for c in case.contenders])


# ------------------------------------------------------------------ what is tuned


def layers(device: torch.device) -> list[Layer]:
    """Distinct convs of Jasper 10x5 by their share of its arithmetic; two tiny ones for the stand-in."""
    if device.type == "cpu":
        return [Layer(16, 24, 3, 1, 1, "main", 0.8), Layer(24, 12, 1, 1, 1, "decoder", 0.2)]
    cfg = models.config("jasper10x5")
    flops: dict[tuple, float] = {}
    kinds: dict[tuple, str] = {}
    total = 0.0
    for conv in counts.convs(cfg, 1, 840):
        stride = dilation = 1
        kind = "decoder"
        if conv.name.startswith("encoder"):
            block = cfg.encoder.blocks[int(conv.name.split(".")[2])]
            kind = "pane" if ".res." in conv.name else "main" if block.s == 1 else "prologue"
            if kind != "pane":
                stride, dilation = block.s, block.d
        key = (conv.C_in, conv.C_out, conv.K, stride, dilation)
        flops[key] = flops.get(key, 0.0) + conv.flops
        kinds[key] = kinds.get(key, kind) if kinds.get(key) != "pane" else kind  # a main conv may have a pane's shape
        total += conv.flops
    return [Layer(*key, kinds[key], flops[key] / total) for key in sorted(flops, key=lambda k: -flops[k])]


def norms(device: torch.device) -> list[Layer]:
    """The widths of Jasper 10x5's bn_relu_dropout by their share of the bytes that a training step moves.

    They are bound by memory as the convs are by arithmetic, so their work is bytes. Forward and backward have one share
    between them: dispatch asks for both together, and one row without the other chooses nothing.
    """
    if device.type == "cpu":
        return [Layer(24, 24, 1, 1, 1, "norm", 0.1)]
    cfg, size = models.config("jasper10x5"), 2
    n, frames = TRAINING[0]
    frames *= 2  # the prologue halves them
    moved: dict[int, int] = {}
    for conv in counts.convs(cfg, n, frames):
        if conv.batch_norm and ".res." not in conv.name:  # a pane's norm is another op
            nbytes = counts.bn_relu_dropout_bytes(n, conv.C_out, conv.T_out, size, "both")
            moved[conv.C_out] = moved.get(conv.C_out, 0) + nbytes
    total = counts.training_bytes(cfg, n, frames, size)
    return [Layer(c, c, 1, 1, 1, "norm", moved[c] / total) for c in sorted(moved, key=lambda c: -moved[c])]


def plan(device: torch.device, ops: tuple[str, ...]) -> list[tuple[str, Layer, tuple[int, int]]]:
    """(op, layer, (N, T')) by value: the layer's share, halved from one batch to the next."""
    found = []
    for layer in layers(device) + norms(device):
        for op in ops:
            if op not in used(layer.kind):
                continue
            batches = STAND_IN if device.type == "cpu" else INFERENCE if op == "fused" else TRAINING
            found += [(layer.share * 0.5**rank, op, layer, batch) for rank, batch in enumerate(batches)]
    return [(op, layer, batch) for _, op, layer, batch in sorted(found, key=lambda item: -item[0])]


def used(kind: str) -> tuple[str, ...]:
    """The ops that a layer of this kind is called with."""
    return {
        "main": CONV_OPS,
        "prologue": ("forward", "forward_stats", "wgrad", "fused"),  # the features need no gradient
        "decoder": ("forward", "dgrad", "wgrad", "fused"),
        "pane": ("forward", "dgrad", "wgrad"),  # at inference a part of the conv that they are added to
        "norm": tables.NORM_OPS,  # at inference a part of the conv before them
    }[kind]


def make_case(run: Run, op: str, layer: Layer, batch: tuple[int, int], trial: "Trial") -> Case:
    """One op of one layer at one batch, and its contenders."""
    n, frames = batch
    size, dtype = run.dtype.itemsize, tables.DTYPES[run.dtype]
    if layer.kind == "norm":
        # lengths, dropout and the halo of a conv, as a Jasper's blocks call it
        shape, variant = checks.Norm(n, layer.c_in, frames), "halo"
        check = checks.Check("bn_relu_dropout", "triton", NORM_FUNCTIONS[op], "candidate", shape, dtype, variant)
        mode = op.removeprefix("bn_relu_dropout.")
        flops = counts.bn_relu_dropout_flops(*shape, mode)
        nbytes = counts.bn_relu_dropout_bytes(*shape, size, mode)
        name, contenders_of, rows = op, faces, n * frames
    else:
        shape = checks.Conv(n, frames * layer.stride, layer.c_in, layer.c_out, layer.taps, layer.stride, layer.dilation)
        variant = ""
        if op == "fused":
            variant = "log-softmax" if layer.kind == "decoder" else "splits"
        family = "conv1d.fused" if op == "fused" else "conv1d"
        check = checks.Check(family, "triton", op, "candidate", shape, dtype, variant)
        conv = counts.Conv("", n, layer.c_in, layer.c_out, layer.taps, shape.t, shape.t_out)
        flops, nbytes = conv.flops, conv.nbytes(size)
        name, contenders_of, rows = f"conv1d.{op}", tiles, n * shape.t_out
    held = Held(check, run.device)
    row = {"op": name, "dtype": dtype, **{k: getattr(layer, k) for k in tables.SHAPE}, "rows_log2": tables.bucket(rows)}
    contenders = contenders_of(run, held, row, trial)
    return Case(
        "tune",
        {"op": op, "shape": str(shape), "dtype": dtype},
        contenders,
        refill=held.refill,
        reference=lambda: held.case.reference(),
        low=lambda: held.case.low(),
        tolerance=kernels.TOLERANCE if layer.kind == "norm" else sub_blocks.tolerance(run),
        ours=contenders[0].name,
        flops=flops,
        nbytes=nbytes,
        dtype=dtype,
    )


def tiles(run: Run, held: "Held", row: dict, trial: "Trial") -> list["TunedContender"]:
    """The contenders of a conv: the candidate tiles and ATen."""
    from jasper_fast.kernels.conv1d import triton_tiles

    shape, op = held.check.shape, held.check.function
    wanted = triton_tiles.Shape(*(row[k] for k in tables.SHAPE), shape.n * shape.t_out)
    proposed = triton_tiles.candidates(op, run.dtype, wanted, shape.t_out)
    made = []
    for candidate in proposed[:2] if run.device.type == "cpu" else proposed:
        tile = candidate._asdict()
        of_tile = row | {"face": "triton", "algorithm": "direct", "tile": tile}
        name = tables.Row(**of_tile, time_s=1.0).label()
        call = functools.partial(with_tile, held, tile)
        made.append(TunedContender(name, tile_builder(run, held, tile, call, name, trial), of_tile, call, held))
    library = row | {"face": LIBRARY, "algorithm": "library", "tile": None}
    return [*made, TunedContender(LIBRARY, library_builder(run, held), library)]


def faces(run: Run, held: "Held", row: dict, trial: "Trial") -> list["TunedContender"]:
    """The contenders of bn_relu_dropout: its faces, the CUDA one where it runs."""
    made = []
    for face in ("triton", "cuda", "reference"):
        if backends.why_missing(face, run.device.type) is None:
            algorithm = "library" if face == "reference" else "direct"
            call = functools.partial(held.call, face)
            of_face = row | {"face": face, "algorithm": algorithm, "tile": None}
            made.append(TunedContender(face, builder(run, held, call, face, trial), of_face, call, held))
    return made


@dataclasses.dataclass
class TunedContender(Contender):
    """A contender with what its row in the table will say; `call`, of inputs that are `held`, launches its kernels."""

    row: dict = dataclasses.field(default_factory=dict)
    call: Callable[[], object] | None = None
    held: "Held | None" = None


class Held:
    """A case's inputs, made on first use and refilled in place: captured graphs read the same memory."""

    def __init__(self, check: checks.Check, device: torch.device) -> None:
        self.check, self.device = check, device
        self._case: checks.Case | None = None
        self._derived: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], Tensor]] = {}

    def call(self, *face: str) -> dict[str, Tensor]:
        """What the face under test, or another, makes of the inputs."""
        return self.case.ours(*face)

    @property
    def case(self) -> checks.Case:
        """The functions over the inputs."""
        if self._case is None:
            self._case = checks.case(self.check, self.device, 0, timed=True)
        return self._case

    def refill(self, seed: int) -> None:
        """New values everywhere."""
        new = checks.case(self.check, self.device, seed, timed=True)
        for name, held in self.case.inputs.items():
            held.copy_(new.inputs[name])
        for make, held in self._derived.values():
            held.copy_(make(self.case.inputs))

    def derived(self, name: str, make: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """What `make` makes of the inputs, made once, and again in place after a refill."""
        if name not in self._derived:
            self._derived[name] = (make, make(self.case.inputs))
        return self._derived[name][1]


def with_tile(held: Held, tile: dict[str, int]) -> dict[str, Tensor]:
    """What the conv makes of the inputs with this tile."""
    with tables.forced(f"conv1d.{held.check.function}", tile):
        return held.call()


def unfit(run: Run, held: Held, tile: dict[str, int]) -> str | None:
    """Why the conv cannot run with this tile, or None."""
    limit = tables.SHARED_LIMIT.get(capability(run.device), max(tables.SHARED_LIMIT.values()))
    return tables.tile_fault(f"conv1d.{held.check.function}", held.check.dtype, tile, limit)


def tile_builder(
    run: Run, held: Held, tile: dict[str, int], call: Callable[[], dict[str, Tensor]], name: str, trial: "Trial"
) -> Callable[[], Runner]:
    """Builds a conv with this tile, unless it cannot fit."""

    def build() -> Runner:
        if fault := unfit(run, held, tile):
            raise ValueError(fault)
        return builder(run, held, call, name, trial)()

    return build


def builder(
    run: Run, held: Held, call: Callable[[], dict[str, Tensor]], name: str, trial: "Trial"
) -> Callable[[], Runner]:
    """Compiles and runs `call` once: refused where it spills, or takes the device with it."""

    def build() -> Runner:
        held.case  # noqa: B018 (the inputs' kernels are not the candidate's)
        trial.begin(name)
        with compiled() as facts:
            call()
            harness.synchronize(run.device)
        trial.facts[name] = facts
        if facts.get("spilled"):
            raise RuntimeError(f"spills {facts['spilled']} bytes")
        return Runner(replayed(call, run.device), call)

    return build


def library_builder(run: Run, held: Held) -> Callable[[], Runner]:
    """What stands in the kernel's place where the library convolves: its call and, in training, batch norm's pass."""
    check = held.check
    s, function = check.shape, check.function
    conv = (s.stride, s.padding, s.dilation)
    aten, bn = backends.face("conv1d", "aten"), backends.face("bn_relu_dropout", "triton")

    def channels_last(inputs: dict[str, Tensor]) -> Tensor:
        return inputs["weight"].to(run.dtype).unsqueeze(2).contiguous(memory_format=torch.channels_last)

    def call() -> dict[str, Tensor]:
        i = held.case.inputs
        # cast once, as autocast's cache and an engine do, and in the memory that cuDNN would copy it to in every call
        weight = held.derived("weight", channels_last)
        if function == "wgrad":
            return {"dw": aten.wgrad(i["x"], i["dy"], s.k, *conv, dtype=torch.float32)}
        if function.startswith("dgrad"):
            dx = aten.dgrad(i["dy"], weight.squeeze(2), s.t, *conv)
            if function == "dgrad":
                return {"dx": dx}
            norm = (i["mean"], i["rstd"], i["gamma"], i["beta"], i["lengths"], i["seed"], 0.2)
            return {
                "dx": dx,
                **dict(zip(("dbeta", "dgamma"), bn.backward_reduce(dx, i["y"], None, *norm), strict=True)),
            }
        if function == "fused":
            x, bias = i["x"].transpose(1, 2).unsqueeze(2), held.derived("bias", lambda i: i["bias"].to(run.dtype))
            z = F.conv2d(x, weight, bias, (1, s.stride), (0, s.padding), (1, s.dilation)).squeeze(2)
            z = z.float().log_softmax(1) if check.variant == "log-softmax" else z.relu_()
            return {"z": z.masked_fill_(beyond(i["out_lengths"], z.shape[2]), 0.0).transpose(1, 2)}
        y = aten.forward(i["x"], weight.squeeze(2), *conv)
        return {"y": y} | (dict(zip(("mean", "m2"), bn.stats(y), strict=True)) if function == "forward_stats" else {})

    def outputs() -> dict[str, Tensor]:
        found = call()
        if function == "dgrad_bn":  # g is of the pass that comes after, and not timed: the kernel's epilogue has it too
            i, plain = held.case.inputs, backends.face("bn_relu_dropout", "reference")
            norm = (i["y"], None, i["mean"], i["rstd"], i["gamma"], i["beta"])
            of_dx = plain.backward_apply(found["dx"], *norm, None, None, i["lengths"], i["seed"], 0.2, True)
            found["g"] = of_dx[1]
        return found

    def build() -> Runner:
        call()
        return Runner(replayed(call, run.device), outputs)

    return build


def compile_ahead(run: Run, case: Case, trial: "Trial") -> None:
    """Compiles all tiles of a case in threads, so that the contenders' first calls find them compiled.

    What does not compile says so in its own row, when it is tried. Where the process dies in here, the next one knows,
    and compiles one after another, which tells who it was.
    """
    ours = [c for c in case.contenders if c.row["face"] == "triton"]
    ours = [c for c in ours if c.row["tile"] is None or unfit(run, c.held, c.row["tile"]) is None]
    if len(ours) < 2:
        return
    ours[0].held.case  # noqa: B018 (the inputs' kernels are launched, the candidates' only compiled)
    trial.begin(AHEAD)
    # in a context of its own, which an interruption cannot leave in Triton's asynchronous mode
    contextvars.copy_context().run(_compile_ahead, [c.call for c in ours])
    trial.forget()


def _compile_ahead(calls: list[Callable[[], object]]) -> None:
    import triton

    from jasper_fast.kernels import launch

    def only_compile(kernel: object, grid: tuple, like: Tensor, *args: object, **meta: object) -> None:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            kernel.run(*args, grid=tuple(grid), warmup=True, **meta)

    run, pool = launch.run, ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0))))
    launch.run = only_compile
    try:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            try:
                for call in calls:
                    with contextlib.suppress(Exception):
                        call()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        launch.run = run
        pool.shutdown(wait=False, cancel_futures=True)


def beyond(lengths: Tensor, frames: int) -> Tensor:
    """(N, 1, T), true at t >= length."""
    return (torch.arange(frames, device=lengths.device) >= lengths[:, None])[:, None]


def replayed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`call` as a CUDA graph, itself on the CPU."""
    if device.type != "cuda":
        return call
    graph, _ = rivals.captured(call)
    return graph.replay


@contextlib.contextmanager
def compiled() -> Iterator[dict]:
    """What the compiler says of the kernels launched inside, the most of each; empty where they are interpreted."""
    from jasper_fast.kernels import launch

    facts: dict[str, int] = {}
    run = launch.run

    def recording(kernel: object, grid: tuple, like: Tensor, *args: object, **meta: object) -> None:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            built = kernel[tuple(grid)](*args, **meta)
        if built is not None:
            # the driver counts local memory in words of four bytes
            told = {"registers": built.n_regs, "shared": built.metadata.shared, "spilled": 4 * built.n_spills}
            facts.update({k: max(v, facts.get(k, 0)) for k, v in told.items()})

    launch.run = recording
    try:
        yield facts
    finally:
        launch.run = run


def capability(device: torch.device) -> str:
    """sm_90, or that of the largest GPU for the stand-in."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# ------------------------------------------------------------------ measuring


def measure(run: Run, case: Case, trial: "Trial") -> list[dict]:
    """Check all contenders, time them, the slow ones only for the first rounds; returns their rows."""
    killers = {row["contender"] for row in run.results.data["rows"] if row["id"].startswith(f"{case.id} / ")}
    case.contenders = [c for c in case.contenders if c.name not in killers]
    described = {c.name: c.row for c in case.contenders}
    if AHEAD not in killers:
        compile_ahead(run, case, trial)
    harness.prepare(case)
    first = harness.measure(case, run.device, FIRST_ROUNDS)
    times = {row["contender"]: row["time_s"]["median"] for row in first if row["status"] == "ok"}
    for name, spent in times.items():
        if spent > SLOW * min(times.values()) and name != LIBRARY:
            del case.runners[name]
    case.contenders = [c for c in case.contenders if c.name in case.runners]
    rows = harness.measure(case, run.device, run.effort) if case.contenders else []
    rows = [row for row in first if row["contender"] not in {r["contender"] for r in rows}] + rows
    case.runners.clear()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # the graphs' memory
    for row in rows:
        name, facts = row["contender"], trial.facts.get(row["contender"], {})
        row["tune"] = described[name] | {k: facts.get(k) for k in ("registers", "shared", "spilled")}
    return rows


class Trial:
    """Which configuration runs for the first time, on disk: if the process dies in it, the next one knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.case, self.key = "", {}
        self.facts: dict[str, dict] = {}

    def begin(self, name: str) -> None:
        """`name` of the current case is about to run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"case": self.case, "key": self.key, "contender": name}))

    def forget(self) -> None:
        """Nothing is being tried."""
        self.path.unlink(missing_ok=True)


def note_killer(run: Run, trial: Trial) -> None:
    """A configuration that was being tried when an earlier process ended is a failed row, and not tried again."""
    if not trial.path.is_file():
        return
    tried = json.loads(trial.path.read_text())
    why = "an earlier process ended, or lost the device, when it first ran this"
    row = {"id": f"{tried['case']} / {tried['contender']}", "bench": "tune", "key": tried["key"], "ours": False}
    row |= {"contender": tried["contender"], "dtype": tables.DTYPES[run.dtype], "flops": 0, "bytes": 0}
    run.results.add([row | {"clock": "", "status": "failed", "why": why}])
    trial.forget()


# ------------------------------------------------------------------ tables


def put_table(run: Run) -> None:
    """The table that the result's rows make, into the result, checked, and the file written."""
    found = {
        "header": table_header(run.results.data),
        "rows": [row.plain() for row in winners(run.results.data["rows"])],
    }
    tables.parse(found, "the table of this run")
    run.results.data["table"] = found
    run.results.write()


def winners(rows: list[dict]) -> list[tables.Row]:
    """The fastest right configuration of each key of the table."""
    best: dict[tuple, tables.Row] = {}
    for row in rows:
        if row["status"] == "ok":
            made = tables.Row(**row["tune"], time_s=row["time_s"]["median"])
            if made.key not in best or made.time_s < best[made.key].time_s:
                best[made.key] = made
    return list(best.values())


def table_header(data: dict) -> dict[str, str]:
    """Where a table's numbers come from."""
    of, gpu = data["machine"], data["machine"]["gpu"]
    return {
        "gpu": gpu["name"] if gpu else of["name"],
        "capability": gpu["capability"] if gpu else "sm_00",
        "driver": (gpu["driver"] or "unknown") if gpu else "none",
        "torch": of["packages"]["torch"],
        "triton": of["packages"]["triton"],
        "commit": (of["commit"] or "unknown") + ("-dirty" if of["dirty"] else ""),
        "command": of["command"],
        "date": of["date"],
    }


def install(path: Path) -> int:
    """Merge a result's table into the one of its GPU; rows of other versions of driver, torch or Triton go."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        say(f"{path}: cannot be read: {error}")
        return 1
    if data.get("command") != "tune" or not data.get("table"):
        say(f"{path}: no result of `python -m bench tune`")
        return 1
    if data["machine"]["gpu"] is None:
        say(f"{path}: measured on a CPU's stand-in: only a GPU's result can be a table")
        return 1
    try:
        new = tables.parse(data["table"], f"{path}: table")
        old = tables.for_gpu(new.header["gpu"])
    except tables.TableError as error:
        say(str(error))
        return 1
    rows = {row.key: row for row in new.rows}
    if old is not None:
        same = all(old.header[k] == new.header[k] for k in ("driver", "torch", "triton"))
        rows = ({row.key: row for row in old.rows} if same else {}) | rows
        if not same:
            say(f"the {len(old.rows)} rows of other versions of driver, torch or Triton are replaced")
    target = tables.folder() / f"{tables.slug(new.header['gpu'])}.json"
    tables.write(target, new.header, rows.values())
    say(f"wrote {len(rows)} rows, {len(new.rows)} of them new, to {target}; now run `jasper-fast selfcheck`")
    return 0


def say(text: str) -> None:
    """A line for a person, never folded: it may hold a path."""
    console.print(text, soft_wrap=True, markup=False)


def summary(run: Run, done: int, of: int) -> None:
    """The winners beside plain PyTorch, and what was not chosen and why."""
    from rich.table import Table as Shown

    from bench.tables import console as out
    from bench.tables import duration

    rows = run.results.data["rows"]
    shown = Shown(title=f"tune: {done} of {of} cases", title_justify="left")
    for column in ("op", "shape", "fastest of ours", "time", "rate", "PyTorch / ours"):
        shown.add_column(column, justify="left" if column in ("op", "shape", "fastest of ours") else "right")
    by_case: dict[str, list[dict]] = {}
    for row in rows:
        by_case.setdefault(row["id"].rsplit(" / ", 1)[0], []).append(row)
    for of_case in by_case.values():
        right = {r["contender"]: r for r in of_case if r["status"] == "ok"}
        ours = min((r for n, r in right.items() if n not in PLAIN), key=lambda r: r["time_s"]["median"], default=None)
        plain = next((r for n, r in right.items() if n in PLAIN), None)
        key = of_case[0]["key"]
        if ours is None:
            shown.add_row(key["op"], key["shape"], "none", "", "", "", style="red")
            continue
        spent = ours["time_s"]["median"]
        beside = f"{plain['time_s']['median'] / spent:.2f}" if plain else ""
        rate = f"{ours['flops'] / spent / 1e12:.3g} TFLOP/s"
        if key["op"] in tables.NORM_OPS:
            rate = f"{ours['bytes'] / spent / 1e9:.3g} GB/s"
        name = ours["contender"].removeprefix("triton ")
        shown.add_row(key["op"], key["shape"], name, duration(spent), rate, beside)
    out.print(shown)
    for row in (r for r in rows if r["status"] != "ok"):
        case = " ".join(str(v) for v in row["key"].values())
        out.print(f"{row['status']}: {row['contender']}, {case}: {row['why']}", style="red")
    out.print(f"wrote {run.results.path}")
    if run.device.type == "cuda":
        out.print(f"to make it this GPU's choice: python -m bench tune --install {run.results.path}")
