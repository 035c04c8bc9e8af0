"""The sanitizers of `make sanitize` report the faults that are planted for them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sanitize


@pytest.mark.slow
@pytest.mark.parametrize("kind", sanitize.RUNTIME)
def test_planted_faults_are_seen(kind: str, tmp_path: Path) -> None:
    if not sanitize.compiler() or (kind == "thread" and not shutil.which("setarch")):
        pytest.skip("no C++ compiler, or no setarch")
    where = subprocess.check_output([sanitize.compiler(), f"-print-file-name={sanitize.RUNTIME[kind]}"], text=True)
    if not Path(where.strip()).is_absolute():
        pytest.skip(f"the compiler does not have {sanitize.RUNTIME[kind]}")
    assert sanitize.blind(kind, tmp_path) == []


@pytest.mark.slow
def test_a_sanitizer_that_is_off_is_blind(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sanitize.RUNTIME, "address", "libgcc_s.so.1")
    run = sanitize.runpy.run_path
    monkeypatch.setattr(sanitize.runpy, "run_path", lambda path: run(path) | {"SANITIZE": {"address": ""}})
    assert [missed.split(":")[0] for missed in sanitize.blind("address", tmp_path)] == ["address", "undefined"]
