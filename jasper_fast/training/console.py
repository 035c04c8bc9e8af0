"""Prints messages and the progress bar of a training run on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jasper_fast.extras import need


def talker(quiet: bool = False) -> Any:
    """Returns a rich Console that prints plain text to the standard error. Raises MissingExtra without rich."""
    console = need("rich.console", "train").Console
    return console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def training_bar(console: Any, done: int, total: int) -> Iterator[Any]:
    """A context with a progress bar. It yields a function that takes the steps done and the text before the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task("training", total=total, completed=done)
        yield lambda step, text=None: progress.update(bar, completed=step, description=text)
