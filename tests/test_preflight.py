"""What `python -m bench gpu` does before it measures: it tells what is missing, runs tests, and tunes."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from bench_runs import CPU, CUDA, make_run
from standins import verdicts_of_its_own  # noqa: F401

from jasper_fast.bench.gpu import first, preflight
from jasper_fast.bench.harness import nvml
from jasper_fast.bench.harness.errors import OutOfTime
from jasper_fast.dispatch import tuned
from jasper_fast.kernels import native, tables


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends that the machine has everything. A test may change the fields of the returned object."""
    gib = 2**30
    has = SimpleNamespace(cc="/usr/bin/gcc", disk=50 * gib, free=70 * gib, clocks={"sm_mhz": 1980}, cuda="13.0")
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    for owner, name, stand_in in (
        (shutil, "which", lambda name: has.cc),
        (shutil, "disk_usage", lambda path: SimpleNamespace(free=has.disk)),
        (preflight.sysconfig, "get_path", lambda name: str(tmp_path)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "mem_get_info", lambda device: (has.free, 80 * gib)),
        (torch.version, "cuda", "13.0"),
        (nvml, "cuda_driver", lambda: has.cuda),
        (nvml, "read", lambda device: has.clocks),
        (native, "explain", lambda: {"cuda": None}),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    return has


WANTED = ["a C compiler", "Python's headers", *(f"disk for {what}" for what in ("kernels", "choices", "compilers")),
          "the driver", "free memory", "clocks", "the CUDA library"]  # fmt: skip


def test_a_machine_that_has_everything_misses_nothing(machine):
    found = list(preflight.findings(CUDA))
    assert [one.what for one in found] == WANTED and all(one.there for one in found)
    assert [one.what for one in preflight.findings(CPU)] == WANTED[:5]


@pytest.mark.parametrize(("what", "changes", "remedy"), [
    ("a C compiler", {"cc": None}, "install gcc"), ("Python's headers", {"headers": False}, "python3-dev"),
    ("disk for kernels", {"disk": 2**30}, "TRITON_CACHE_DIR"), ("the driver", {"cuda": "12.8"}, "update the NVIDIA"),
    ("free memory", {"free": 2**30}, "nvidia-smi"), ("clocks", {"clocks": {"held_by": ["software power cap"]}}, "cool"),
])  # fmt: skip
def test_what_is_missing_is_told_with_the_remedy(machine, tmp_path, capsys, what, changes, remedy):
    if "headers" in changes:
        (tmp_path / "Python.h").unlink()
    vars(machine).update(changes)
    run = make_run(tmp_path, device=CUDA)
    preflight.main(run)
    (line,) = [line for line in "".join(capsys.readouterr()).splitlines() if f"MISSING: {what}:" in line]
    assert remedy in line
    assert {one["what"]: one["there"] for one in run.results.data["preflight"]}[what] is False


def test_without_a_gpu_it_says_so(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [one.what for one in preflight.findings(CUDA) if not one.there] == ["a GPU"]


@pytest.mark.slow
def test_tests_that_fail_fail_their_part_and_name_themselves(run, tmp_path, monkeypatch):
    folder = tmp_path / "tests"
    folder.mkdir()
    monkeypatch.setattr(first.paths, "CHECKOUT", tmp_path)
    (folder / "test_a.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    with pytest.raises(first.TestsFailed, match=r"FAILED .*test_bad"):
        first.tests(run, files=("test_a.py",), chosen="")
    first.tests(run, files=("test_a.py",), chosen="good")
    assert run.results.data["tests"]["told"].startswith("1 passed")
    run.deadline = 0.0
    with pytest.raises(OutOfTime):
        first.tests(run, files=("test_a.py",), chosen="")


def test_a_machine_without_tests_goes_on(run, monkeypatch, capsys):
    monkeypatch.setattr(first.paths, "CHECKOUT", None)
    first.tests(run)
    assert "no tests here" in "".join(capsys.readouterr())


def test_tuning_is_a_part_that_can_be_cut_off(tmp_path, monkeypatch):
    run = make_run(tmp_path, deadline=0.0)
    asked = []

    def tune(device, cells, budget, keeps):
        asked.append((len(cells), budget, keeps))
        return tuned.Session(cells, {cells[0]: {"refused": {"a tile": "wrong: y"}}})

    monkeypatch.setattr(tuned, "tune", tune)
    with pytest.raises(OutOfTime):
        first.tune(run, tables.NORM_OPS)
    assert asked == [(2, first.LEAST, False)]
    saved = run.results.data["tuned"]
    assert (saved["cells"], saved["of"]) == (1, 2) and list(saved["refused"].values()) == [{"a tile": "wrong: y"}]
