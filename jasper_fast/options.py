"""Command-line options as tables: each group has a title and a list of arguments for argparse."""

import argparse
from collections.abc import Sequence
from typing import Any

Option = tuple[tuple[str, ...], dict[str, Any]]


def option(*names: str, **settings: Any) -> Option:
    """Returns the arguments for a later call of `add_argument`."""
    return names, settings


def add(parser: argparse.ArgumentParser, groups: dict[str, Sequence[Option]]) -> None:
    """Adds each group of options under its title. The options under the title "" have no group of their own."""
    for title, options in groups.items():
        group = parser.add_argument_group(title) if title else parser
        for names, settings in options:
            group.add_argument(*names, **settings)
