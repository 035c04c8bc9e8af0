"""The checkpoints of one run: the last few, the best, and milestones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jasper_fast.nn.checkpoint import FORMAT, CheckpointError, load, save


class Folder:
    """The checkpoints of one training run: the last `keep`, `best.pt`, and one for each epoch in `milestones`.

    Raises ValueError if `keep` is less than 1.
    """

    def __init__(self, path: str | Path, keep: int = 2, milestones: Sequence[int] = ()):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}: resuming needs a checkpoint")
        self.path, self.keep, self.milestones = Path(path), keep, frozenset(milestones)

    def save(self, state: dict[str, Any], name: str | None = None) -> None:
        """Writes `state` as `name`.pt, or without a name under its step. Raises CheckpointError.

        Of the checkpoints named by their step, only the last `keep` are kept.
        """
        save(self.path / f"{name or 'step_{:08d}'.format(state['step'])}.pt", state)
        for old in self.steps()[: -self.keep]:
            old.unlink()

    def steps(self) -> list[Path]:
        """Returns the checkpoints that are named by their step, oldest first."""
        return sorted(self.path.glob("step_*.pt"), key=lambda p: int(p.stem.removeprefix("step_")))

    def clean(self) -> None:
        """Removes incomplete files, left by a process that was killed while it wrote them."""
        for leftover in self.path.glob(".*.pt.tmp"):
            leftover.unlink()

    def latest(self, warn: Callable[[str], None] = warnings.warn) -> tuple[Path, dict[str, Any]] | None:
        """Returns the path and contents of the newest checkpoint that can be read, or None in an empty folder.

        A file that cannot be read is reported to `warn`, and the next older one is tried. Raises CheckpointError if
        there are checkpoints but none can be read.
        """
        others = [p for p in (*sorted(self.path.glob("milestone_*.pt"))[::-1], self.path / "best.pt") if p.exists()]
        candidates = [*self.steps()[::-1], *others]
        for path in candidates:
            try:
                state = load(path)
                if state.get("format") != FORMAT:
                    raise CheckpointError(f"{path} was not written by a training run of jasper_fast")
                return path, state
            except CheckpointError as error:
                warn(f"{error}; trying the next older one")
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.path} can be read: empty the folder to start again"
            )
        return None
