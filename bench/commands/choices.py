"""Types of the options `--model` and `--rivals`. A mistake is reported before anything is measured."""

import argparse
from pathlib import Path

from jasper_fast.bench.cases import models
from jasper_fast.bench.harness import options
from jasper_fast.bench.rivals import choice
from jasper_fast.nn.config import ConfigError

Batch = tuple[str, int, int]  # (model, N, T)
MODELS = ("small", "medium", "jasper10x5", "quartznet_small", "quartznet15x5")


def model(text: str) -> str:
    """Returns the text if it is one of MODELS or the path of a YAML file that describes a network."""
    if text in MODELS:
        return text
    known = f"a model is {', '.join(MODELS)} or a YAML file such as configs/jasper10x5dr.yaml"
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: no such model or file; {known}")
    try:
        models.config(text)
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{' '.join(str(error).split())}; {known}") from None
    return text


def models_batch(default: tuple[int, int]):
    """Returns a function that reads "small:8,400" as ("small", 8, 400), and "small" with the default (N, T)."""

    def read(text: str) -> Batch:
        name, colon, sizes = text.rpartition(":")
        if not colon:
            return (model(text), *default)
        try:
            return (model(name), *options.batch(sizes))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    read.__name__ = "model"  # the name in argparse's messages
    return read


def rivals(text: str) -> str:
    """Returns the text if it is "default", "all", or names of known rivals separated by commas."""
    known = sorted({*choice.OF_KERNELS, *(name for kind in choice.KINDS.values() for name in kind)})
    if text not in ("default", "all") and (unknown := [name for name in text.split(",") if name not in known]):
        raise argparse.ArgumentTypeError(f"no rival {unknown[0]!r}; use default, all, or some of {','.join(known)}")
    return text
