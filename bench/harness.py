"""Contenders on the same inputs, checked, then timed in turns: A B A B ... so that drift hits all alike.

A `Case` is one question (an op at a shape, a model at a batch). Its contenders are built, compared with fp64 on two
different inputs, warmed up, timed in rounds, and compared once more; a contender that is absent, refused, fails or is
wrong becomes a row that says so and carries no number. A run may come back to its cases minutes later (`Run.revisit`):
a ratio's interval then spans what each visit alone would have said, because a machine's mood outlasts a visit.
"""

import contextlib
import dataclasses
import gc
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from bench import correct, cudnn_search, machine
from bench.clocks import CudaClock, Gauge, WallClock, clock, clocks_during, synchronize
from bench.ratios import ratio, ratio_of_visits, summary
from bench.result_file import LOST, Results

CPU = torch.device("cpu")
LONG = 1.0  # seconds of a run that a CPU is warm after
console = Console(stderr=True)


class Absent(Exception):
    """A rival that this machine does not have; the message says how to get it."""


class OutOfTime(BaseException):
    """The run's time is spent; no rival's error handling may swallow it."""


class DeviceLost(BaseException):
    """A kernel has left the GPU such that this process runs nothing more; no error handling may swallow it."""


@dataclass
class Runner:
    """A contender ready to run.

    `run` is what is timed. `outputs` computes the same with dropout off, from the case's current inputs, and returns
    the tensors to compare. `extra` returns further complaints (dropout's rate, for instance).
    """

    run: Callable[[], object]
    outputs: Callable[[], Mapping[str, Tensor]]
    extra: Callable[[], list[str]] = lambda: []


@dataclass
class Contender:
    """A name and how to build it; `build` may raise `Absent`."""

    name: str
    build: Callable[[], Runner]


@dataclass(frozen=True)
class Effort:
    """How long to time a case: until every ratio's interval is narrower than +-`target`, within these bounds.

    After thrice the `seconds` three rounds are enough, after nine times as many the round that is over.
    """

    seconds: float = 6.0
    min_rounds: int = 12
    max_rounds: int = 300
    target: float = 0.01

    def at_most(self, seconds: float) -> "Effort":
        """The same in no more than so many seconds a case."""
        return dataclasses.replace(self, seconds=min(self.seconds, seconds))


@dataclass
class Case:
    """One question put to several contenders.

    `refill(seed)` writes new values into the inputs in place; `reference()` is the fp64 answer to the current inputs
    and `low()` plain PyTorch's at the precision under test (None: `tolerance.relative` holds instead).
    `flops` and `nbytes` are the least that the computation must do and move; `items` is what one run completes
    (utterances, for instance), for throughput. `seeds`: the inputs on which all are compared before the timing; one is
    enough where an answer takes seconds, because another is compared afterwards. `needs`: the ops, as the self-check
    names them, that ours is made of. `share`: of the run's seconds a case that it takes; `rounds`: as many at least as
    its quantiles take. `device`: the run's, where it looks for each contender's faults. `readings`: of clocks, while it
    was timed. `hurried`: a round takes so long that there were fewer of them than usual.
    """

    bench: str
    key: dict
    contenders: Sequence[Contender]
    refill: Callable[[int], None]
    reference: Callable[[], Mapping[str, Tensor]]
    low: Callable[[], Mapping[str, Tensor]] | None = None
    tolerance: correct.Tolerance = field(default_factory=correct.Tolerance)
    ours: str = "jasper_fast"
    flops: float = 0.0
    nbytes: float = 0.0
    items: float = 0.0
    dtype: str = "float32"
    wall: bool = False
    seeds: tuple[int, ...] = (1, 2)
    needs: tuple[str, ...] = ()
    share: float = 1.0
    rounds: int = 0
    device: torch.device | None = None
    runners: dict[str, Runner] = field(default_factory=dict)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    visits: list[dict[str, list[float]]] = field(default_factory=list)
    readings: list[dict] = field(default_factory=list)
    hurried: bool = False

    @property
    def id(self) -> str:
        """The case's key as one string, the same in every run."""
        return self.bench + " " + " ".join(f"{k}={v}" for k, v in self.key.items())

    def label(self) -> str:
        """The case for people."""
        return " ".join(str(v) for v in self.key.values())

    def effort(self, run: Effort) -> Effort:
        """What it takes of a run's effort."""
        rounds = max(run.min_rounds, self.rounds)
        return dataclasses.replace(run, seconds=self.share * run.seconds, min_rounds=rounds)


QUICK = Effort(seconds=1.5, min_rounds=6, max_rounds=60, target=0.02)


# ------------------------------------------------------------------ the device


def lost(device: torch.device | None) -> str:
    """Why the device runs nothing more in this process; empty where it does, or where none is told."""
    if device is None:
        return ""
    try:
        synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return ""


def tidy(device: torch.device) -> None:
    """Give back what no one holds any more: cycles, compiled graphs and their pools, the allocator's free blocks."""
    if device.type == "cuda":
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()
        if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
            trees.reset_cudagraph_trees()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"


# ------------------------------------------------------------------ preparing


def prepare(case: Case) -> None:
    """Build the contenders, refuse the wrong ones, warm up the rest."""
    for contender in case.contenders:
        if contender.name not in case.failed:
            with caught(case, contender.name):
                case.runners[contender.name] = contender.build()
    check(case, case.seeds)
    on_gpu = case.device is not None and case.device.type == "cuda"
    for name in list(case.runners):
        with caught(case, name):
            started = time.perf_counter()
            case.runners[name].run()
            if time.perf_counter() - started < LONG or on_gpu:  # there a graph is captured in the second run
                case.runners[name].run()
    gc.collect()


def check(case: Case, seeds: Sequence[int]) -> None:
    """Compare every runner with fp64 on fresh inputs; a wrong one loses its place.

    Two seeds at least in all: an answer left over from the first inputs is wrong for the second. Contenders run before
    the reference and after `poison`, so no correct answer lies about in freed memory for them to leave unwritten.
    Without an answer to compare with (no memory for it, say) none of the contenders gets a number.
    """
    for seed in seeds:
        got: dict[str, Mapping[str, Tensor]] = {}
        low = ref = None
        with answerable(case):
            case.refill(seed)
        for name in list(case.runners):
            with caught(case, name):
                if got:
                    correct.poison(next(iter(got.values())))
                got[name] = {k: v.detach().clone() for k, v in case.runners[name].outputs().items()}
        if not got:
            return
        with answerable(case):
            low = case.low() if case.low else None
            ref = case.reference()
        for name in list(case.runners):
            with caught(case, name):
                wrong = correct.complaints(got[name], low, ref, case.tolerance)
                if seed == seeds[-1]:
                    wrong += case.runners[name].extra()
                if wrong:
                    case.failed[name] = ("wrong", "; ".join(wrong[:4]))
                    del case.runners[name]


@contextlib.contextmanager
def caught(case: Case, name: str):
    """A contender's failure is its own row, never the end of the run; the device's loss is the end of this process."""
    try:
        yield
        if case.device is not None:
            synchronize(case.device)  # a fault shows here, in the row of who launched the kernel, not in the next one's
    except Absent as error:
        case.failed[name] = ("absent", str(error))
        case.runners.pop(name, None)
    except Exception as error:  # whatever a rival raises belongs in its row
        case.failed[name] = ("failed", first_line(error))
        case.runners.pop(name, None)
        if why := lost(case.device):
            case.failed[name] = ("failed", f"{LOST}: {why}")
            raise DeviceLost(f"{name}, {case.label()}: {why}") from error


@contextlib.contextmanager
def answerable(case: Case):
    """Without inputs, or an answer to compare with, no contender of the case has a number; the other cases go on."""
    try:
        with cudnn_search.off():
            yield
        if case.device is not None:
            synchronize(case.device)
    except Exception as error:
        why = first_line(error)
        for name in case.runners:
            case.failed[name] = ("failed", f"nothing to compare it with: {why}")
        case.runners.clear()
        if told := lost(case.device):
            raise DeviceLost(f"the reference of {case.label()}: {told}") from error


# ------------------------------------------------------------------ timing


def measure(
    case: Case, device: torch.device, effort: Effort, on_round: Callable[[float], None] = lambda share: None
) -> list[dict]:
    """Time a prepared case; returns one row a contender, of this visit and of earlier ones together."""
    ticker = clock(device, case.wall)
    samples, inner, host = _rounds(case, ticker, case.effort(effort), on_round)
    case.hurried |= max(map(len, samples.values()), default=effort.min_rounds) < effort.min_rounds
    check(case, (3,))  # what was right before the timing must still be right after it
    case.visits.append({name: s for name, s in samples.items() if name in case.runners})
    return rows(case, case.visits, inner, device, host)


def _rounds(
    case: Case, ticker: WallClock | CudaClock, effort: Effort, on_round: Callable[[float], None]
) -> tuple[dict, dict, dict]:
    names = list(case.runners)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gauge = Gauge(ticker.device, case.readings)
    inner: dict[str, int] = {}
    host: dict[str, float] = {}
    for name in names:
        with caught(case, name):
            once = ticker.sample(case.runners[name].run, 1)
            inner[name] = max(1, int(ticker.min_sample / max(once, 1e-9)))
            if (told := ticker.host(case.runners[name].run)) is not None:
                host[name] = told
    names = [n for n in names if n in case.runners]
    was_enabled, started, done = gc.isenabled(), time.perf_counter(), 0
    gc.disable()
    try:
        while names and done < effort.max_rounds:
            order = names if done % 2 == 0 else names[::-1]  # A B, B A: no one always runs on another's caches
            for name in order:
                with caught(case, name):
                    samples[name].append(ticker.sample(case.runners[name].run, inner[name]))
            names = [n for n in names if n in case.runners]
            done += 1
            gauge.look()
            spent = time.perf_counter() - started
            on_round(min(1.0, max(spent / effort.seconds, done / effort.max_rounds)))
            enough = done >= effort.min_rounds and done % 4 == 0 and _settled(case, samples, names, effort.target)
            least = effort.min_rounds if spent <= 3 * effort.seconds else 3 if spent <= 9 * effort.seconds else 1
            late = spent > effort.seconds and done >= least
            if enough or late:
                break
            if done % 8 == 0:
                gc.collect(0)
        gauge.look(last=True)
    finally:
        if was_enabled:
            gc.enable()
    return samples, inner, host


def _settled(case: Case, samples: dict[str, list[float]], names: Sequence[str], target: float) -> bool:
    if case.ours not in names or len(names) < 2:
        return False
    intervals = (ratio(samples[n], samples[case.ours], resamples=200) for n in names if n != case.ours)
    return all((r["high"] - r["low"]) / 2 <= target * r["median"] for r in intervals)


def rows(
    case: Case,
    visits: Sequence[Mapping[str, Sequence[float]]],
    inner: Mapping[str, int],
    device: torch.device,
    host: Mapping[str, float] = MappingProxyType({}),
) -> list[dict]:
    """One row a contender, in the case's order, from its samples in each visit; a contender without any says why.

    `host`: seconds that a run holds the host, where that is not the measured time itself.
    """
    names = {name for visit in visits for name in visit}
    samples = {name: [t for visit in visits for t in visit.get(name, ())] for name in names}
    made = []
    for contender in case.contenders:
        name = contender.name
        row = {
            "id": f"{case.id} / {name}",
            "bench": case.bench,
            "key": case.key,
            "contender": name,
            "ours": name == case.ours,
        }
        row |= {
            "dtype": case.dtype,
            "flops": case.flops,
            "bytes": case.nbytes,
            "clock": "wall" if case.wall or device.type != "cuda" else "events",
        }
        if name in case.failed:
            status, why = case.failed[name]
            made.append(row | {"status": status, "why": why})
            continue
        time_s = summary(samples[name], inner[name])
        row |= {"status": "ok", "time_s": time_s}
        if case.hurried:
            row["hurried"] = True
        if case.readings:
            row["clocks"] = clocks_during(case.readings)
        if name in host:
            row["host_s"] = host[name]
        if case.flops:
            row["flops_per_s"] = case.flops / time_s["median"]
        if case.nbytes:
            row["bytes_per_s"] = case.nbytes / time_s["median"]
        if case.items:
            row["items_per_s"] = case.items / time_s["median"]
        if name != case.ours and case.ours in samples and case.ours not in case.failed:
            row["ratio"] = ratio_of_visits(visits, name, case.ours)
        made.append(row)
    return made


# ------------------------------------------------------------------ a run


@dataclass
class Run:
    """What every subcommand gets: device, precision, effort, where results go; `arguments` are the command line's."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    quick: bool
    results: Results
    effort: Effort = Effort()
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
            prepare(case)
            made = measure(case, self.device, self.effort, lambda share: show("time", 1.0 + share))
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
            self.results.add(rows(case, (), {}, self.device))
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
                self.results.add(measure(case, self.device, self.effort))
        for case in self.kept:
            case.runners.clear()
        self.kept.clear()
        for release in self.at_end:
            release()
        self.at_end.clear()


def header(device: torch.device, arguments: Mapping[str, object], effort: Effort | None = None) -> dict:
    """The part of a result that says where it comes from; `effort`: as the run makes it (default: the usual one)."""
    return {
        "machine": machine.describe(device),
        "arguments": {k: str(v) for k, v in arguments.items()},
        "effort": asdict(effort or Effort()),
    }


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A generator for inputs, on the device that holds them."""
    return torch.Generator(device).manual_seed(seed)


def stable_seed(*parts: object) -> int:
    """A seed that names give, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
