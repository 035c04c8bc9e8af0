"""The console for progress and remarks. It writes to stderr, so that stdout has only results."""

from rich.console import Console

console = Console(stderr=True)
