"""What `pytest bench/quick` says at its end: the shortest times over the reference face's, or eager's, in the same run.

The shortest, because what else runs on the machine only ever adds.
"""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line a ratio; a machine's speed cancels out, so that lines of two runs can be compared."""
    session = getattr(config, "_benchmarksession", None)
    found = [b for b in session.benchmarks if b.extra_info] if session else []
    if not found:
        return
    terminalreporter.section("ratios within this run (below 1: faster)")
    for b in found:
        for of, ratio in ((of, ratio) for of, ratio in b.extra_info.items() if ratio != 1):  # not to itself
            name = b.name.partition("[")[2].rstrip("]") or b.name
            terminalreporter.write_line(f"{ratio:7.3f} {of.replace('_', ' ')}: {b.group}: {name}")
