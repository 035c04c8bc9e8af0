"""Prints the summary of `pytest bench/quick`: the shortest time of each contender, divided by that of our `reference`
implementation or of eager PyTorch in the same run.

The shortest times are used because other work on the machine can only add time.
"""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints one line per ratio. A ratio hardly depends on the speed of the machine, so runs can be compared."""
    session = getattr(config, "_benchmarksession", None)
    found = [b for b in session.benchmarks if b.extra_info] if session else []
    if not found:
        return
    terminalreporter.section("ratios of times in this run (below 1 is faster)")
    for b in found:
        name = b.name.partition("[")[2].rstrip("]") or b.name
        for of, ratio in b.extra_info.items():
            if ratio != 1:  # it is 1 if a contender is compared with itself
                terminalreporter.write_line(f"{ratio:7.3f} {of.replace('_', ' ')}: {b.group}: {name}")
