"""Runs a few random cases of every kind; run.py runs any number."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import run


@pytest.mark.parametrize(("kind", "cases"), run.KINDS.items())
def test_random_cases(kind: str, cases: int) -> None:
    failed = run.failures(kind, cases, seed=0)
    assert not failed, "\n".join(failed)
