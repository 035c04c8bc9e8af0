"""The console for progress and remarks. It writes to stderr, so that stdout has only results."""

from rich.console import Console

console = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line without wrapping it and without markup, because it may contain a path."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
