"""A run measures the cases of a subcommand one after another, and writes the result file after each case."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jasper_fast.bench.harness import checking, timing
from jasper_fast.bench.harness.case import Case, Effort
from jasper_fast.bench.harness.console import console
from jasper_fast.bench.harness.errors import DeviceLost
from jasper_fast.bench.harness.measurement import LOST, Measurement, Row
from jasper_fast.bench.harness.result_file import Results
from jasper_fast.kernels import tables


@dataclass
class Run:
    """What every subcommand gets: device, precision, effort, result file.

    The run stops at the time `deadline` of `time.monotonic`. With `brief`, for the subcommand `all`, it measures fewer
    cases, and keeps the measured ones in `kept`, for `revisit`. `arguments` are those of the command line.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str
    quick: bool
    results: Results
    effort: Effort = field(default_factory=Effort)
    deadline: float | None = None
    rivals: str = "default"
    brief: bool = False
    arguments: tuple[str, ...] = ()
    kept: list[Measurement] = field(default_factory=list)
    at_end: list[Callable[[], None]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def dtype_name(self) -> str:
        """The name of the dtype, such as float32."""
        return tables.DTYPES[self.dtype]

    def out_of_time(self) -> bool:
        """Whether the time of the run is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def cases(self, title: str, cases: Sequence[Case]) -> list[Row]:
        """Measures the cases that the result file lacks, one after another; shows progress; returns their rows.

        If the time runs out, the remaining cases get no rows.
        """
        todo = [case for case in cases if not self.results.has(case.id, case.names)]
        done: list[Row] = []
        with _progress() as progress:
            task = progress.add_task(title, total=len(todo) * 2)
            for i, case in enumerate(todo):
                if self.out_of_time():
                    console.print(f"{title}: out of time, {len(todo) - i} cases left; --resume continues")
                    break
                with self.begun(case) as m:
                    progress.update(task, description=f"{title}: check and warm up {case.label()}", completed=2 * i)
                    checking.prepare(m)
                    progress.update(task, description=f"{title}: time {case.label()}")
                    made = timing.measure(
                        m, self.effort, lambda share, i=i: progress.update(task, completed=2 * i + 1 + share)
                    )
                if self.brief:
                    self.kept.append(m)
                self.close(m.runners.clear)
                self.results.add(made)
                done += made
        return done

    @contextlib.contextmanager
    def begun(self, case: Case) -> Iterator[Measurement]:
        """A context with a `Measurement` of the case, in which contenders that must not run count as failed.

        If a contender breaks the device inside, its row is written. The other contenders are left to a later process.
        """
        m = Measurement(case, self.device, failed=self.results.fatal(case.id))
        if why := self.refusal(case.needs):
            m.fail(case.ours, "refused", why)
        try:
            yield m
        except DeviceLost:
            broke = [name for name, (_, why) in m.failed.items() if why.startswith(LOST)]
            m.case = dataclasses.replace(case, contenders=[c for c in case.contenders if c.name in broke])
            self.results.add(m.rows({}, {}))
            raise

    def refusal(self, needs: Sequence[str]) -> str:
        """Returns the fault that the run's self-check found in one of the ops `needs`, or an empty text.

        With such a fault jasper_fast is not timed.
        """
        face = {"cpu": "cpu", "cuda": "triton"}.get(self.device.type, "") if self.backend == "auto" else self.backend
        verdicts = self.results.data.get("selfcheck", {}).get("verdicts", ())
        ours = (v for v in verdicts if v["face"] in (face, "aten") and v["dtype"] == self.dtype_name)
        return next((f"self-check: {v['failure']}" for v in ours if v["op"] in needs and v["status"] == "bad"), "")

    def close(self, release: Callable[[], None]) -> None:
        """Calls `release`, which frees a case or what cases share. With `brief`, `revisit` calls it after the second
        timing of the cases."""
        if self.brief:
            self.at_end.append(release)
        else:
            release()

    def revisit(self) -> None:
        """Times every kept case a second time, in the same order, until the time runs out."""
        with _progress() as progress:
            task = progress.add_task("again", total=len(self.kept))
            for i, m in enumerate(self.kept):
                if self.out_of_time():
                    console.print(f"out of time, {len(self.kept) - i} cases were timed only once")
                    break
                progress.update(task, description=f"again: {m.case.bench} {m.case.label()}", completed=i)
                self.results.add(timing.measure(m, self.effort))
        for release in self.at_end:
            release()
        self.kept.clear()
        self.at_end.clear()


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
