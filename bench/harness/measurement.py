"""The state of a case while it is measured, and the rows that result."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import torch

from jasper_fast.bench.harness import devices
from jasper_fast.bench.harness.case import Case, Runner
from jasper_fast.bench.harness.clocks import clocks_during
from jasper_fast.bench.harness.errors import Absent, DeviceLost, first_line
from jasper_fast.bench.harness.ratios import ratio_of_visits, summary

# How the reason begins in the row of the contender that broke the device.
LOST = "the device ran nothing more in that process"


class Row(TypedDict, total=False):
    """What a result says about one contender of a case."""

    id: str
    bench: str
    key: dict
    contender: str
    ours: bool
    dtype: str
    flops: float
    bytes: float
    clock: str
    at_s: float
    status: str  # ok, wrong, failed, refused or absent
    why: str  # why it has no number
    # if it was timed: seconds by quantile, rates, ratio to jasper_fast, and how it was measured
    time_s: dict
    host_s: float
    flops_per_s: float
    bytes_per_s: float
    items_per_s: float
    ratio: dict
    limit: dict
    clocks: dict
    throttled: bool
    hurried: bool
    # if it has its own rule: the rule in words, and what was found
    precision: str
    rule: str
    judged: dict
    # counts of a subcommand
    memory: dict
    launches: dict
    tune: dict


@dataclass
class Measurement:
    """A case while it is measured: the contenders that are ready, those that have no number and why, and the samples.

    `device`: the device that is checked for faults after each contender. `visits`: for each time that the case was
    timed, seconds by contender. `readings`: clock readings during the timing. `hurried`: rounds took so long that there
    were fewer than usual.
    """

    case: Case
    device: torch.device | None = None
    runners: dict[str, Runner] = field(default_factory=dict)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    visits: list[dict[str, list[float]]] = field(default_factory=list)
    readings: list[dict] = field(default_factory=list)
    hurried: bool = False

    def fail(self, name: str, status: str, why: str) -> None:
        """Records that the contender has no number, and why."""
        self.failed[name] = (status, why)
        self.runners.pop(name, None)

    def build(self) -> None:
        """Build the contenders that have not failed."""
        for contender in (c for c in self.case.contenders if c.name not in self.failed):
            with self.caught(contender.name):
                self.runners[contender.name] = contender.build()

    @contextlib.contextmanager
    def caught(self, name: str) -> Iterator[None]:
        """Writes a contender's failure into its row, so that the run goes on; losing the device ends the
        process."""
        try:
            yield
            self.wait()
        except Absent as error:
            self.fail(name, "absent", str(error))
        except Exception as error:  # any error of a rival goes into its row
            self.fail(name, "failed", first_line(error))
            if why := devices.lost(self.device):
                self.fail(name, "failed", f"{LOST}: {why}")
                raise DeviceLost(f"{name}, {self.case.label()}: {why}") from error

    def wait(self) -> None:
        """Waits for the device, so that a fault appears in the row of the contender that launched the kernel."""
        if self.device is not None:
            devices.synchronize(self.device)

    def begin_row(self, name: str) -> Row:
        """The fields of a contender's row that it has with or without a number."""
        case = self.case
        row: Row = {"id": f"{case.id} / {name}", "bench": case.bench, "key": case.key, "contender": name}
        row |= {"ours": name == case.ours, "dtype": case.dtype, "flops": case.flops, "bytes": case.nbytes}
        if name in self.failed:
            row |= dict(zip(("status", "why"), self.failed[name], strict=True))
        else:
            row["status"] = "ok"
        if rule := getattr(self.runners.get(name), "rule", None):
            row |= {"precision": rule.precision, "rule": rule.words, "judged": rule.found}
        return row

    def rows(self, inner: Mapping[str, int], host: Mapping[str, float]) -> list[Row]:
        """One row per contender, in the order of the case, from its samples in all visits; without samples the row says
        why.

        `inner`: runs per sample. `host`: seconds that a run occupies the host, if that is not the measured time itself.
        """
        case, made = self.case, []
        timed_by = "events" if self.device is not None and self.device.type == "cuda" and not case.wall else "wall"
        for name in case.names:
            row = self.begin_row(name) | {"clock": timed_by}
            made.append(row)
            if name in self.failed:
                continue
            row["time_s"] = summary([t for visit in self.visits for t in visit.get(name, ())], inner[name])
            if self.hurried:
                row["hurried"] = True
            if self.readings:
                row["clocks"] = clocks_during(self.readings)
            if name in host:
                row["host_s"] = host[name]
            for kind, amount in (("flops", case.flops), ("bytes", case.nbytes), ("items", case.items)):
                if amount:
                    row[f"{kind}_per_s"] = amount / row["time_s"]["median"]
            if name != case.ours and case.ours not in self.failed and any(case.ours in v for v in self.visits):
                row["ratio"] = ratio_of_visits(self.visits, name, case.ours)
        return made
