"""The tuner. For each cell it checks our contenders, times the correct ones and plain PyTorch, and reports the result
immediately."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from jasper_fast.dispatch.verdict import in_a_line
from jasper_fast.kernels import launch
from jasper_fast.kernels.tables import Cell
from jasper_fast.selfcheck import perform
from jasper_fast.tuning import compiling, faces, timing
from jasper_fast.tuning.faces import LIBRARY, Proposal
from jasper_fast.tuning.held import Held, check_of

COMPILE_SHARE = 0.5  # share of the remaining time that compiling ahead may take
Tell = Callable[[str, Any], object]


class Tuner:
    """Tunes cells on one device within `budget` seconds.

    `tell(event, value)` receives progress and results. `without`: by cell, contenders that crashed or hung an
    earlier process and are not tried again. `seconds`: time for timing all contenders of a cell. Tests replace `clock`
    (measures the budget), `ticker` (times the calls) and `proposals` (returns the contenders).
    """

    def __init__(
        self,
        device: torch.device,
        tell: Tell,
        *,
        budget: float,
        seconds: float = timing.SECONDS,
        without: dict[str, list[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        ticker: timing.Wall | None = None,
        proposals: Callable[[Cell, torch.device], Iterable[Proposal]] = faces.proposals,
    ) -> None:
        self.device, self._tell, self._without, self._seconds = device, tell, without or {}, seconds
        self._clock, self._end, self._proposals = clock, clock() + budget, proposals
        self._ticker = ticker or (timing.Events(device) if device.type == "cuda" else timing.Wall())
        self._facts: dict[tuple[Cell, str], compiling.Facts] = {}
        self._checked: dict[tuple, str] = {}  # {kernel variant: why it is refused, or "" if it is correct}

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self._end - self._clock()

    def run(self, cells: Iterable[Cell]) -> None:
        """Measures `cells` in order until the budget is spent."""
        cells = [Cell(*cell) for cell in cells]
        self._compile(cells)
        for cell in cells:
            if self.left() <= 0:
                break
            self._tell("found", {"cell": cell} | self._measure(cell))
        self._tell("end", None)

    def _compile(self, cells: list[Cell]) -> None:
        arch = launch.architecture(self.device)
        if arch is None:  # the interpreter compiles nothing
            return
        jobs = [compiling.Job(c, p, arch) for c in cells for p in self._contenders(c) if p.face == "triton"]
        end = self._clock() + COMPILE_SHARE * self.left()
        self._facts = compiling.ahead(
            jobs,
            lambda done, of: self._tell("doing", f"compiling {done} of {of} kernels"),
            lambda: end - self._clock(),
        )

    def _contenders(self, cell: Cell) -> list[Proposal]:
        killers = self._without.get(" ".join(map(str, cell)), ())
        return [p for p in self._proposals(cell, self.device) if p.name(cell) not in killers]

    def _measure(self, cell: Cell) -> dict[str, Any]:
        held, runs, refused = Held(cell, self.device), {}, {}
        contenders = {p.name(cell): p for p in self._contenders(cell)}
        for name, proposal in contenders.items():
            self._tell("begin", [cell, name])
            if why := self._refusal(cell, proposal):
                refused[name] = why
            else:
                try:
                    call = held.call(proposal)
                    self._ticker.warm(call)
                    runs[name] = call
                except Exception as error:  # an error of a contender excludes only this contender
                    refused[name] = in_a_line(error)
            self._wait()
        # All contenders run before the first one is captured, so shared scratch memory has reached its final size.
        for name, call in list(runs.items()):
            self._tell("begin", [cell, name])
            try:
                runs[name] = self._ticker.prepare(call)
            except Exception as error:
                refused[name] = in_a_line(error)
                del runs[name]
        samples = timing.fastest_first(
            runs, self._ticker, lambda name: self._tell("begin", [cell, name]), self._seconds
        )
        runs.clear()
        held.free()
        timed, best = {}, {}
        for name, of in samples.items():
            timed[name] = contenders[name].row(cell, statistics.median(of), self._facts.get((cell, name), {})).plain()
            best.setdefault(contenders[name].face, timed[name])  # the fastest of each face
        return {"rows": list(best.values()), "refused": refused, "timed": timed, "samples": samples}

    def _refusal(self, cell: Cell, proposal: Proposal) -> str:
        """Returns why a contender is not timed (it spills, fails or is wrong), or "" if it may be timed."""
        if spilled := self._facts.get((cell, proposal.name(cell)), {}).get("spilled"):
            return f"spills {spilled} bytes"
        if proposal.face == LIBRARY[cell.op.split(".")[0]]:
            return ""  # plain PyTorch needs no check
        kind = (cell.op, cell.dtype, proposal.face, str(proposal.tile), cell.stride, cell.dilation, cell.taps == 1)
        kind += tuple(c % 64 for c in (cell.c_in, cell.c_out))
        if kind not in self._checked:
            row = perform.perform(check_of(cell, proposal, small=True), self.device)
            self._checked[kind] = "" if row["status"] == "ok" else f"{row['status']}: {row['detail']}"
        return self._checked[kind]

    def _wait(self) -> None:
        """Waits for the device. If a kernel made a fault such as an illegal address, this ends the process."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
