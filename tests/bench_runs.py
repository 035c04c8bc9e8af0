"""Helpers for the tests of bench: a run and cases that take almost no time, rows for the goals, child processes."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from jasper_fast.bench.harness import checking, ratios, result_file, timing
from jasper_fast.bench.harness.case import Case, Contender, Effort, Runner
from jasper_fast.bench.harness.measurement import Measurement, Row
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded
from jasper_fast.bench.report import goals

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROOT = Path(__file__).parents[1]
LIMITS = {"matmul_flops_per_s": {"float32": 1e12}, "copy_bytes_per_s": 1e12, "launch_s": {"host": 1e-6}}
SAMPLES = [0.010 + 0.0001 * i for i in range(100)]
RATIO = {"median": 1.5, "low": 1.4, "high": 1.6, "confidence": 0.95, "pairs": 100}
HEADER = {"command": "kernels", "machine": {"name": "m", "commit": "c", "dirty": False, "device": "cpu"}}
FAST = Effort(seconds=0.05, min_rounds=3, max_rounds=4)


def make_run(tmp_path: Path, backend: str = "reference", device=CPU, dtype=torch.float32, **kwargs) -> Run:
    return Run(device, dtype, backend, True, result_file.Results(tmp_path / "run.json", HEADER), FAST, **kwargs)


def again(run: Run) -> Run:
    """Returns a run that continues `run`, as a new process would."""
    results = result_file.Results(run.results.path, HEADER, resume=True)
    return dataclasses.replace(run, results=results, started=time.monotonic())


def written(run: Run) -> dict:
    """Returns what the result file of `run` holds."""
    return json.loads(run.results.path.read_text())


def softplus_case(contenders: dict, op: str = "softplus", **more) -> Case:
    """Returns a case that computes softplus of x (8, 16). The `contenders`, by name, are functions of x."""
    x = torch.empty(8, 16)

    def build(function):
        return lambda: Runner(lambda: function(x), lambda: {"y": function(x)})

    return Case(
        "test",
        {"op": op},
        [Contender("jasper_fast", build(F.softplus)), *(Contender(n, build(f)) for n, f in contenders.items())],
        refill=lambda seed: x.copy_(torch.randn(8, 16, generator=seeded(seed, CPU))),
        reference=lambda: {"y": F.softplus(x.double())},
        low=lambda: {"y": F.softplus(x)},
        flops=1.0,
        nbytes=1.0,
        **more,
    )


def timed(case: Case, device: torch.device = CPU) -> tuple[Measurement, list[Row]]:
    """Checks and times a case without a run. Returns its measurement and its rows."""
    m = Measurement(case, device)
    checking.prepare(m)
    return m, timing.measure(m, FAST)


def measured(op: str):
    """Returns a subcommand, or a part of a run, that times one case."""

    def part(run: Run, *_: object) -> None:
        run.cases("test", [softplus_case({"eager": F.softplus}, op)])

    return part


def row(bench: str, contender: str, key: dict, **more) -> dict:
    """Returns a row of a result. A row with the status "ok" has a time, and a rival's row also has a ratio. Rows about
    memory have neither."""
    made = {
        "id": f"{bench} {key} / {contender}", "bench": bench, "key": key, "contender": contender, "status": "ok",
        "ours": contender == "jasper_fast", "dtype": key.get("dtype", "float16"), "flops": 0, "bytes": 0,
    }  # fmt: skip
    if bench != "memory" and more.get("status", "ok") == "ok":
        made["time_s"] = ratios.summary(SAMPLES, 1)
        made |= {} if made["ours"] else {"ratio": RATIO}
    return made | more


def goal_rows() -> list[dict]:
    """Returns two rows for every goal for a CPU: one of ours and one of eager."""
    rows = []
    for goal, value in zip(goals.CPU_GOALS, (4.5, 3.0, 1.1, 1.2, 0.3, 9.0, 2.6, 1.5, 0.4), strict=True):
        of_ours, of_eager = {}, {"ratio": {"median": value, "low": value - 0.1, "high": value + 0.1}}
        if goal.bench == "memory":
            of_ours = {"memory": {"kept_bytes": 2**20, "peak_bytes": 2**20}}
            of_eager = {"memory": of_ours["memory"] | {"ours_over_kept": value}}
        rows.append(row(goal.bench, "jasper_fast", dict(goal.key), **of_ours))
        rows.append(row(goal.bench, "eager", dict(goal.key), **of_eager))
    return rows


def python(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs `script` in a new Python process; fails the test if it ends with an error."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done
