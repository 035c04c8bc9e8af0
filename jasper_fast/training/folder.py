"""The checkpoints of one run: the last few, the best, and milestones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jasper_fast.nn.checkpoint import FORMAT, CheckpointError, load, save


class Folder:
    """The checkpoints of one training run: the last `keep`, `best.pt`, and one per epoch in `milestones`.

    Raises ValueError if `keep` is less than 1.
    """

    def __init__(self, path: str | Path, keep: int = 2, milestones: Sequence[int] = ()):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}: resuming needs a checkpoint")
        self.path, self.keep, self.milestones = Path(path), keep, frozenset(milestones)

    def save(self, state: dict[str, Any]) -> Path:
        """Writes `state` under its `step`, then removes what is older than the last `keep`; raises CheckpointError."""
        path = self.path / f"step_{state['step']:08d}.pt"
        save(path, state)
        for old in self.steps()[: -self.keep]:
            old.unlink()
        return path

    def save_milestone(self, state: dict[str, Any], epoch: int) -> Path | None:
        """Writes `state` for good if `epoch` is a milestone."""
        if epoch not in self.milestones:
            return None
        save(path := self.path / f"milestone_epoch_{epoch:04d}.pt", state)
        return path

    def save_best(self, state: dict[str, Any]) -> Path:
        """Writes `state`, whose `best_wer` is its own, as `best.pt`."""
        save(path := self.path / "best.pt", state)
        return path

    def steps(self) -> list[Path]:
        """The rotating checkpoints, oldest first."""
        return sorted(self.path.glob("step_*.pt"), key=lambda p: int(p.stem.removeprefix("step_")))

    def clean(self) -> None:
        """Removes what a process killed in the middle of a write has left."""
        for leftover in self.path.glob(".*.pt.tmp"):
            leftover.unlink()

    def latest(self, report: Callable[[str], None] = warnings.warn) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its contents; None if there is none at all.

        Each file that cannot be read is reported, and the one before it taken; raises CheckpointError if none can.
        """
        others = [p for p in (*sorted(self.path.glob("milestone_*.pt"))[::-1], self.path / "best.pt") if p.exists()]
        candidates = [*self.steps()[::-1], *others]
        for path in candidates:
            try:
                state = load(path)
                if state.get("format") != FORMAT:
                    raise CheckpointError(f"{path} was not written by this project's training")
                return path, state
            except CheckpointError as error:
                report(f"{error}; trying the one before it")
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.path} can be read; empty the folder to start anew"
            )
        return None
