"""Where progress and remarks go: results have stdout for themselves."""

from rich.console import Console

console = Console(stderr=True)
