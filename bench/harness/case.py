"""A case, its contenders, and the effort that timing one takes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from jasper_fast.bench.harness import correct

Answer = Mapping[str, Tensor]  # what a contender is compared by


@dataclass
class Rule:
    """A looser rule than the case's tolerance, in `words`, for a contender whose `precision` cannot meet that.

    `judge(got, low, ref)` returns complaints and leaves in `found` what the contender's row tells of its answers.
    """

    precision: str
    words: str
    judge: Callable[[Answer, Answer | None, Answer], list[str]]
    found: dict = field(default_factory=dict)


@dataclass
class Runner:
    """A contender ready to run.

    `run` is what is timed. `outputs` computes the same with dropout off, from the case's current inputs, and returns
    the tensors to compare. `extra` returns further complaints (dropout's rate, for instance). `rule`: how these outputs
    are judged, where not as the others' are.
    """

    run: Callable[[], object]
    outputs: Callable[[], Answer]
    extra: Callable[[], list[str]] = lambda: []
    rule: Rule | None = None


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Case:
    """One question put to several contenders; what comes of it while it is measured is in a `Measurement`.

    `refill(seed)` writes new values into the inputs in place; `reference()` is the fp64 answer to the current inputs
    and `low()` plain PyTorch's at the precision under test (None: `tolerance.relative` holds instead).
    `flops` and `nbytes` are the least that the computation must do and move; `items` is what one run completes
    (utterances, for instance), for throughput. `seeds`: the inputs on which all are compared before the timing; one is
    enough where an answer takes seconds, because another is compared afterwards. `needs`: the ops, as the self-check
    names them, that ours is made of. `share`: of the run's seconds a case that it takes; `rounds`: as many at least as
    its quantiles take.
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
        """The case's key as one string, the same in every run."""
        return self.bench + " " + " ".join(f"{k}={v}" for k, v in self.key.items())

    @property
    def dtype(self) -> str:
        """The precision under test."""
        return self.key.get("dtype", "float32")

    @property
    def names(self) -> list[str]:
        """The contenders' names, in their order."""
        return [contender.name for contender in self.contenders]

    def label(self) -> str:
        """The case for people."""
        return " ".join(str(v) for v in self.key.values())

    def only(self, names: Sequence[str]) -> "Case":
        """The same question to some of the contenders."""
        return dataclasses.replace(self, contenders=[c for c in self.contenders if c.name in names])

    def complaints(self, got: Answer, low: Answer | None, ref: Answer) -> list[str]:
        """What is wrong with an answer by the case's tolerance."""
        return correct.complaints(got, low, ref, self.tolerance)

    def effort(self, run: Effort) -> Effort:
        """What it takes of a run's effort."""
        rounds = max(run.min_rounds, self.rounds)
        return dataclasses.replace(run, seconds=self.share * run.seconds, min_rounds=rounds)


QUICK = Effort(seconds=1.5, min_rounds=6, max_rounds=60, target=0.02)
