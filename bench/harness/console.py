"""The console for progress and remarks (stderr), so that stdout holds only results."""

from rich.console import Console

console = Console(stderr=True)
