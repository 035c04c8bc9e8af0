"""The first half hour on a new GPU, in three calls of nine minutes: `python -m jasper_fast.bench.gpu.day CALL`.

  1     Does it run? Wheels, preflight, native libraries, device probe, self-check, tests of the ops, first times.
  2     How fast is it? `bench gpu`, the most valuable numbers first.
  3     Which choices are best? `bench tune`, the installation of its table, and `bench gpu --resume`.
  more  If time is left: compute-sanitizer, bf16, and all tests on the device.

Every step has its own time limit and log. Its result is written to day.json as soon as it ends, and at the end all
results are printed as a table. If a step fails or is cut off, the later steps still run. An exception is the self-check
of call 1: if it does not succeed, the later steps would fail for the same reason, so they are skipped. Ctrl-C ends the
call and keeps the results so far. With `--device cpu` the steps are small stand-ins, and those that need a GPU are left
out. `--dry-run` shows the steps.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jasper_fast.bench.harness import options, paths
from jasper_fast.kernels import files
from jasper_fast.options import add, option

DAY = "jasper_fast.bench.gpu.day"
LIMIT = 540.0  # seconds that a call may take
LEAST = 3.0  # a step is started only if at least this many seconds are left
GRACE = 10.0  # seconds between asking a step to end and killing it
PYTHON = sys.executable
TESTS = (
    "test_bn_relu_dropout.py",
    "test_conv1d.py",
    "test_conv1d_triton.py",
    "test_engine.py",
    "test_engine_graphs.py",
)
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PROBE = "tests/test_cuda_probe.py"  # checks that the device behaves as the kernels assume
CALLS = ("1", "2", "3", "more", "preflight", "table")
OPTIONS = (
    option("call", choices=CALLS, metavar="CALL", help=f"the call to run: {', '.join(CALLS)}"),
    option("--device", default="cuda", help="device: cuda, cuda:1, or cpu for the small stand-ins (default: cuda)"),
    option(
        "--out",
        type=Path,
        default=paths.OUT / "day",
        metavar="DIR",
        help="folder for results and logs (default: build/bench/day)",
    ),
    option(
        "--limit",
        type=options.seconds,
        default=LIMIT,
        metavar="SECONDS",
        help=f"seconds that the call may take (default: {LIMIT:.0f})",
    ),
    option("--dry-run", action="store_true", help="print the steps with their limits, and run nothing"),
)


@dataclass(frozen=True)
class Step:
    """A command and its limit in seconds. Unless a step with `gate` succeeds, later steps of the call do not run."""

    name: str
    argv: tuple[str, ...]
    limit: float
    gate: bool = False
    env: dict[str, str] = field(default_factory=dict)


def plan(call: str, device: str, out: Path, root: Path) -> list[Step]:
    """Returns the steps of a call. For a CPU they are small stand-ins, without the steps that need a GPU."""
    cpu = device == "cpu"
    interpret = {"TRITON_INTERPRET": "1"} if cpu else {}

    def bench(command: str, *more: str, dtype: str = "fp32" if cpu else "fp16") -> tuple[str, ...]:
        common = ("--device", device, "--out", str(out), "--dtype", dtype)
        return (PYTHON, "-m", "jasper_fast.bench", command, *common, *more)

    if call == "1":
        return list(_does_it_run(bench, device, out, root))
    if call == "2":
        return [Step("bench gpu", bench("gpu", "--resume", "--budget", "520"), 535)]
    if call == "3":
        few = ("--ops", "forward,bn_relu_dropout.forward") if cpu else ()
        return [
            Step("tune", bench("tune", "--resume", "--budget", "290", *few), 305, env=interpret),
            *([] if cpu else [Step("table", (PYTHON, "-m", DAY, "table", "--out", str(out)), 30)]),
            Step("bench gpu, the rest", bench("gpu", "--resume", "--budget", "200"), 215),
        ]
    memcheck = ("compute-sanitizer", "--tool", "memcheck", PYTHON, "-m", "jasper_fast", "selfcheck", "--quick")
    return [
        *([] if cpu else [Step("memcheck", (*memcheck, "--dtype", "fp16"), 240)]),
        Step("tune in bf16", bench("tune", "--resume", "--budget", "200", dtype="bf16"), 215, env=interpret),
        Step("all tests", (*PYTEST, "tests"), 300, env=ONE_THREAD),
    ]


def _does_it_run(bench: Callable[..., tuple[str, ...]], device: str, out: Path, root: Path) -> Iterator[Step]:
    cpu = device == "cpu"
    wheels = sorted((root / "build" / "wheelhouse").glob("*.whl"))
    if wheels:
        pip = (PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links")
        yield Step("wheels", (*pip, str(wheels[0].parent), *sorted({w.name.split("-")[0] for w in wheels})), 60)
    yield Step("preflight", (PYTHON, "-m", DAY, "preflight", "--device", device, "--out", str(out)), 30)
    if not cpu:
        archs = {"JASPER_FAST_CUDA_ARCHS": os.environ.get("JASPER_FAST_CUDA_ARCHS", "90a")}
        yield Step("native libraries", (PYTHON, "csrc/build.py"), 240, env=archs)
        yield Step("probe of the device", (PYTHON, PROBE), 60)
    selfcheck = (PYTHON, "-m", "jasper_fast", "selfcheck", "--quick", "--dtype", "fp32" if cpu else "fp16")
    yield Step("self-check", (*selfcheck, "--device", device), 120, gate=True)
    chosen = ("tests/test_faces.py",) if cpu else ("-k", "triton or cuda", *(f"tests/{name}" for name in TESTS))
    yield Step("tests of the ops", (*PYTEST, "-x", "-m", "not slow", *chosen), 90, env=ONE_THREAD)
    rivals = {"bn_relu_dropout": "eager,jasper_fast_cuda", "conv1d": "eager,eager_2d_channels_last,jasper_fast_cuda"}
    for op, names in ({"bn_relu_dropout": "eager"} if cpu else rivals).items():
        argv = bench("kernels", "--quick", "--op", op, "--mode", "forward", "--rivals", names)
        yield Step(f"times of {op}", argv, 90)


# ------------------------------------------------------------------------------------------------------- running it


def run(step: Step, log: Path, seconds: float, root: Path) -> dict:
    """Runs a step for at most `seconds`; returns its status ("ok", "failed" or "cut off") and how long it took."""
    started = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.argv, cwd=root, env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.env, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"name": step.name, "status": "failed", "told": str(error), "seconds": 0.0}
        try:
            code, status = process.wait(seconds), ""
        except subprocess.TimeoutExpired:
            code, status = _end(process), "cut off"
        except BaseException:
            _end(process)
            raise
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "name": step.name,
        "status": status or ("ok" if code == 0 else "failed"),
        "code": code,
        "told": lines[-1][:160] if lines else "",
        "seconds": round(time.monotonic() - started, 1),
    }


def _end(process: subprocess.Popen) -> int:
    """Asks a step and its child processes to end, and kills those that do not; returns the exit status."""
    for what in (signal.SIGTERM, signal.SIGKILL):  # SIGKILL also ends child processes that are still alive
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, what)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    return -signal.SIGKILL if process.returncode is None else process.returncode


def carry_out(call: str, steps: Sequence[Step], out: Path, root: Path, limit: float = LIMIT) -> list[dict]:
    """Runs the steps and writes day.json after each; returns how they ended."""
    end, done, closed = time.monotonic() + limit, [], ""
    file = out / "day.json"
    other = json.loads(file.read_text()) if file.is_file() else {}  # the results of other calls are kept
    for number, step in enumerate(steps, 1):
        left = end - time.monotonic()
        if closed or left < LEAST:
            done.append({"name": step.name, "status": "not run", "told": closed or "no time left", "seconds": 0.0})
        else:
            seconds = min(step.limit, left)
            print(f"day {call}, {number} of {len(steps)}: {step.name}, at most {seconds:.0f} s", flush=True)
            log = out / f"day{call}_{number:02d}_{step.name.split(',')[0].replace(' ', '_').replace('/', '_')}.log"
            done.append(run(step, log, seconds, root) | {"command": shlex.join(step.argv), "log": log.name})
            closed = f"after {step.name}" if step.gate and done[-1]["status"] != "ok" else ""
        files.write(file, json.dumps(other | {call: done}, indent=1) + "\n")
    return done


def table(done: Sequence[dict]) -> str:
    """Returns the results of the steps as the lines of a table."""
    width = max((len(one["name"]) for one in done), default=0)
    return "\n".join(
        f"{one['name']:<{width}}  {one['status']:<8} {one['seconds']:>6.1f} s  {one['told']}" for one in done
    )


def preflight(device: str) -> int:
    """Runs only the preflight, as a step of a call; returns the exit status."""
    import torch

    from jasper_fast.bench.gpu import preflight

    found = list(preflight.findings(torch.device(device)))
    there = sum(one.there for one in found)
    print("\n".join([*(one.line() for one in found), f"{there} of {len(found)} items are there"]))
    return 0 if there == len(found) else 1


def install(out: Path) -> int:
    """Installs the table of the newest result of `bench tune`, as a step of a call; returns the exit status."""
    results = sorted(out.glob("tune_*.json"), key=lambda path: path.stat().st_mtime)
    if not results:
        print(f"{out}: this folder has no result of `bench tune`; run call 3 first")
        return 1
    return subprocess.call([PYTHON, "-m", "jasper_fast.bench", "tune", "--install", str(results[-1])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status, which is 1 if a step failed, and 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        f"python -m {DAY}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add(parser, {"": OPTIONS})
    args = parser.parse_args(arguments)
    if args.call in ("preflight", "table"):  # these are steps of the other calls
        return preflight(args.device) if args.call == "preflight" else install(args.out)
    root, out = paths.checkout("this plan"), args.out.absolute()
    steps = plan(args.call, args.device, out, root)
    if args.dry_run:
        print("\n".join(f"{step.limit:>4.0f} s  {step.name}: {shlex.join(step.argv)}" for step in steps))
        return 0
    options.writable(out)
    try:
        done = carry_out(args.call, steps, out, root, args.limit)
    except KeyboardInterrupt:
        print(f"interrupted: the results of the steps that had ended, and all logs, are in {out}", file=sys.stderr)
        return 130  # the exit status that a shell reports after Ctrl-C
    print(table(done))
    print(f"logs and results are in {out}")
    return int(any(one["status"] == "failed" for one in done))


if __name__ == "__main__":
    sys.exit(main())
