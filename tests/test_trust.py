"""Verdicts: how they are kept, when a check is made, and what `backend="auto"` takes because of them."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from jasper_fast import backends, cli, selfcheck, trust
from jasper_fast.kernels import tables
from jasper_fast.trust import BAD, GOOD, UNCHECKED, Verdict

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
NORM = "bn_relu_dropout"
SHAPE = (256, 256, 11, 1, 1)


def verdict(op: str = "conv1d", status: str = GOOD, face: str = "triton", **more) -> Verdict:
    values = {"quick": False, "checked": 3, "failure": "" if status == GOOD else "dgrad (2, 64->48, 37) wrong: 7 %"}
    return Verdict(op, face, status, **(values | more), date="2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of this test's own, and choices that nothing else made."""
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    backends.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    backends.forget()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as dispatch can tell; gives the verdicts that a check there would find, and counts checks."""
    found: dict[str, Verdict] = {}
    checked: list[tuple] = []

    def check(device, op, face):
        checked.append((device, op, face))
        return found.get(op) or verdict(op, face=face, quick=True)

    monkeypatch.setattr(backends, "why_missing", lambda backend, device_type: None)
    monkeypatch.setattr(trust, "key", lambda device: {"device": "NVIDIA Imaginary 9000", "driver": "580"})
    monkeypatch.setattr(trust, "_check_now", check)
    monkeypatch.setattr(trust, "forget", trust._memory.clear)
    monkeypatch.setattr(tables, "_gpu_name", lambda index: "NVIDIA Imaginary 9000")
    monkeypatch.setattr(tables, "forget", tables._index.cache_clear)
    return type("Gpu", (), {"found": found, "checked": checked})


# ---- the cache ----


def test_the_folder_is_the_users_and_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("JASPER_FAST_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert trust.folder() == Path("/own")
    monkeypatch.delenv("JASPER_FAST_CACHE")
    assert trust.folder() == Path("/xdg/jasper_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust.folder() == tmp_path / ".cache" / "jasper_fast"


def test_verdicts_come_back_as_they_were_kept():
    made = [verdict(), verdict(NORM, BAD), verdict("conv1d.fused", quick=True)]
    trust.keep(CPU, made)
    trust.forget()
    assert list(trust.read(CPU).values()) == made
    assert [p.name for p in trust.path(CPU).parent.iterdir()] == [trust.path(CPU).name], "no half-written file is left"


@pytest.mark.parametrize("part", ["device", "driver", "torch", "triton", "interpreted", "jasper_fast", "sources"])
def test_another_machine_or_version_has_no_verdict(part, monkeypatch):
    trust.keep(CPU, [verdict()])
    key = trust.key(CPU)
    assert part in key
    monkeypatch.setattr(trust, "key", lambda device: key | {part: "another"})
    assert trust.read(CPU) == {}


def test_the_sources_are_those_of_kernels_and_tables(monkeypatch, tmp_path):
    before = trust.sources()
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    trust.sources.cache_clear()
    assert trust.sources() == before
    (tmp_path / "gpu.json").write_text("{}")
    trust.sources.cache_clear()
    assert trust.sources() != before


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\n", "580.65.06"),
        ("GCC version: 13\n", "unknown"),
    ],
)
def test_the_drivers_version_is_read_where_linux_tells_it(text, version, tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", "")
    (tmp_path / "version").write_text(text)
    assert trust.driver() == version


FAULTY = {
    "no JSON": "{",
    "no object": "[]",
    "an old schema": json.dumps({"schema": 0}),
    "another key": json.dumps({"schema": trust.SCHEMA, "key": {}, "verdicts": []}),
    "a status of its own": None,
    "a number for a text": None,
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_corrupt_file_is_said_and_checked_again(fault, capsys):
    trust.keep(CPU, [verdict()])
    data = json.loads(trust.path(CPU).read_text())
    if fault == "a status of its own":
        data["verdicts"][0]["status"] = "great"
    if fault == "a number for a text":
        data["verdicts"][0]["failure"] = 7
    trust.path(CPU).write_text(FAULTY[fault] or json.dumps(data))
    trust.forget()
    checks = []

    def check(device, op, face):
        checks.append(op)
        return verdict(op, face=face, quick=True, checked=9)

    assert trust.verdict("conv1d", "triton", CPU, check).checked == 9
    said = capsys.readouterr().err
    assert str(trust.path(CPU)) in said and "checking again" in said
    assert checks == ["conv1d"]
    trust.forget()
    assert trust.verdict("conv1d", "triton", CPU, check).checked == 9, "and the new one is kept"
    assert checks == ["conv1d"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_a_message(own_cache, capsys):
    own_cache.mkdir()
    own_cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    trust.keep(CPU, [verdict()])
    assert "set JASPER_FAST_CACHE" in capsys.readouterr().err


def test_a_cache_that_is_a_file_is_a_message_and_verdicts_hold_for_the_process(own_cache, capsys):
    own_cache.write_text("not a folder")
    assert trust.verdict("conv1d", "triton", CPU, lambda *_: verdict()).status == GOOD
    assert "set JASPER_FAST_CACHE" in capsys.readouterr().err
    assert trust.verdict("conv1d", "triton", CPU, lambda *_: pytest.fail("checked twice")).status == GOOD


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
    trust.keep(CPU, [before])
    trust.keep(CPU, [new])
    wanted = {"before": before, "new": new}[kept]
    assert trust.read(CPU)["conv1d", "triton"] == wanted
    assert trust.verdict("conv1d", "triton", CPU, lambda *_: pytest.fail("checked")) == wanted


def test_what_could_not_be_checked_is_for_this_process_only():
    none = verdict(status=UNCHECKED)
    assert trust.verdict("conv1d", "triton", CPU, lambda *_: none) == none
    assert trust.verdict("conv1d", "triton", CPU, lambda *_: pytest.fail("checked twice")) == none
    assert trust.read(CPU) == {}
    trust.forget()
    assert trust.verdict("conv1d", "triton", CPU, lambda *_: verdict()) == verdict()


WAITS = """
import sys, time, torch
from jasper_fast import trust
def check(device, op, face):
    print("checked", flush=True)
    time.sleep(1.0)
    return trust.Verdict(op, face, "good", True, 1)
trust.verdict("conv1d", "triton", torch.device("cpu"), check)
"""


def test_processes_that_start_together_check_once():
    start = [sys.executable, "-c", WAITS]
    many = [subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in many]
    assert [process.returncode for process in many] == [0, 0, 0]
    assert "".join(said).count("checked") == 1


# ---- dispatch ----


def test_a_kernel_is_checked_on_first_use_and_used_where_it_is_right(gpu):
    assert backends.resolve("auto", GPU, NORM) == "triton"
    assert gpu.checked == [(GPU, NORM, "triton")]
    backends.forget()
    assert backends.resolve("auto", GPU, NORM) == "triton"
    assert len(gpu.checked) == 1, "the verdict was kept"


@pytest.mark.parametrize(("status", "word"), [(BAD, "is WRONG on"), (UNCHECKED, "could not be checked on")])
def test_a_bad_verdict_gives_plain_pytorch_and_one_loud_line(gpu, status, word):
    gpu.found[NORM] = verdict(NORM, status)
    with pytest.warns(RuntimeWarning) as said:
        assert backends.resolve("auto", GPU, NORM) == "reference"
        assert backends.resolve("auto", GPU, NORM) == "reference"
        backends._resolve.cache_clear()
        assert backends.resolve("auto", GPU, NORM) == "reference"
    assert len(said) == 1
    text = str(said[0].message)
    assert f"{NORM} (triton) {word} NVIDIA Imaginary 9000" in text
    assert "dgrad (2, 64->48, 37) wrong: 7 %" in text and "jasper-fast selfcheck" in text


def test_verdicts_are_of_each_op(gpu):
    gpu.found["conv1d"] = verdict("conv1d", BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", GPU, NORM) == "triton"


def test_a_backend_asked_for_by_name_is_not_checked(gpu):
    gpu.found[NORM] = verdict(NORM, BAD)
    for name in ("triton", "cuda", "reference"):
        assert backends.resolve(name, GPU, NORM) == name
    assert backends.conv_face("triton", GPU, torch.bfloat16) == "triton"
    assert gpu.checked == []


def test_the_cpu_is_not_checked(gpu):
    assert backends.resolve("auto", CPU, NORM) == "cpu"
    assert backends.conv_face("auto", CPU, torch.float32, shape=SHAPE) == "cpu"
    assert gpu.checked == []


def put_table(monkeypatch, tmp_path, times: dict[str, tuple[float, float]]) -> None:
    """A table of the imaginary GPU: {op: (seconds of triton, seconds of aten)}."""
    tile = {"t": 64, "n": 64, "k": 32, "num_warps": 4, "num_stages": 3, "splits": 1}
    shape = dict(zip(("c_in", "c_out", "taps", "stride", "dilation"), SHAPE, strict=True))
    rows = []
    for op, (ours, library) in times.items():
        same = {"op": op, "dtype": "bfloat16", **shape, "rows_log2": 12}
        rows.append(tables.Row(**same, face="triton", algorithm="direct", tile=tile, time_s=ours))
        rows.append(tables.Row(**same, face="aten", algorithm="library", tile=None, time_s=library))
    header = dict.fromkeys(tables.HEADER, "x") | {"gpu": "NVIDIA Imaginary 9000", "capability": "sm_90"}
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    tables.write(tmp_path / f"{tables.slug(header['gpu'])}.json", header, rows)
    tables._index.cache_clear()


def test_convs_stay_with_the_library_without_a_table(gpu):
    calls = backends.conv_calls(dx=True, dw=True)
    assert backends.conv_face("auto", GPU, torch.bfloat16, calls=calls, shape=SHAPE, rows_log2=12) == "aten"
    assert backends.fused_face("auto", GPU, torch.bfloat16) == "aten"
    assert gpu.checked == [], "what is not used is not checked"


def test_convs_take_the_face_that_the_table_says(gpu, monkeypatch, tmp_path):
    put_table(monkeypatch, tmp_path, {"conv1d.forward": (1.0, 2.0), "conv1d.wgrad": (5.0, 1.0)})
    forward, both = backends.conv_calls(), backends.conv_calls(dw=True)
    ask = {"shape": SHAPE, "rows_log2": 12}
    assert backends.conv_face("auto", GPU, torch.bfloat16, calls=forward, **ask) == "triton"
    assert backends.conv_face("auto", GPU, torch.bfloat16, calls=forward, shape=SHAPE) == "triton", (
        "under torch.compile"
    )
    assert backends.conv_face("auto", GPU, torch.bfloat16, calls=both, **ask) == "aten"
    assert backends.conv_face("auto", GPU, torch.float16, calls=forward, **ask) == "aten", "not measured"
    assert backends.conv_face("auto", GPU, torch.float64, calls=forward, **ask) == "aten"
    assert backends.conv_face("auto", GPU, torch.bfloat16, calls=forward, strided_dx=True, **ask) == "aten"
    assert gpu.checked == [(GPU, "conv1d", "triton")]


def test_a_faster_face_that_is_wrong_is_not_taken(gpu, monkeypatch, tmp_path):
    put_table(monkeypatch, tmp_path, {"conv1d.forward": (1.0, 2.0), "conv1d.fused": (1.0, 2.0)})
    gpu.found["conv1d"] = verdict("conv1d", BAD)
    with pytest.warns(RuntimeWarning, match=r"conv1d \(triton\) is WRONG") as said:
        assert backends.conv_face("auto", GPU, torch.bfloat16, shape=SHAPE, rows_log2=12) == "aten"
        assert backends.conv_face("auto", GPU, torch.bfloat16, shape=SHAPE, rows_log2=13) == "aten"
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.fused_face("auto", GPU, torch.bfloat16) == "triton", "the verdict on inference is another"


def test_the_calls_of_a_conv_are_those_of_its_use():
    assert backends.conv_calls() == ("conv1d.forward",)
    assert backends.conv_calls(stats=True, dw=True) == ("conv1d.forward_stats", "conv1d.wgrad")
    assert backends.conv_calls(stats=True, dx=True, dw=True, norm=True) == (
        "conv1d.forward_stats", "conv1d.dgrad_bn", "conv1d.wgrad",
    )  # fmt: skip


def test_the_choice_is_a_constant_of_a_compiled_graph():
    def chosen(x, weight):
        c_out, c_in, taps = weight.shape
        calls = backends.conv_calls(dw=True)
        face = backends.conv_face("auto", x.device, x.dtype, calls=calls, shape=(c_in, c_out, taps, 1, 1))
        norm = backends.resolve("auto", x.device, NORM)
        return x * len(face) + len(norm)

    x, weight = torch.ones(2, 3, 4), torch.ones(5, 3, 1)
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tracing into the choice would warn, and on a GPU run into files and processes
        assert torch.equal(compiled(x, weight), chosen(x, weight))


def test_a_first_check_may_happen_while_a_graph_is_traced(gpu):
    """The check reads files and starts a process: tracing must not follow it."""

    def chosen(x):
        return x * len(backends.resolve("auto", torch.device("cuda", 0), NORM))

    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(torch.ones(2)), torch.full((2,), 6.0))
    assert gpu.checked == [(GPU, NORM, "triton")]


# ---- the real check, end to end ----


def test_first_use_runs_the_check_and_says_so_in_one_line(capfd):
    if backends.why_missing("cpu", "cpu"):
        pytest.skip("the native CPU library is not built")
    found = trust.verdict(NORM, "cpu", CPU)
    assert found == dataclasses.replace(found, status=GOOD, quick=True) and found.checked >= 5
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "first use of bn_relu_dropout (cpu)" in lines[0] and "good" in lines[0]
    trust._memory.clear()
    assert trust.verdict(NORM, "cpu", CPU) == found
    assert capfd.readouterr().err == ""


def test_a_check_that_cannot_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(selfcheck, "command", lambda: [sys.executable, "-c", "raise SystemExit('no device for you')"])
    found = selfcheck.quick_verdict(CPU, NORM, "cpu")
    assert found.status == UNCHECKED and "no device for you" in found.failure


def test_info_shows_the_verdicts(capsys):
    assert cli.main(["info"]) == 0
    assert "`jasper-fast selfcheck` runs it" in capsys.readouterr().out
    trust.keep(CPU, [verdict(NORM, face="cpu"), verdict("conv1d", BAD, face="cpu")])
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "self-check of bn_relu_dropout (cpu) on cpu: good, 3 checks passed" in said
    assert "self-check of conv1d (cpu) on cpu: bad, 3 checks passed: dgrad (2, 64->48, 37) wrong: 7 %" in said
    assert cli.main(["info", "--json"]) == 0
    assert [v["status"] for v in json.loads(capsys.readouterr().out)["verdicts"]] == [GOOD, BAD]
