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

# The reason in the row of a contender that broke the device begins with this text.
LOST = "the device ran nothing more in that process"


class Row(TypedDict, total=False):
    """The entry of a result file for one contender of a case."""

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
    why: str  # why there is no number
    limit: dict  # the least time by the machine's ceilings, if they are known for the row
    # Present if the contender was timed: seconds by quantile, rates, ratio (its time / ours), state of the machine.
    time_s: dict
    host_s: float
    flops_per_s: float
    bytes_per_s: float
    items_per_s: float
    ratio: dict
    clocks: dict
    throttled: bool
    hurried: bool
    # Present if the contender has a `Rule` and `status` is ok.
    precision: str
    rule: str
    judged: dict
    # Present in the rows of some subcommands.
    memory: dict
    launches: dict
    scaling: dict
    tune: dict


@dataclass
class Measurement:
    """The state of a case while it is measured.

    `device` is checked for faults after each contender. `runners` are the contenders that are ready. `failed` has the
    status and the reason of each contender that has no number. A case may be timed several times, and each time
    `visits` gets the samples of each contender in seconds. `readings` are clock readings during the timing. `hurried`
    is true if there were fewer rounds than usual, because they took too long.
    """

    case: Case
    device: torch.device
    runners: dict[str, Runner] = field(default_factory=dict)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    visits: list[dict[str, list[float]]] = field(default_factory=list)
    readings: list[dict] = field(default_factory=list)
    hurried: bool = False

    def fail(self, name: str, status: str, why: str) -> None:
        """Records that the contender gets no number, and why."""
        self.failed[name] = (status, why)
        self.runners.pop(name, None)

    def build(self) -> None:
        """Builds the contenders that have not failed."""
        for contender in (c for c in self.case.contenders if c.name not in self.failed):
            with self.caught(contender.name):
                self.runners[contender.name] = contender.build()

    @contextlib.contextmanager
    def caught(self, name: str) -> Iterator[None]:
        """A context that records an exception as the contender's failure, so that the run continues.

        Raises DeviceLost if the device no longer works.
        """
        try:
            yield
            devices.synchronize(self.device)  # a fault must appear in the row of the contender that launched the kernel
        except Absent as error:
            self.fail(name, "absent", str(error))
        except Exception as error:  # any error of a rival goes into its row
            self.fail(name, "failed", first_line(error))
            if why := devices.lost(self.device):
                self.fail(name, "failed", f"{LOST}: {why}")
                raise DeviceLost(f"{name}, {self.case.label()}: {why}") from error

    def begin_row(self, name: str) -> Row:
        """Returns the fields that a contender's row has even without a number."""
        case, (status, why) = self.case, self.failed.get(name, ("ok", ""))
        row: Row = {
            "id": f"{case.id} / {name}",
            "bench": case.bench,
            "key": case.key,
            "contender": name,
            "ours": name == case.ours,
            "dtype": case.dtype,
            "flops": case.flops,
            "bytes": case.nbytes,
            "status": status,
        }
        if why:
            row["why"] = why
        if rule := getattr(self.runners.get(name), "rule", None):
            row |= {"precision": rule.precision, "rule": rule.words, "judged": rule.found}
        return row

    def rows(self, inner: Mapping[str, int], host: Mapping[str, float]) -> list[Row]:
        """Returns one row per contender, in the order of the case, from its samples in all visits.

        The row of a contender that failed has the reason instead of times. `inner` has the number of runs per sample of
        each contender. `host` has the seconds for which a run occupies the host; on a CPU it is empty.
        """
        case, made = self.case, []
        timed_by = "events" if self.device.type == "cuda" and not case.wall else "wall"
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
            if name != case.ours and case.ours not in self.failed:
                row["ratio"] = ratio_of_visits(self.visits, name, case.ours)
        return made
