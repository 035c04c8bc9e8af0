"""A run: the cases of a subcommand measured one after another, each on disk as soon as it is done."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jasper_fast.bench.harness import checking, timing
from jasper_fast.bench.harness.case import Case, Effort
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.errors import DeviceLost
from jasper_fast.bench.harness.result_file import LOST, Results


@dataclass
class Run:
    """What every subcommand gets: device, precision, effort, where results go; `arguments` are the command line's."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    quick: bool
    results: Results
    effort: Effort = field(default_factory=Effort)
    deadline: float | None = None
    rivals: str = "default"
    brief: bool = False
    revisits: bool = False
    arguments: tuple[str, ...] = ()
    kept: list[Case] = field(default_factory=list)
    at_end: list[Callable[[], None]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def out_of_time(self) -> bool:
        """Whether the run's time is spent."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def cases(self, title: str, cases: Sequence[Case]) -> list[dict]:
        """Prepare and time one after another, showing progress: time that runs out leaves the numbers of the first."""
        todo = [case for case in cases if not self.results.has(case.id, [c.name for c in case.contenders])]
        done: list[dict] = []
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(title, total=len(todo) * 2)
            for i, case in enumerate(todo):
                if self.out_of_time():
                    console.print(f"{title}: out of time, {len(todo) - i} cases left; go on with --resume")
                    break

                def show(what: str, share: float, i: int = i, case: Case = case) -> None:
                    progress.update(task, description=f"{title}: {what} {case.label()}", completed=2 * i + share)

                made = self._case(case, show)
                self.results.add(made)
                done += made
        return done

    def _case(self, case: Case, show: Callable[[str, float], None]) -> list[dict]:
        """The rows of one case."""
        with self.blamed(case):
            show("check and warm up", 0.0)
            checking.prepare(case)
            made = timing.measure(case, self.device, self.effort, lambda share: show("time", 1.0 + share))
        if self.revisits:
            self.kept.append(case)
        else:
            case.runners.clear()
        return made

    @contextlib.contextmanager
    def blamed(self, case: Case) -> Iterator[None]:
        """Leaves out of the case what must not run, and where the device is lost inside writes the row of who did it:
        the others of the case may try again in another process, that one may not."""
        case.device = self.device
        case.failed |= self.results.fatal(case.id)
        if why := self.refusal(case.needs):
            case.failed[case.ours] = ("refused", why)
        try:
            yield
        except DeviceLost:
            case.contenders = [c for c in case.contenders if case.failed.get(c.name, ("", ""))[1].startswith(LOST)]
            self.results.add(timing.rows(case, (), {}, self.device))
            raise

    def refusal(self, needs: Sequence[str]) -> str:
        """Why ours is not timed: what the run's own self-check found in an op that it is made of; empty if nothing."""
        face = {"cpu": "cpu", "cuda": "triton"}.get(self.device.type, "") if self.backend == "auto" else self.backend
        dtype = str(self.dtype).removeprefix("torch.")
        for found in self.results.data.get("selfcheck", {}).get("verdicts", ()):
            ours = found["face"] in (face, "aten") and found["dtype"] == dtype and found["op"] in needs
            if ours and found["status"] == "bad":
                return f"self-check: {found['failure']}"
        return ""

    def close(self, release: Callable[[], None]) -> None:
        """Call `release` when nothing measured so far is needed again: now, or after the second visit."""
        if self.revisits:
            self.at_end.append(release)
        else:
            release()

    def revisit(self) -> None:
        """Time every case that was kept once more, in the same order, as far as the time goes."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("again", total=len(self.kept))
            for i, case in enumerate(self.kept):
                if self.out_of_time():
                    console.print(f"out of time, {len(self.kept) - i} cases have one visit only")
                    break
                progress.update(task, description=f"again: {case.bench} {case.label()}", completed=i)
                self.results.add(timing.measure(case, self.device, self.effort))
        for case in self.kept:
            case.runners.clear()
        self.kept.clear()
        for release in self.at_end:
            release()
        self.at_end.clear()
