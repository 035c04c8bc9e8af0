"""`python -m bench SUBCOMMAND`: measure jasper_fast on this machine. No data set is needed."""

import argparse
import dataclasses
import datetime
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from jasper_fast.bench.commands import (
    choices,
    decode,
    kernels,
    latency,
    launches,
    memory,
    optimizer,
    profile,
    scaling,
    train,
)
from jasper_fast.bench.compile import gate
from jasper_fast.bench.gpu import gpu
from jasper_fast.bench.harness import cudnn_search, limits, machine, options, paths, result_file
from jasper_fast.bench.harness.case import QUICK, Effort
from jasper_fast.bench.harness.console import console, say
from jasper_fast.bench.harness.errors import DeviceLost
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.report import goals, html_page, terminal
from jasper_fast.bench.rivals import choice
from jasper_fast.bench.tune import tune
from jasper_fast.dispatch import backends
from jasper_fast.kernels import precision, tables
from jasper_fast.options import Option, add, option

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL_SECONDS = 570.0
MEMORY_SECONDS = 60.0  # of ALL_SECONDS, the part that counting the memory may need at the end
DEFAULT_BATCH = (8, 400)  # (N, T)
OURS = "jasper_fast"  # the contender's name
MODELS = f"{', '.join(choices.MODELS)} or a YAML file"  # for help texts
NOTHING = "interrupted: nothing was measured yet"
# Subcommands whose rivals are fixed, each with the values of --rivals that it accepts. The value has no effect.
FIXED_RIVALS = {
    "decode": ("default", "all"),
    "gpu": ("default",),
    "memory": ("default", "all", "eager"),
    "optimizer": ("default", "all"),
    "profile": ("default", "eager"),
}

# ------------------------------------------------------------------ options

COMMON = (  # options of every subcommand in COMMANDS
    option(
        "--device",
        type=options.device,
        help="device to measure on: cpu, cuda or cuda:1 (default: the GPU if there is one)",
    ),
    option(
        "--dtype",
        choices=DTYPES,
        help="type of activations and products (default: fp32 on a CPU, fp16 on a GPU)",
    ),
    option(
        "--fp32-precision",
        choices=precision.FP32_PRECISIONS,
        help="precision of fp32 products on a GPU, for all contenders (default: PyTorch's, which is "
        "tf32 for convs and ieee for the rest)",
    ),
    option(
        "--backend",
        default="auto",
        choices=("auto", "reference", "cpu", "triton", "cuda"),
        help="the implementation of jasper_fast's ops to time (default: auto, which chooses by shape)",
    ),
    options.OUT,
    option("--quick", action="store_true", help="measure only the most important cases, with fewer repetitions"),
    option(
        "--rivals",
        type=choices.rivals,
        default="default",
        help="rivals to measure: default, all, or names separated by commas (see bench/rivals); "
        f"{', '.join(FIXED_RIVALS)} have fixed rivals",
    ),
    option("--threads", type=options.count, help="CPU threads for all contenders (default: PyTorch's)"),
    option("--seconds", type=options.seconds, help="time limit of each case; precise ratios end it earlier"),
    option(
        "--resume",
        action="store_true",
        help="continue the newest interrupted run of the same command, settings, machine and commit; without one, "
        "begin a new run",
    ),
)
MODEL = option("--model", type=choices.model, default="jasper10x5", help=f"{MODELS} (default: jasper10x5)")


def models_option(batch: tuple[int, int]) -> Option:
    """Returns the option `--model`, which may be repeated. A model without a batch of its own gets `batch`, (N, T)."""
    return option(
        "--model",
        type=choices.models_batch(batch),
        action="append",
        metavar="NAME[:N,T]",
        help=f"{MODELS}, with a batch of N utterances of T feature frames (default: {batch[0]},{batch[1]})",
    )


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand that measures rows: its help, its work, and its options besides COMMON."""

    help: str
    work: Callable[[Run, argparse.Namespace], object]
    options: Sequence[Option] = ()


def measure_all(run: Run, _: argparse.Namespace) -> None:
    """Measures the cases of `all`: those that are timed, then these again while there is time, then memory.

    Of the rivals that `--rivals` names, kernels, training and inference each measure those that they have.
    """
    run.brief, run.deadline = True, run.started + ALL_SECONDS
    run.effort = dataclasses.replace(run.effort.at_most(3.0), min_rounds=4)
    training, inference = (
        dataclasses.replace(run, rivals=choice.only(kind, run.rivals, choice.OF_KERNELS))
        for kind in ("training", "inference")
    )
    kernels.main(run)
    train.main(training)
    latency.main(inference, "jasper10x5")
    train.main(training, (("quartznet_small", 8, 400),), train.MODES[0])
    latency.main(inference, "quartznet15x5", grid=((1, 2.0),))
    # All copies of `run` share its list `kept`, so this one times the cases of `training` and `inference` again too.
    dataclasses.replace(run, deadline=run.deadline - MEMORY_SECONDS).revisit()
    memory.main(run)
    memory.main(run, (("quartznet15x5", 2, 400),))


COMMANDS = {
    "kernels": Command(
        "time each op at the shapes of Jasper's and QuartzNet's layers, and compare it with eager PyTorch",
        lambda run, args: kernels.main(run, args.op, args.mode),
        (
            option(
                "--op",
                default="all",
                choices=("all", *kernels.OPERATIONS),
                help="op to measure (default: all)",
            ),
            option(
                "--mode",
                choices=("forward", "backward", "both", "inference"),
                help="measure only this mode (default: all modes of an op)",
            ),
        ),
    ),
    "train": Command(
        "time forward + backward, and the full training step, in utterances per second",
        lambda run, args: train.main(run, tuple(args.model or ()), args.mode),
        (
            models_option(DEFAULT_BATCH),
            option(
                "--mode",
                choices=("forward+backward", "step"),
                help="measure only this mode (default: both; with --quick only forward+backward)",
            ),
            option(
                "--world",
                type=scaling.sizes,
                metavar="N[,N...]",
                help="measure the full step with 1 process and with N, each with its own batch: utterances per second, "
                "efficiency, and the communication that no computation hides. Starts the processes, unless torchrun "
                "started them (the default is then 1, 2, 4, ... up to all of them)",
            ),
        ),
    ),
    "optimizer": Command(
        "time the optimiser's step in fp32, with its check for NaN and the moving average of the weights",
        lambda run, args: optimizer.main(run, tuple(args.model or ())),
        (option("--model", type=choices.model, action="append", help=f"{MODELS} (default: jasper10x5)"),),
    ),
    "latency": Command(
        "percentiles of the time to wait for a batch, by batch size and audio length",
        lambda run, args: latency.main(run, args.model, args.full),
        (
            MODEL,
            option(
                "--full",
                action="store_true",
                help="measure all batch sizes and lengths on a CPU too, which takes an hour",
            ),
        ),
    ),
    "decode": Command(
        "time our beam searches and flashlight-text: the search only, and the acoustic model with the search",
        lambda run, args: decode.main(run, args.model),
        (MODEL,),
    ),
    "memory": Command(
        "count the bytes that a training forward keeps for backward, and the peak bytes of the step",
        lambda run, args: memory.main(run, tuple(args.model or ())),
        (models_option((2, 400)),),
    ),
    "all": Command(
        "kernels, train, latency and memory, in under 10 minutes on two cores",
        measure_all,
    ),
    "launches": Command(
        "count the ops and kernels that one call launches, and time the host's work to launch them",
        lambda run, _: launches.main(run),
    ),
    "profile": Command(
        "write a torch.profiler trace with ranges named after layers; print time per layer and op",
        lambda run, args: profile.main(run, args.model, args.mode, *args.batch),
        (
            option("--model", type=choices.model, default="small", help=f"{MODELS} (default: small)"),
            option(
                "--mode", choices=("train", "inference"), default="train", help="the step to profile (default: train)"
            ),
            option(
                "--batch",
                type=options.batch,
                default=DEFAULT_BATCH,
                metavar="N,T",
                help="number of utterances, and feature frames of each (default: 8,400)",
            ),
        ),
    ),
    "gpu": Command(
        "tests, self-check, a short tuning, and benchmarks of kernels, training, latency, launches and memory on a "
        "GPU, in at most nine minutes, the most valuable numbers first; --resume continues. The full tuning is another "
        "command: python -m bench tune",
        lambda run, args: gpu.main(run, args.budget),
        (
            option(
                "--budget",
                type=options.seconds,
                default=540.0,
                metavar="SECONDS",
                help="stop after SECONDS (default: 540)",
            ),
        ),
    ),
}
DATA = (
    option("--manifest", help="manifest of the utterances to read, a path or a URL (default: generated audio)"),
    option("--seconds", type=options.seconds, default=10.0, help="seconds to spend on each stage (default: 10)"),
    option("--workers", type=options.count, help="number of worker processes to measure with (default: one per core)"),
    option(
        "--rate",
        type=options.seconds,
        default=480.0,
        help="utterances per second that a GPU trains on (default: 480, assumed for one H200)",
    ),
    option(
        "--length",
        type=options.seconds,
        default=16.7,
        help="seconds of audio of each utterance that --rate counts (default: 16.7)",
    ),
    options.OUT,
)
REPORT = (
    option(
        "results",
        nargs="*",
        type=options.result,
        help="JSON files of results (default: the newest in build/bench; with --readme, all in bench/results)",
    ),
    option("--html", type=options.page, help="file for the page (default: next to the first result)"),
    option(
        "--readme", action="store_true", help="write the table into README.md, between its two markers, and no page"
    ),
)


OTHERS = {  # subcommands that measure no rows: (help, what the description adds, options)
    "data": (
        "measure how fast one core prepares padded batches from audio files, and how many cores a GPU needs",
        ". Reads the files of --manifest, or FLAC files that it makes. First it measures one thread in CPU time, on "
        "which other work on the machine has little effect. Then it measures worker processes, in CPU time and by the "
        "clock.",
        DATA,
    ),
    "compile": (
        "compile the GPU kernels for several architectures without a GPU, and compare them with a committed table",
        "",
        gate.OPTIONS,
    ),
    "report": ("write one self-contained HTML page, or the README's table, from results", "", REPORT),
}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all subcommands and their options."""
    top = argparse.ArgumentParser(prog=paths.COMMAND, description=__doc__)
    sub = top.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for name, command in COMMANDS.items():
        add(sub.add_parser(name, help=command.help, description=command.help), {"": (*COMMON, *command.options)})
    for name, (about, more, their_options) in OTHERS.items():
        add(sub.add_parser(name, help=about, description=about + more), {"": their_options})
    tuning = sub.add_parser(
        "tune",
        help="time the implementations of conv1d and bn_relu_dropout, and tiles of Triton's convs, on this GPU, and "
        "write the table by which the backend auto chooses",
        description=tune.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_arguments(tuning)
    return top


def shell(arguments: list[str] | None = None) -> int:
    """Calls `main`. For an error that the user can fix, prints one line and returns status 2, as argparse does."""
    try:
        return main(arguments)
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        print(f"{paths.COMMAND}: error: {end.code}", file=sys.stderr)
        return 2


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status.

    The exit status is 0 for success, 1 if a row of jasper_fast has no number, a part failed or `compile` found a fault,
    2 if `compile --cuda` finds no nvcc, 4 if the budget of `tune` is used up, and 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    begun: list[Run] = []

    def begin(args: argparse.Namespace) -> Run:
        begun.append(start(args, arguments))
        return begun[0]

    try:
        return _command(parser().parse_args(arguments), begin, arguments)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several processes, the first says what is saved
            say(_kept(begun[0].results) if begun else NOTHING)
        return 130  # the exit status that a shell reports after Ctrl-C


def _command(args: argparse.Namespace, begin: Callable[[argparse.Namespace], Run], arguments: Sequence[str]) -> int:
    """Runs the subcommand and returns the exit status. `begin` makes the `Run` of a subcommand that measures rows.

    `arguments` are those from which `args` were read, for processes that run the same command.
    """
    if args.command == "report":
        return html_page.main(args.results, args.html, args.readme)
    if args.command == "data":
        from jasper_fast.bench.commands import data  # it needs packages for sound, which other subcommands do not

        return data.main(args)
    if args.command == "compile":
        return gate.main(args)
    if args.command == "tune":
        return tune.main(args, begin)
    if args.command == "kernels" and args.mode == "inference" and args.op not in ("all", "sub_block", "depthwise"):
        raise SystemExit(f"--op {args.op} has no --mode inference; only sub_block and depthwise have it")
    if args.command in FIXED_RIVALS and args.rivals not in (allowed := FIXED_RIVALS[args.command]):
        raise SystemExit(
            f"--rivals {args.rivals}: {args.command} has fixed rivals, so it takes only {', '.join(allowed)}"
        )
    if args.command == "optimizer" and args.dtype not in (None, "fp32"):
        raise SystemExit(f"--dtype {args.dtype}: the optimiser's step is always in fp32")
    if args.command == "train" and (scaling.grouped() or max(args.world or (1,)) > 1):
        scaling.check_options(args)
        if not scaling.grouped():
            return scaling.launch(arguments, max(args.world))
        with scaling.joined(args) as team:
            if team.rank:
                scaling.main(team, args.model or (), *prepared(args), args.backend, None)
                return 0
            return _measure(
                begin(args),
                args,
                lambda run, args: scaling.main(team, args.model or (), run.device, run.dtype, run.backend, run),
            )
    return _measure(begin(args), args, COMMANDS[args.command].work)


def _measure(run: Run, args: argparse.Namespace, work: Callable[[Run, argparse.Namespace], object]) -> int:
    """Runs a subcommand that measures rows, writes and prints the result, and returns the exit status."""
    try:
        work(run, args)
    except choice.UnknownRival as error:
        raise SystemExit(f"--rivals: {error}") from None
    except DeviceLost as error:  # the result file already has the row of the contender that broke the device
        say(f"{error}\n{run.device} no longer works in this process; --resume continues without that contender")
        return 1
    data = run.results.data
    data["goals"] = goals.judge(data["rows"], run.device.type)
    data["seconds"] = round(time.monotonic() - run.started, 1)
    data["clocks"]["end"] = machine.clocks(run.device)
    data["finished"] = not (run.out_of_time() or result_file.parts_left(data))
    run.results.write()
    terminal.show(data["rows"], data["goals"])
    say(f"wrote {_relative(run.results.path)}", terminal.console)
    if args.command in ("all", "gpu"):
        try:
            html_page.main([run.results.path], None, False)
        except SystemExit as missing:  # a package that only the page needs
            say(f"the HTML page was not written: {missing}")
    if missing := shortfall(data):
        say(missing)
    return 1 if missing else 0


def shortfall(data: dict) -> str:
    """Returns why the command fails: rows or profiles of jasper_fast without a number, and parts that failed.

    Returns an empty text if nothing is missing.
    """
    rows = [(row["status"], row["id"]) for row in data["rows"] if row["ours"] and row["status"] != "ok"]
    profiles = [p for p in data.get("profiles", ()) if p["contender"] == OURS and p["status"] != "ok"]
    rows += [(p["status"], f"profile of {p['model']} {p['mode']}") for p in profiles]
    parts = [f"{title}: {how}" for title, how in data.get("parts", {}).items() if how.startswith("failed")]
    counts = ", ".join(f"{n} {status}" for status, n in Counter(status for status, _ in rows).items())
    named = "; ".join(name.removesuffix(f" / {OURS}") for _, name in rows)
    lines = [f"{OURS} has no number ({counts}) in {named}"] if rows else []
    return ". ".join(lines + ([f"parts that failed: {'; '.join(parts)}"] if parts else []))


def _kept(results: result_file.Results) -> str:
    """Returns the message after an interruption, which says what is saved."""
    if not results.path.exists():
        return NOTHING
    rows = f"{len(results.data['rows'])} rows are in {_relative(results.path)}"
    return f"interrupted: {rows}; the same command with --resume continues"


def prepared(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Sets PyTorch as the options say, in each process that measures; returns what `--device` and `--dtype` name.

    The default device is the GPU, and the CPU if there is none. The default dtype is fp16 on a GPU and fp32 on a CPU.
    """
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.backend != "auto" and (reason := backends.why_missing(args.backend, device)):
        raise SystemExit(f"--backend {args.backend}: {reason}")
    if args.threads:
        torch.set_num_threads(args.threads)
    precision.set_fp32(getattr(args, "fp32_precision", None))  # `tune` has no such option
    cudnn_search.on(device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are created on the current device
    return device, DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "fp16")]


def start(args: argparse.Namespace, arguments: Sequence[str]) -> Run:
    """Prepares PyTorch, opens the result file, measures the machine's ceilings; returns the run."""
    device, dtype = prepared(args)
    options.writable(args.out)
    effort = QUICK if args.quick else Effort()
    if args.seconds:
        effort = dataclasses.replace(effort, seconds=args.seconds)
    header = result_file.header(device, vars(args), effort)
    header |= {"command": args.command, "cudnn_benchmark": torch.backends.cudnn.benchmark}
    name, commit = tables.slug(header["machine"]["name"]), header["machine"]["commit"] or "nogit"
    path = args.out / f"{args.command}_{name}_{datetime.datetime.now():%Y%m%d-%H%M%S}_{commit}.json"
    if args.resume:  # the newest result that this run may continue, see `result_file.unfinished`
        earlier = sorted(args.out.glob(f"{args.command}_{name}_*.json"), reverse=True)
        path = next((old for old in earlier if result_file.unfinished(old, header)), path)
    load, cores = header["machine"]["load_average"], header["machine"]["cpu"]["cores"]
    if load and load[0] > 0.5 * cores:
        console.print(
            f"load average {load[0]:.1f} on {cores} cores: other processes disturb the timing", style="yellow"
        )
    results = result_file.Results(path, header, args.resume)
    run = Run(device, dtype, args.backend, args.quick, results, effort, rivals=args.rivals, arguments=tuple(arguments))
    results.data["clocks"] = {"start": machine.clocks(device)}
    if not results.data["limits"]:
        with console.status("measuring the machine's limits"):
            results.data["limits"] = limits.measure(device, args.quick)
        results.write()
    return run


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
