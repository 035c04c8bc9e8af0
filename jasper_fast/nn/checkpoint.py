"""Checkpoint files. They are written atomically, and reading one executes nothing in it."""

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = "jasper_fast 1"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used. The message says why, and most messages also what to do."""


def first_line(error: Exception) -> str:
    """Returns the first line of the error's message, or the name of its class if it has no message."""
    return (str(error) or type(error).__name__).partition("\n")[0]


def no_memory(error: Exception) -> bool:
    """Returns whether `error` says that the memory of the CPU or of a GPU does not suffice. On a CPU PyTorch raises a
    plain RuntimeError for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A context that yields a temporary file to write, which replaces `path` at the end.

    The temporary file lies next to `path`, and each process has its own. It is flushed to the disk (fsync) before it is
    renamed, so even after a crash `path` has either its old content or the whole new one. Raises CheckpointError if the
    file cannot be written (for example if the disk is full). If an error occurs before the renaming, the old file is
    unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename must reach the disk too
        finally:
            os.close(folder)
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            error = error.__context__  # PyTorch's writer hides the disk's own error
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
        kept = f"; the earlier {path.name} is untouched" if path.exists() else ""
        raise CheckpointError(
            f"cannot write {path}: {first_line(error)} ({free:.0f} MiB free on that disk){kept}. Free some space, or "
            f"choose another folder or a smaller number of kept checkpoints"
        ) from error
    finally:
        if temporary.exists():  # unlink(missing_ok=True) would fail if a file lies where the folder should be
            temporary.unlink()


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state`, a dictionary of tensors and plain Python values, atomically as `replacing` does.

    Raises CheckpointError. Equivalent to `torch.save(state, path)` if nothing fails.
    """
    with replacing(path) as file:
        torch.save(state, file)


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Returns the dictionary in a PyTorch checkpoint file.

    The file may have only tensors and plain values, and nothing in it is executed. Checks the checksum of every record
    (files of torch < 1.6 have none), so a damaged file is noticed before it is used. Raises CheckpointError naming the
    file and the fix, and MemoryError if the file does not fit into memory. Equivalent to
    `torch.load(path, map_location, weights_only=True)`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint (.pt) or of a NeMo model (.nemo)")
    with open(path, "rb") as file:
        return read(file, str(path), map_location)


def read(file: BinaryIO, name: str, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads an open file as `load` does. Error messages call it `name`."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if bad := archive.testzip():
                    raise CheckpointError(f"{name} is damaged (record {bad}); take an earlier checkpoint")
        file.seek(0)
        state = torch.load(file, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # on arbitrary bytes the unpickler can raise anything
        if no_memory(error):
            raise MemoryError(f"{name} does not fit into memory ({first_line(error)})") from error
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{name} holds Python objects ({found[1]}) and is not loaded, because loading them could run any "
                f"code; where it was made, save it again with torch.save({{'state_dict': model.state_dict()}}, ...)"
            ) from error
        size = file.seek(0, os.SEEK_END)
        raise CheckpointError(
            f"{name} is not a complete PyTorch checkpoint ({size} bytes): it was cut short, or is "
            f"another kind of file; copy it again or take an earlier checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{name} holds a {type(state).__name__}, not a dictionary with a 'state_dict'")
    return state


def refuse_endless(value: Any, name: str, most: int = 100_000) -> None:
    """Raises CheckpointError if the lists and dictionaries in `value` have too many items when written out.

    A file of a few bytes can define lists that refer to each other many times and would fill any memory when written
    out, or a list that contains itself.
    """
    waiting, seen = [value], 0
    while waiting:
        item = waiting.pop()
        inner = list(item.values()) if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
        seen += len(inner)
        if seen > most:
            raise CheckpointError(f"{name} has over {most:,} settings, or one that contains itself")
        waiting += inner
