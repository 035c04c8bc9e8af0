"""Finds the file of a neural language model: a checkpoint, or a run's best.pt or else its newest checkpoint."""

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
    from jasper_fast.training.runs import Folder

    path = Path(path)
    found = [*path.glob("best.pt"), *Folder(path).candidates()] if path.is_dir() else [path]
    if not found:
        raise LanguageModelError(f"{path}: the folder holds no language model; `jasper-fast lm train-neural` makes one")
    return found[0]
