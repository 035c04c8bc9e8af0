"""Weights as safetensors files: plain tensors, with the configuration and the labels in the header."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from jasper_fast.extras import need
from jasper_fast.nn.checkpoint import FORMAT, CheckpointError, first_line

# The only entry that we write into the header, because the order of several entries would change between files.
KEY = "jasper_fast"


def is_one(path: Path) -> bool:
    """Returns whether `path` ends in .safetensors, or begins like such a file: eight bytes with a length, then JSON."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def read(path: str | Path) -> dict[str, Any]:
    """Reads the file into a dictionary like that of a checkpoint: `state_dict`, and for our own files `format`,
    `config` and `labels`.

    Raises CheckpointError naming a file that is cut short or whose header does not fit its bytes, and MissingExtra
    without safetensors. The entry `state_dict` equals `safetensors.torch.load_file(path)`.
    """
    safetensors = need("safetensors", "safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {"state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        if KEY in header:
            about = json.loads(header[KEY])
            state |= {key: about[key] for key in ("format", "config", "labels")}
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({os.path.getsize(path)} bytes, {first_line(error)}); copy or "
            f"download it again"
        ) from error
    return state


def write(file: BinaryIO, entries: dict[str, Tensor], config: dict[str, Any], labels: list[str] | None) -> None:
    """Writes the file. The tensors in `entries` must be contiguous and share no memory."""
    about = json.dumps({"format": FORMAT, "config": config, "labels": labels})
    file.write(need("safetensors.torch", "safetensors").save(entries, {KEY: about}))
