"""The YAML file that `lm tune` writes and `--lm` reads. It names language models and the weights to use with them."""

import os
from pathlib import Path
from typing import Any

import yaml

from jasper_fast.lm.arpa import LanguageModelError

_PATHS = ("lm", "lexicon", "rescore")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "lm": str, "lexicon": (str, type(None)), "beam": int, "alpha": (int, float), "beta": (int, float),
    "rescore": str, "rescore_weight": (int, float)
}  # fmt: skip


def is_settings(path: str | os.PathLike) -> bool:
    return Path(path).suffix.lower() in (".yaml", ".yml")


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the settings. Relative paths start from the file's folder. Raises LanguageModelError if the file is
    missing or broken."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LanguageModelError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or not {"lm", "rescore"} & set(found):
        raise LanguageModelError(f"{path}: has neither `lm` nor `rescore`; `jasper-fast lm tune` writes such files")
    for name, value in found.items():
        if name in _KINDS and (not isinstance(value, _KINDS[name]) or isinstance(value, bool)):
            raise LanguageModelError(f"{path}: {name}: {value!r} has the wrong type")
    return found | {name: str(Path(path).parent / found[name]) for name in _PATHS if found.get(name)}


def write(path: str | os.PathLike, settings: dict[str, Any]) -> None:
    """Writes the settings, with paths relative to the file's folder."""
    folder = Path(path).resolve().parent
    relative = {name: os.path.relpath(Path(settings[name]).resolve(), folder) for name in _PATHS if settings.get(name)}
    Path(path).write_text(yaml.safe_dump(settings | relative, sort_keys=False), encoding="utf-8")
