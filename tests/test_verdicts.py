"""Verdicts: how they are saved, when a check is made, and what the command line prints about them."""

import dataclasses
import errno
import fcntl
import json
import os
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, make_face, raising
from standins import BF16, CPU, FP16, FP32, GPU, NORM, forked, spied, verdict, verdicts_of_its_own  # noqa: F401

from jasper_fast.cli import command
from jasper_fast.dispatch import probe, verdicts
from jasper_fast.dispatch.verdict import BAD, GOOD, UNCHECKED
from jasper_fast.kernels import files, native


def of_conv(check=None, dtype: str = BF16):
    """Returns the verdict on the conv in Triton. If a check is needed, runs `check`; if that is None, fails the
    test."""
    return verdicts.verdict("conv1d", "triton", CPU, dtype, check or (lambda *_: pytest.fail("checked")))


# ---- the cache ----


def test_the_folder_is_the_users_and_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("JASPER_FAST_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert files.cache() == Path("/own")
    monkeypatch.delenv("JASPER_FAST_CACHE")
    assert files.cache() == Path("/xdg/jasper_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache() == tmp_path / ".cache" / "jasper_fast"


def test_threads_may_write_the_same_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: files.write(tmp_path / "file", str(number) * 100_000), [*range(10)] * 20))
    text = (tmp_path / "file").read_text()
    assert len(text) == 100_000 and len({*text}) == 1
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path, "x")
    assert os.listdir(tmp_path) == ["file"] and not [*tmp_path.parent.glob("*.part")]


def test_verdicts_come_back_as_they_were_kept():
    made = [verdict(), verdict(NORM, BAD), verdict("conv1d.fused", quick=True)]
    verdicts.keep(CPU, made)
    verdicts.forget()
    assert list(verdicts.read(CPU).values()) == made
    assert [p.name for p in verdicts.path(CPU).parent.iterdir()] == [verdicts.path(CPU).name], (
        "no half-written file is left"
    )


@pytest.mark.parametrize("part", ["device", "driver", "torch", "triton", "interpreted", "jasper_fast", "sources"])
def test_another_machine_or_version_has_no_verdict(part, monkeypatch):
    verdicts.keep(CPU, [verdict()])
    key = verdicts.key(CPU)
    assert part in key
    monkeypatch.setattr(verdicts, "key", lambda device: key | {part: "another"})
    assert verdicts.read(CPU) == {}


def test_a_table_that_is_installed_invalidates_no_verdict(monkeypatch, tmp_path):
    before = verdicts.sources()
    hashed_anew = verdicts.sources.__wrapped__
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    assert hashed_anew() == before
    (tmp_path / "gpu.json").write_text("{}")
    assert hashed_anew() == before
    monkeypatch.setattr(native, "_library_dir", lambda: tmp_path)
    (tmp_path / "kernels.so").write_text("other kernels")
    assert hashed_anew() != before


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\n", "580.65.06"),
        ("GCC version: 13\n", "unknown"),
    ],
)
def test_the_drivers_version_is_read_where_linux_tells_it(text, version, tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", "")
    (tmp_path / "version").write_text(text)
    assert verdicts.driver() == version


def altered(data: dict, **changes) -> dict:
    """Returns the content of a saved file, with `changes` in its verdict."""
    return data | {"verdicts": [data["verdicts"][0] | changes]}


def without_dtype(data: dict) -> dict:
    """Returns the content of a file saved before verdicts had a dtype."""
    return data | {"verdicts": [{k: v for k, v in of.items() if k != "dtype"} for of in data["verdicts"]]}


FAULTY = {
    "no JSON": lambda data: None,
    "no object": lambda data: [],
    "an old schema": lambda data: {"schema": 0},
    "an older version, without dtypes": lambda data: without_dtype(data) | {"schema": 1},
    "no dtype": without_dtype,
    "a dtype that is null": lambda data: altered(data, dtype=None),
    "another key": lambda data: data | {"key": {}},
    "an unknown status": lambda data: altered(data, status="great"),
    "a number for a text": lambda data: altered(data, failure=7),
}


@pytest.mark.parametrize("fault", FAULTY.values(), ids=FAULTY.keys())
def test_a_corrupt_file_is_said_and_checked_again(fault, capsys):
    verdicts.keep(CPU, [verdict()])
    spoilt = fault(json.loads(verdicts.path(CPU).read_text()))
    verdicts.path(CPU).write_text("{" if spoilt is None else json.dumps(spoilt))
    verdicts.forget()
    fresh = verdict(quick=True, checked=9)
    assert of_conv(lambda *_: fresh) == fresh
    said = capsys.readouterr().err
    assert str(verdicts.path(CPU)) in said and "checking again" in said
    verdicts.forget()
    assert of_conv() == fresh, "the new verdict was saved"


@pytest.mark.parametrize("spoil", [
    pytest.param(lambda cache: cache.mkdir(stat.S_IRUSR | stat.S_IXUSR), id="read-only",
                 marks=pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")),
    pytest.param(lambda cache: cache.write_text("not a folder"), id="a file"),
])  # fmt: skip
def test_a_cache_that_cannot_be_written_is_a_message_and_verdicts_hold_for_the_process(own_cache, capsys, spoil):
    spoil(own_cache)
    assert of_conv(lambda *_: verdict()).status == GOOD
    assert "set JASPER_FAST_CACHE" in capsys.readouterr().err
    assert of_conv().status == GOOD


@pytest.mark.parametrize(
    ("before", "new", "kept"),
    [
        (verdict(), verdict(quick=True), "before"),
        (verdict(), verdict(status=BAD, quick=True), "new"),
        (verdict(status=BAD), verdict(quick=True), "before"),
        (verdict(status=BAD), verdict(), "new"),
        (verdict(quick=True), verdict(), "new"),
    ],
)
def test_a_quick_check_that_finds_nothing_takes_nothing_back(before, new, kept):
    verdicts.keep(CPU, [before])
    verdicts.keep(CPU, [new])
    assert verdicts.read(CPU)["conv1d", "triton", BF16] == of_conv() == {"before": before, "new": new}[kept]


def test_what_could_not_be_checked_is_for_this_process_only():
    none = verdict(status=UNCHECKED)
    assert of_conv(lambda *_: none) == of_conv() == none
    assert verdicts.read(CPU) == {}
    verdicts.forget()
    assert of_conv(lambda *_: verdict()) == verdict()


def test_a_verdict_is_of_one_dtype():
    verdicts.keep(CPU, [verdict(), verdict(status=BAD, dtype=FP16)])
    verdicts.forget()
    assert (of_conv().status, of_conv(dtype=FP16).status) == (GOOD, BAD)
    of_conv(lambda device, op, face, dtype: verdict(dtype=dtype, quick=True), FP32)
    assert {name: v.status for name, v in verdicts.read(CPU).items()} == {
        ("conv1d", "triton", BF16): GOOD, ("conv1d", "triton", FP16): BAD, ("conv1d", "triton", FP32): GOOD,
    }  # fmt: skip


def test_the_checks_and_the_panes_are_among_the_sources(monkeypatch):
    seen = spied(monkeypatch, Path, "read_bytes", lambda path: path)
    verdicts.sources.__wrapped__()
    wanted = (
        "jasper_fast/selfcheck/cases.py", "jasper_fast/ops/panes_op.py", "kernels/panes/gram.py",
        "csrc/cuda/conv1d.cuh",  # NVRTC compiles it
    )  # fmt: skip
    assert {ROOT / path for path in wanted} <= set(seen)


def test_processes_that_start_together_check_once(tmp_path):
    def check(device, op, face, dtype):
        with (tmp_path / "checked").open("a") as file:
            file.write("once")
        time.sleep(0.5)
        return verdict(quick=True)

    assert forked(*[lambda: of_conv(check)] * 3) == [0] * 3
    assert (tmp_path / "checked").read_text() == "once" and of_conv() == verdict(quick=True)


def test_where_a_file_system_has_no_locks_nobody_waits(own_cache, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available")))
    monkeypatch.setattr(verdicts.time, "sleep", raising(AssertionError("this waits")))
    with verdicts.locked() as mine:
        assert mine


# ---- the check itself ----


def test_the_check_of_first_use_is_of_the_dtype_in_use(monkeypatch):
    asked = {}
    monkeypatch.setattr(probe, "supervise", lambda device, **which: asked.update(which) or [])
    found = probe.quick_verdict(GPU, "conv1d", "triton", FP16)
    assert asked == {"quick": True, "ops": ("conv1d",), "faces": ("triton",), "dtypes": (FP16,)}
    assert (found.dtype, found.status) == (FP16, UNCHECKED)


@pytest.mark.slow
def test_first_use_runs_the_check_and_says_so_in_one_line(capfd):
    make_face("cpu")
    found = verdicts.verdict(NORM, "cpu", CPU, FP32)
    assert found == dataclasses.replace(found, status=GOOD, quick=True) and found.checked >= 5
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "first use of bn_relu_dropout (cpu, float32)" in lines[0] and "good" in lines[0]
    verdicts._memory.clear()
    assert verdicts.verdict(NORM, "cpu", CPU, FP32) == found
    assert capfd.readouterr().err == ""


def test_a_check_that_cannot_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(probe, "COMMAND", [sys.executable, "-c", "raise SystemExit('no device for you')"])
    found = probe.quick_verdict(CPU, NORM, "cpu", FP32)
    assert found.status == UNCHECKED and "no device for you" in found.failure


def test_info_shows_the_verdicts(capsys):
    assert command.main(["info"]) == 0
    assert "`jasper-fast selfcheck` runs it" in capsys.readouterr().out
    verdicts.keep(CPU, [verdict(NORM, face="cpu"), verdict("conv1d", BAD, face="cpu")])
    assert command.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "self-check of bn_relu_dropout (cpu, bfloat16) on cpu: good, 3 checks passed" in said
    assert "self-check of conv1d (cpu, bfloat16) on cpu: bad, 3 checks passed: dgrad (2, 64->48, 37) wrong: 7 %" in said
    assert command.main(["info", "--json"]) == 0
    assert [v["status"] for v in json.loads(capsys.readouterr().out)["verdicts"]] == [GOOD, BAD]
