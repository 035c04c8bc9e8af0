"""The console for progress and remarks. It writes to stderr, so that stdout has only results."""

from rich.console import Console

console = Console(stderr=True, markup=False)  # without markup, because a path may contain brackets


def say(text: str, to: Console = console) -> None:
    """Prints a line without wrapping it, because it may contain a path."""
    to.print(text, soft_wrap=True, highlight=False)
