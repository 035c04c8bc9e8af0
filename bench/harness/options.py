"""Types of the command-line options, for argparse, and the option `--out`."""

import argparse
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from jasper_fast.bench.harness import paths, result_file
from jasper_fast.options import option

OUT = option(
    "--out", type=Path, default=paths.OUT, metavar="DIR", help="folder for the JSON file (default: build/bench)"
)
BATCH = "a number of utterances and a number of feature frames, both at least 1, such as 8,400"


def device(text: str) -> str:
    """Returns the text if it names a device that PyTorch sees: cpu, cuda, or cuda:1."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index is not None):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:1")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"{text}: this PyTorch sees no GPU (python -m jasper_fast info says more); use --device cpu"
        )
    if found.type == "cuda" and found.index is not None and found.index >= (there := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(
            f"{text}: PyTorch sees {there} GPU{'s' * (there > 1)}; use cuda:0{f' to cuda:{there - 1}' * (there > 1)}"
        )
    return text


def _positive(kind: type, what: str) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return read


count = _positive(int, "a whole number of at least 1")
seconds = _positive(float, "a number above 0")


def pattern(text: str) -> str:
    """Returns the text if it is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text


def batch(text: str) -> tuple[int, int]:
    """Reads "8,400" as (N, T) = (8, 400)."""
    try:
        N, T = (int(value) for value in text.split(","))
    except ValueError:
        N = T = 0
    if min(N, T) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not {BATCH}")
    return N, T


def writable(folder: Path) -> None:
    """Creates the folder of `--out`. Raises SystemExit if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "is a file" if folder.is_file() else os.strerror(error.errno or 0)
        raise SystemExit(f"--out {folder}: {why}; name a folder in which files can be written") from None


def result(text: str) -> Path:
    """Returns the path of a result file of `python -m bench`."""
    try:
        result_file.read(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def page(text: str) -> Path:
    """Returns the path if a page can be written to it: its folder exists, and it is not a folder itself."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing folder; name one such as page.html")
    return path
