"""`python -m bench`, or `python -m jasper_fast.bench` where the package is installed."""

from jasper_fast.bench.cli import shell

raise SystemExit(shell())
