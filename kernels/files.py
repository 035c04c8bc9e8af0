"""Writes files that other processes may read at the same time."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Writes a file, and makes its folder if needed. Readers see the whole old or the whole new file, even if the
    writing process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
