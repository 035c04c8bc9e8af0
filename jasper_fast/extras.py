"""Packages that only some tasks need; pyproject.toml lists them as extras."""

from importlib import import_module
from types import ModuleType


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says how to get it."""


def need(module: str, extra: str) -> ModuleType:
    """Imports and returns a module. If it is not installed, raises MissingExtra naming the extra that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed: pip install 'jasper-fast[{extra}]'") from error
