"""Writes files so that each is either complete or absent, even if the run is killed."""

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Progress = Callable[[str, int, int | None], None]  # gets the name of the work, the amount done, and the total if known


class PrepareError(ValueError):
    """Data cannot be prepared; the message says what is wrong, and where."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system (full disk, no permission) in its block into a PrepareError, which names
    ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by a library for the content of a file
            raise
        raise PrepareError(
            f"{path}: {error.strerror}; complete files are kept; solve the problem and run the command again"
        ) from error


def move(path: Path, target: Path) -> None:
    """Moves a complete file or folder to its place."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


@contextmanager
def whole(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path in ``folder`` (default: the folder of ``path``). At the end of the block it is renamed to
    ``path``, or removed after an error."""
    temporary = (folder or path.parent) / f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
    with writing(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            move(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_manifest(path: Path, entries: Iterable[dict[str, Any]], work: Path | None = None) -> int:
    """Writes entries as JSON lines, and returns their number. ``work``: the folder of the incomplete file."""
    count = 0
    with whole(path, work) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            count += 1
    return count


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Locks the folder against other runs. Raises PrepareError if another run has locked it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(
                f"{folder}: another run is preparing data here; wait for it, or choose another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)
