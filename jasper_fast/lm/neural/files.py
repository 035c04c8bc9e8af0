"""Finds the file of a neural language model: a checkpoint, or the best checkpoint in the folder of a training run."""

from __future__ import annotations

import os
from pathlib import Path

from jasper_fast.lm.arpa import LanguageModelError


def is_neural(path: str | os.PathLike) -> bool:
    """Returns whether ``path`` is a folder or a PyTorch checkpoint. An ARPA file or KenLM binary is neither."""
    path = Path(path)
    if path.is_dir():
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(2) == b"PK"  # the signature of a zip archive


def checkpoint_of(path: str | os.PathLike) -> Path:
    """Returns ``path`` if it is a file. In a folder, finds best.pt, or else the newest step_*.pt. Raises
    LanguageModelError if there is none."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / "best.pt").is_file():
        return path / "best.pt"
    steps = {p.stem.removeprefix("step_"): p for p in path.glob("step_*.pt")}
    if not any(map(str.isdigit, steps)):
        raise LanguageModelError(f"{path}: the folder holds no language model; `jasper-fast lm train-neural` makes one")
    return steps[max(filter(str.isdigit, steps), key=int)]
