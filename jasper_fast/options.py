"""Command-line options as tables: groups of options, each as argparse takes it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

Option = tuple[tuple[str, ...], dict[str, Any]]


def option(*names: str, **settings: Any) -> Option:
    """The arguments of `add_argument`."""
    return names, settings


def add(parser: argparse.ArgumentParser, groups: dict[str, Sequence[Option]]) -> None:
    """Adds groups of options under their titles; those under "" to the parser itself."""
    for title, options in groups.items():
        group = parser.add_argument_group(title) if title else parser
        for names, settings in options:
            group.add_argument(*names, **settings)
