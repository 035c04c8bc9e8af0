"""The work of a training run between its steps: logging, validation, checkpoints and the end of the run."""

import argparse
import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jasper_fast.nn.checkpoint import load
from jasper_fast.training.randomness import rng_state
from jasper_fast.training.runs import Folder, Ranks, RunError, RunLog, StopRequest, talker
from jasper_fast.training.schedules import Schedule
from jasper_fast.training.state import Diverged, TrainingState
from jasper_fast.training.step import StepResult

RETURNS = 3  # how many times in a row a run may go back to the same best weights


@dataclass
class Loop(ABC):
    """A training run: its parts, and its work between steps. All ranks call its methods in the same order."""

    args: argparse.Namespace
    ranks: Ranks
    console: Any
    state: TrainingState
    schedule: Schedule
    folder: Folder
    about: dict[str, Any]
    stop: StopRequest
    log: RunLog
    judged: int  # the step of the last validation, at first the step where the run starts
    kept: int  # the step of the last checkpoint that is named by its step, at first the step where the run starts
    val: Any  # the data to validate on; None or empty if there are none

    # the step of the weights that the run went back to last, and how many times in a row it went back to them
    returned: tuple[int, int] = field(default=(-1, 0), init=False)

    best: ClassVar[str]  # name of the field of `state` with the lowest figure so far, such as "best_wer"
    best_text: ClassVar[str]  # a format string that prints this figure

    @abstractmethod
    def epoch_steps(self) -> int:
        """Returns the number of steps in the current epoch."""

    @abstractmethod
    def judge(self) -> None:
        """Validates the model, and saves the checkpoint best.pt if the result is the best so far."""

    @abstractmethod
    def tell_step(self, result: StepResult, lr: float, epoch: int, epochs: float) -> str:
        """Logs the figures since the last call, and returns the progress bar's text."""

    @abstractmethod
    def end_epoch(self) -> None:
        """Does what is due when an epoch has ended, before validation and checkpoints."""

    def count(self, result: StepResult, lr: float, progress: Callable, watch: Callable | None) -> None:
        """Counts a step. Then logs, validates and saves a checkpoint, each if it is due."""
        args, state = self.args, self.state
        state.meter.add(result)
        state.step, state.position = state.step + 1, state.position + 1
        progress(state.step)
        if watch:
            watch(state)
        epoch, steps = state.epoch + 1, self.epoch_steps()
        over, epochs = state.position == steps, state.epoch + state.position / steps
        log = state.step % args.log_every == 0 or state.step == self.schedule.total_steps
        validation = self.val and (state.step % args.val_every == 0 if args.val_every else over)
        save = state.step % args.save_every == 0 if args.save_every else over
        if over:
            state.next_epoch()
        if not self.ranks.on_gpu or log or validation or save or over:
            self.tell_skipped()
        if log:
            progress(state.step, self.tell_step(result, lr, epoch, epochs))
        if over:
            self.end_epoch()
        if validation:
            self.judge()
        milestone = over and state.epoch in self.folder.milestones
        if save or milestone:
            self.save(None, *([f"milestone_epoch_{state.epoch:04d}"] if milestone else []))

    def set_learning_rate(self) -> float:
        """Sets the optimiser's learning rate for the next step, and returns it."""
        step, total = self.state.step, self.schedule.total_steps
        if self.args.lr_by_clock:  # the clocks of the ranks differ, but their learning rates must not
            step = max(step, *self.ranks.highest(int(self.state.minutes / self.args.max_minutes * total)))
        lr = self.schedule(step)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def tell_skipped(self) -> None:
        """Reads the figures so far and prints which utterances caused bad steps.

        After too many bad steps in a row it goes back to the best weights. It raises RunError instead if
        `--reload-best` is not given, if going back is not possible, or if the last of these steps was skipped because a
        rank could read no file.
        """
        try:
            bad = self.state.meter.read()
        except Diverged as error:
            if not self.go_back(str(error)):
                raise
            return
        if bad:
            talker().print(*(f"step skipped: {culprit}" for culprit in bad), sep="\n")
            self.log.write(self.state.step, "skipped", names=bad)

    def go_back(self, why: str) -> bool:
        """Restores the weights and the optimiser's state of best.pt, and keeps the position in the data. Prints `why`.

        Returns False and changes nothing without `--reload-best`, without best.pt, or if the run has already gone back
        to the same best.pt RETURNS times in a row.
        """
        best = self.folder.path / "best.pt"
        if self.args.reload_best is None or self.ranks.vote(not best.exists())[0]:
            return False
        with self.ranks.together():
            saved = load(best)
        step, times = self.returned
        times = times + 1 if step == saved["step"] else 1
        if times > RETURNS:
            return False
        self.returned = saved["step"], times
        self.state.go_back(saved)
        self.state.stale = self.state.meter.bad_in_a_row = 0
        self.log.write(self.state.step, "reload", best=saved["step"])
        self.console.print(why)
        self.console.print(f"step {self.state.step}: back to the weights of step {saved['step']}, the best so far")
        return True

    def broken_off(self, results: Any) -> bool:
        """Returns whether a signal interrupted the validation, that is, whether `results` is None.

        Records it in the state, so that a resumed run repeats the validation.
        """
        self.state.unjudged = results is None
        if results is None:
            self.console.print("validation was interrupted by a signal")
        return results is None

    def keep_best(self, figure: float) -> None:
        """Records the figure of a validation, and saves the state as best.pt if the figure is the lowest so far.

        With `--reload-best N`, N > 0, it goes back to the best weights after N validations without a lower figure.
        """
        before = getattr(self.state, self.best)
        self.judged = self.state.step
        setattr(self.state, self.best, min(before, figure))  # `before`, if the figure is NaN
        self.state.meter.restart()
        self.state.stale = 0 if figure < before else self.state.stale + 1
        if figure < before:
            self.save("best")
        elif self.args.reload_best and self.state.stale >= self.args.reload_best:
            self.go_back(f"{self.state.stale} validations in a row were no better")

    def save(self, *names: str | None) -> None:
        """Writes one checkpoint for each of `names`. With None, the file is named by the step."""
        self.ranks.same_buffers(self.state.model)
        everything = self.state.state_dict() | self.about | {"rng": self.ranks.gather(rng_state())}
        for name in names if self.ranks.first else ():
            self.folder.save(everything, name)
        self.kept = self.state.step if None in names else self.kept
        self.state.meter.restart()

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """A context that saves a checkpoint if a RunError ends the run, for example after too many bad steps."""
        try:
            yield
        except RunError:
            self.save(None)
            raise

    def finish(self, stopped: bool) -> None:
        """Ends the run: validates and saves the last step, unless this has been done, and prints how the run ended.

        A run that a signal has `stopped` is not validated.
        """
        if self.val and not stopped and self.judged != self.state.step:
            self.judge()
        if self.kept != self.state.step:
            self.save(None)
        figure = getattr(self.state, self.best)
        best = f", best {self.best_text.format(figure)}" if figure < math.inf else ""
        signal = self.stop.signal or "a signal to another process"
        how = f"stopped by {signal}; go on with --resume" if stopped else "done"
        self.console.print(
            f"{how}: step {self.state.step}, {self.state.minutes:.1f} minutes{best}, checkpoints in {self.folder.path}"
        )
