"""Finds the file of a neural language model: a checkpoint, or the best checkpoint in the folder of a training run."""

import os
from pathlib import Path

from jasper_fast.lm.arpa import LanguageModelError, begins_with


def is_neural(path: str | os.PathLike) -> bool:
    """Returns whether ``path`` is a folder or a PyTorch checkpoint. An ARPA file or KenLM binary is neither."""
    path = Path(path)
    return path.is_dir() or (path.is_file() and begins_with(path, b"PK"))  # the signature of a zip archive


def checkpoint_of(path: str | os.PathLike) -> Path:
    """Returns ``path`` itself, or if it is a folder, best.pt or else the newest step_*.pt in it. Raises
    LanguageModelError if a folder has neither."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / "best.pt").is_file():
        return path / "best.pt"
    steps = [p for p in path.glob("step_*.pt") if p.stem.removeprefix("step_").isdigit()]
    if not steps:
        raise LanguageModelError(f"{path}: the folder holds no language model; `jasper-fast lm train-neural` makes one")
    return max(steps, key=lambda p: int(p.stem.removeprefix("step_")))
