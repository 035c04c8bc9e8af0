"""Results on disk: one JSON file per run, which is written after every case, and which `--resume` reads."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from jasper_fast.bench.harness import machine
from jasper_fast.bench.harness.case import Effort
from jasper_fast.bench.harness.clocks import mark_throttled
from jasper_fast.bench.harness.measurement import LOST, Row
from jasper_fast.kernels import files

SCHEMA = 1
TRIES = 2  # a part of a run that has failed this many times is not tried again


def header(device: torch.device, arguments: Mapping[str, object], effort: Effort | None = None) -> dict:
    """Returns the part of a result that describes the run: machine, arguments, and effort (default: `Effort()`)."""
    return {
        "machine": machine.describe(device),
        "arguments": {k: str(v) for k, v in arguments.items()},
        "effort": asdict(effort or Effort()),
    }


def against_limits(row: Row, limits: dict) -> None:
    """Adds `limit` to the row: the least time that the machine's measured ceilings allow and, if the row was timed,
    that time divided by the row's median time."""
    rate, bandwidth = limits.get("matmul_flops_per_s", {}).get(row["dtype"]), limits.get("copy_bytes_per_s")
    bounds = (("compute", row["flops"], rate), ("memory", row["bytes"], bandwidth))
    if floors := {bound: amount / speed for bound, amount, speed in bounds if amount and speed}:
        bound = max(floors, key=floors.__getitem__)
        row["limit"] = {"bound": bound, "floor_s": floors[bound]}
        if row["status"] == "ok":
            row["limit"]["share"] = floors[bound] / row["time_s"]["median"]


class Results:
    """The result file of a run. It is written after every case, so that an interrupted run keeps its finished cases."""

    def __init__(self, path: Path, header: dict, resume: bool = False) -> None:
        self.path, self.started = path, time.monotonic()
        self.data = {"schema": SCHEMA, **header, "limits": {}, "rows": [], "finished": False}
        if resume and unfinished(path, header):
            old = read(path)
            parts = {k: v for k, v in old.get("parts", {}).items() if v == "finished" or v.startswith("failed")}
            kept = ("rows", "limits", "selfcheck", "faults", "preflight", "tests", "tuned")
            self.data |= {k: old[k] for k in kept if k in old}
            self.data |= {"resumed": old.get("resumed", 0) + 1, "parts": parts}

    def has(self, case_id: str, contenders: Iterable[str]) -> bool:
        """Whether the file has rows for all these contenders of a case."""
        return {f"{case_id} / {name}" for name in contenders} <= {row["id"] for row in self.data["rows"]}

    def fatal(self, case_id: str) -> dict[str, tuple[str, str]]:
        """Returns the contenders of a case that broke the device in an earlier process, as in `Measurement.failed`."""
        rows = (row for row in self.data["rows"] if row["id"].startswith(f"{case_id} / ") and row["status"] == "failed")
        return {row["contender"]: ("failed", row["why"]) for row in rows if row["why"].startswith(LOST)}

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows, which replace those with the same id, and writes the file."""
        new = {row["id"]: row for row in rows}
        for row in new.values():
            against_limits(row, self.data["limits"])
            row["at_s"] = round(time.monotonic() - self.started, 1)
        self.data["rows"] = [r for r in self.data["rows"] if r["id"] not in new] + list(new.values())
        mark_throttled(self.data["rows"], self.data["limits"])
        self.write()

    def write(self) -> None:
        """Writes the file atomically."""
        files.write(self.path, json.dumps(self.data, indent=1) + "\n")


def parts_left(data: dict) -> list[str]:
    """Returns the parts of a run that `--resume` would do: those that have neither finished nor failed TRIES times."""
    parts, faults = data.get("parts", {}), data.get("faults", {})
    return [part for part, how in parts.items() if how != "finished" and faults.get(part, 0) < TRIES]


RESULT = {"schema", "command", "machine", "rows", "limits", "finished"}
ROW = {"id", "bench", "key", "contender", "ours", "status"}


def read(path: Path) -> dict:
    """Returns the result in a file. Raises ValueError, which names the file, if the file is not a result."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
        if missing := RESULT - set(found):
            raise ValueError("it has no " + ", ".join(sorted(missing)))
        if not all(isinstance(row, dict) and set(row) >= ROW for row in found["rows"]):
            raise ValueError("its rows lack fields of a result")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a result of python -m bench ({error})") from None
    return found


# Runs with different values of these arguments cannot share rows.
ALIKE = ("device", "dtype", "fp32_precision", "backend", "quick", "threads")


def unfinished(path: Path, header: dict) -> bool:
    """Whether `path` is an unfinished result that a run with this header can continue.

    Schema, subcommand, machine, commit, the presence of local changes, and the ALIKE arguments must be the same.

    Raises SystemExit if the file is not a result.
    """
    if not path.exists():
        return False
    try:
        old = read(path)
    except ValueError as error:
        raise SystemExit(f"--resume: {error}; delete it, or run without --resume") from None
    if (old["schema"], old["command"]) != (SCHEMA, header["command"]) or old["finished"]:
        return False
    here = all(old["machine"][k] == header["machine"][k] for k in ("name", "commit", "dirty"))
    before, now = (data.get("arguments", {}) for data in (old, header))
    return here and all(before.get(k) == now.get(k) for k in ALIKE)
