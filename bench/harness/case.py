"""A case, its contenders, and for how long it is timed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from jasper_fast.bench.harness import correct

Answer = Mapping[str, Tensor]  # the tensors by which contenders are compared


@dataclass
class Rule:
    """A rule that replaces the case's tolerance for one contender, whose row shows `precision`, `words` and `found`.

    `judge(got, low, ref, found)` returns complaints. It may write numbers into `found`.
    """

    precision: str
    words: str
    judge: Callable[[Answer, Answer | None, Answer, dict], list[str]]
    found: dict = field(default_factory=dict)


@dataclass
class Runner:
    """A contender ready to run.

    `run` is the function that is timed. `outputs` computes the same with dropout off, from the current inputs of the
    case, and returns the tensors to compare. `extra` returns further complaints, for instance about the dropout rate.
    `rule`, if given, replaces the tolerance of the case.
    """

    run: Callable[[], object]
    outputs: Callable[[], Answer]
    extra: Callable[[], list[str]] = lambda: []
    rule: Rule | None = None


@dataclass(frozen=True)
class Contender:
    """The name of a contender, and the function that builds its runner. `build` may raise `Absent`."""

    name: str
    build: Callable[[], Runner]


@dataclass(frozen=True)
class Effort:
    """How long to time a case.

    The timing ends early if it has `min_rounds` rounds and every ratio is known to +-`target` (0.01 is 1 %). Otherwise
    it ends after `max_rounds` rounds, or when it has taken `seconds` and has `min_rounds` rounds. After 3x `seconds`
    three rounds are enough, and after 9x `seconds` one round.
    """

    seconds: float = 6.0
    min_rounds: int = 12
    max_rounds: int = 300
    target: float = 0.01

    def at_most(self, seconds: float) -> "Effort":
        """Returns the same effort with at most this many seconds per case."""
        return dataclasses.replace(self, seconds=min(self.seconds, seconds))


@dataclass(frozen=True)
class Case:
    """A computation that several contenders do.

    `refill(seed)` writes new values into the inputs in place. `reference()` returns the answer to the current inputs
    in fp64 (for a large network on a CPU, in fp32). `low()` returns the answer of plain PyTorch at the precision under
    test. If `low` is None, errors are judged by `tolerance.relative`. `flops` are the operations by the definition of
    the computation. `nbytes` are the bytes that our best kernels move. `items` is the number of things that one run
    completes (for instance utterances), for the throughput. With `wall` the case is timed by the wall clock also on a
    GPU.

    `seeds` are the seeds of the inputs on which contenders are compared before the timing. One is enough if an answer
    takes seconds, because contenders are compared on another input after the timing. `needs` are the ops that
    jasper_fast uses here, by their names in the self-check. The case is timed for `share` times the run's seconds per
    case. `rounds` is the least number of rounds that the quantiles of this case need.
    """

    bench: str
    key: dict
    contenders: Sequence[Contender]
    refill: Callable[[int], None]
    reference: Callable[[], Answer]
    low: Callable[[], Answer] | None = None
    tolerance: correct.Tolerance = field(default_factory=correct.Tolerance)
    ours: str = "jasper_fast"
    flops: float = 0.0
    nbytes: float = 0.0
    items: float = 0.0
    wall: bool = False
    seeds: tuple[int, ...] = (1, 2)
    needs: tuple[str, ...] = ()
    share: float = 1.0
    rounds: int = 0

    @property
    def id(self) -> str:
        """The name and key of the case as one string, which is the same in every run."""
        return self.bench + " " + " ".join(f"{k}={v}" for k, v in self.key.items())

    @property
    def dtype(self) -> str:
        """The precision under test."""
        return self.key.get("dtype", "float32")

    @property
    def names(self) -> list[str]:
        """The names of the contenders, in order."""
        return [contender.name for contender in self.contenders]

    def label(self) -> str:
        """Returns the name of the case for the terminal."""
        return " ".join(str(v) for v in self.key.values())

    def complaints(self, got: Answer, low: Answer | None, ref: Answer) -> list[str]:
        """Returns what is wrong with an answer by the tolerance of the case, one line per tensor."""
        return correct.complaints(got, low, ref, self.tolerance)

    def effort(self, run: Effort) -> Effort:
        """Returns the effort for this case, made from the effort of the run."""
        return dataclasses.replace(run, seconds=self.share * run.seconds, min_rounds=max(run.min_rounds, self.rounds))


QUICK = Effort(seconds=1.5, min_rounds=6, max_rounds=60, target=0.02)
