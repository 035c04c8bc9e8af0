"""Messages and the progress bar of a training on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jasper_fast.extras import need


def talker(quiet: bool = False) -> Any:
    """A rich Console on the standard error, plain text. Raises MissingExtra where rich is not installed."""
    console = need("rich.console", "train").Console
    return console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def training_bar(console: Any, done: int, total: int) -> Iterator[Any]:
    """A progress bar; yields a function that takes the steps done and the text after the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task("training", total=total, completed=done)
        yield lambda step, text=None: progress.update(bar, completed=step, description=text)
