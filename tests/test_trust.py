"""Verdicts: how they are kept, when a check is made, and what `backend="auto"` takes because of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast import ops
from jasper_fast.cli import command
from jasper_fast.dispatch import backends, choose, probe, verdicts
from jasper_fast.dispatch.verdict import BAD, GOOD, UNCHECKED, Verdict
from jasper_fast.kernels import native, tables
from jasper_fast.ops.bn_relu_dropout_op import norm_face as norm_face_of
from jasper_fast.selfcheck import checks

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
NORM = "bn_relu_dropout"
SHAPE = (256, 256, 11, 1, 1)
BF16, FP16, FP32 = "bfloat16", "float16", "float32"


def verdict(op: str = "conv1d", status: str = GOOD, face: str = "triton", **more) -> Verdict:
    values = {"quick": False, "checked": 3, "failure": "" if status == GOOD else "dgrad (2, 64->48, 37) wrong: 7 %"}
    values |= {"dtype": BF16, **more}
    return Verdict(op, face, status=status, **values, date="2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of this test's own, and choices that nothing else made."""
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    choose.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    choose.forget()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as dispatch can tell; gives the verdicts that a check there would find, by op, by op and face, or by
    op, face and dtype, and counts checks."""
    found: dict[str | tuple[str, ...], Verdict] = {}
    checked: list[tuple] = []

    def check(device, op, face, dtype):
        checked.append((device, op, face, dtype))
        known = found.get((op, face, dtype)) or found.get((op, face)) or found.get(op) or verdict(op, quick=True)
        return dataclasses.replace(known, face=face, dtype=dtype)

    monkeypatch.setattr(backends, "why_missing", lambda backend, device_type: None)
    monkeypatch.setattr(verdicts, "key", lambda device: {"device": "NVIDIA Imaginary 9000", "driver": "580"})
    monkeypatch.setattr(verdicts, "_check_now", check)
    monkeypatch.setattr(verdicts, "forget", verdicts._memory.clear)
    monkeypatch.setattr(tables, "_gpu_name", lambda index: "NVIDIA Imaginary 9000")
    monkeypatch.setattr(tables, "forget", tables._index.cache_clear)
    return type("Gpu", (), {"found": found, "checked": checked})


# ---- the cache ----


def test_the_folder_is_the_users_and_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("JASPER_FAST_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert verdicts.folder() == Path("/own")
    monkeypatch.delenv("JASPER_FAST_CACHE")
    assert verdicts.folder() == Path("/xdg/jasper_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / ".cache" / "jasper_fast"


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


def test_the_sources_are_those_of_kernels_and_tables(monkeypatch, tmp_path):
    before = verdicts.sources()
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    verdicts.sources.cache_clear()
    assert verdicts.sources() == before
    (tmp_path / "gpu.json").write_text("{}")
    verdicts.sources.cache_clear()
    assert verdicts.sources() != before


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


FAULTY = {
    "no JSON": "{",
    "no object": "[]",
    "an old schema": json.dumps({"schema": 0}),
    "another key": json.dumps({"schema": verdicts.SCHEMA, "key": {}, "verdicts": []}),
    "a status of its own": None,
    "a number for a text": None,
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_corrupt_file_is_said_and_checked_again(fault, capsys):
    verdicts.keep(CPU, [verdict()])
    data = json.loads(verdicts.path(CPU).read_text())
    if fault == "a status of its own":
        data["verdicts"][0]["status"] = "great"
    if fault == "a number for a text":
        data["verdicts"][0]["failure"] = 7
    verdicts.path(CPU).write_text(FAULTY[fault] or json.dumps(data))
    verdicts.forget()
    checks = []

    def check(device, op, face, dtype):
        checks.append(op)
        return verdict(op, face=face, quick=True, checked=9)

    assert verdicts.verdict("conv1d", "triton", CPU, BF16, check).checked == 9
    said = capsys.readouterr().err
    assert str(verdicts.path(CPU)) in said and "checking again" in said
    assert checks == ["conv1d"]
    verdicts.forget()
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, check).checked == 9, "and the new one is kept"
    assert checks == ["conv1d"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_a_message(own_cache, capsys):
    own_cache.mkdir()
    own_cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    verdicts.keep(CPU, [verdict()])
    assert "set JASPER_FAST_CACHE" in capsys.readouterr().err


def test_a_cache_that_is_a_file_is_a_message_and_verdicts_hold_for_the_process(own_cache, capsys):
    own_cache.write_text("not a folder")
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, lambda *_: verdict()).status == GOOD
    assert "set JASPER_FAST_CACHE" in capsys.readouterr().err
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, lambda *_: pytest.fail("checked twice")).status == GOOD


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
    wanted = {"before": before, "new": new}[kept]
    assert verdicts.read(CPU)["conv1d", "triton", BF16] == wanted
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, lambda *_: pytest.fail("checked")) == wanted


def test_what_could_not_be_checked_is_for_this_process_only():
    none = verdict(status=UNCHECKED)
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, lambda *_: none) == none
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, lambda *_: pytest.fail("checked twice")) == none
    assert verdicts.read(CPU) == {}
    verdicts.forget()
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, lambda *_: verdict()) == verdict()


def test_a_verdict_is_of_one_dtype(capsys):
    verdicts.keep(CPU, [verdict(), verdict(status=BAD, dtype=FP16)])
    verdicts.forget()
    fresh = verdict(dtype=FP32, quick=True)
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, lambda *_: pytest.fail("checked")).status == GOOD
    assert verdicts.verdict("conv1d", "triton", CPU, FP16, lambda *_: pytest.fail("checked")).status == BAD
    assert verdicts.verdict("conv1d", "triton", CPU, FP32, lambda *asked: fresh if asked[3] == FP32 else None) == fresh
    assert {name: v.status for name, v in verdicts.read(CPU).items()} == {
        ("conv1d", "triton", BF16): GOOD, ("conv1d", "triton", FP16): BAD, ("conv1d", "triton", FP32): GOOD,
    }  # fmt: skip


def test_what_an_older_version_kept_is_no_verdict(capsys):
    """Before verdicts were of a dtype, one in bf16 spoke for all."""
    old = {k: v for k, v in dataclasses.asdict(verdict()).items() if k != "dtype"}
    data = {"schema": 1, "key": verdicts.key(CPU), "verdicts": [old]}
    verdicts.path(CPU).parent.mkdir(parents=True)
    verdicts.path(CPU).write_text(json.dumps(data))
    assert verdicts.read(CPU) == {}
    assert verdicts.verdict("conv1d", "triton", CPU, BF16, lambda *_: verdict(quick=True)).quick


def test_the_checks_and_the_panes_are_among_the_sources(monkeypatch):
    read, seen = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append(path) or read(path))
    verdicts.sources.cache_clear()
    verdicts.sources()
    wanted = "jasper_fast/selfcheck/cases.py", "jasper_fast/ops/panes_op.py", "kernels/panes/gram.py"
    assert {ROOT / path for path in wanted} <= set(seen)


WAITS = """
import sys, time, torch
from jasper_fast.dispatch import verdicts
from jasper_fast.dispatch.verdict import Verdict
def check(device, op, face, dtype):
    print("checked", flush=True)
    time.sleep(1.0)
    return Verdict(op, face, dtype, "good", True, 1)
verdicts.verdict("conv1d", "triton", torch.device("cpu"), "bfloat16", check)
"""


def test_processes_that_start_together_check_once():
    start = [sys.executable, "-c", WAITS]
    many = [subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in many]
    assert [process.returncode for process in many] == [0, 0, 0]
    assert "".join(said).count("checked") == 1


# ---- dispatch ----


def test_a_kernel_is_checked_on_first_use_and_used_where_it_is_right(gpu):
    assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "triton"
    assert gpu.checked == [(GPU, NORM, "triton", BF16)]
    choose.forget()
    assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "triton"
    assert len(gpu.checked) == 1, "the verdict was kept"


@pytest.mark.parametrize(("status", "word"), [(BAD, "is WRONG on"), (UNCHECKED, "could not be checked on")])
def test_a_bad_verdict_gives_plain_pytorch_and_one_loud_line(gpu, status, word):
    gpu.found[NORM] = verdict(NORM, status)
    with pytest.warns(RuntimeWarning) as said:
        assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "reference"
        assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "reference"
        choose._resolve.cache_clear()
        assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "reference"
    assert len(said) == 1
    text = str(said[0].message)
    assert f"{NORM} (triton, bfloat16) {word} NVIDIA Imaginary 9000" in text
    assert "dgrad (2, 64->48, 37) wrong: 7 %" in text and "jasper-fast selfcheck" in text


def test_what_is_used_in_a_dtype_was_checked_in_it(gpu, monkeypatch, tmp_path):
    put_table(monkeypatch, tmp_path, {"conv1d.forward": (1.0, 2.0), "conv1d.fused": (1.0, 2.0)}, (BF16, FP16, FP32))
    ask = {"shape": SHAPE, "rows_log2": 12}
    for op in (NORM, "conv1d", "conv1d.fused"):
        gpu.found[op, "triton", FP16] = verdict(op, BAD)
    for dtype in (torch.bfloat16, torch.float32):
        assert choose.norm_face("auto", GPU, dtype, 256, 12) == "triton"
        assert choose.conv_face("auto", GPU, dtype, **ask) == choose.fused_face("auto", GPU, dtype) == "triton"
    assert {(op, dtype) for _, op, _, dtype in gpu.checked} == {
        (op, dtype) for op in (NORM, "conv1d", "conv1d.fused") for dtype in (BF16, FP32)
    }
    with pytest.warns(RuntimeWarning) as said:
        assert choose.norm_face("auto", GPU, torch.float16, 256, 12) == "reference"
        assert choose.conv_face("auto", GPU, torch.float16, **ask) == "aten"
        assert choose.fused_face("auto", GPU, torch.float16) == "aten"
    assert len(said) == 3 and all("(triton, float16) is WRONG" in str(w.message) for w in said)


def test_who_names_no_dtype_asks_for_all(gpu):
    gpu.found[NORM, "triton", BF16] = verdict(NORM, BAD)
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        assert choose.resolve("auto", GPU, NORM) == "reference"
    assert {dtype for *_, dtype in gpu.checked} == {BF16, FP16, FP32}


def test_the_check_of_first_use_is_of_the_dtype_in_use(monkeypatch):
    asked = {}
    monkeypatch.setattr(probe, "supervise", lambda device, **which: asked.update(which) or [])
    found = probe.quick_verdict(GPU, "conv1d", "triton", FP16)
    assert asked == {"quick": True, "ops": ("conv1d",), "faces": ("triton",), "dtypes": (FP16,)}
    assert (found.dtype, found.status) == (FP16, UNCHECKED)


def test_the_warning_says_what_follows(gpu, norm_table, monkeypatch, tmp_path):
    gpu.found.update({op: verdict(op, BAD) for op in (NORM, "conv1d", "conv1d.fused", "panes")})
    with pytest.warns(RuntimeWarning) as said:
        assert norm_face(256) == "reference"
        put_table(monkeypatch, tmp_path, {"conv1d.forward": (1.0, 2.0), "conv1d.fused": (1.0, 2.0)})
        assert choose.conv_face("auto", GPU, torch.bfloat16, shape=SHAPE, rows_log2=12) == "aten"
        assert choose.fused_face("auto", GPU, torch.bfloat16) == "aten"
        assert choose.pane_form("auto", GPU, torch.bfloat16) == "plain"
    told = [str(warning.message) for warning in said]
    for line, what in zip(told, ("goes on to its Triton kernel", "takes plain PyTorch for it instead",
                                 "takes PyTorch's own conv", "takes PyTorch's own conv",
                                 "panes='auto' takes the plain form"), strict=True):  # fmt: skip
        assert what in line


def test_verdicts_are_of_each_op(gpu):
    gpu.found["conv1d"] = verdict("conv1d", BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "triton"


def test_a_backend_asked_for_by_name_is_not_checked(gpu):
    gpu.found[NORM] = verdict(NORM, BAD)
    for name in ("triton", "cuda", "reference"):
        assert choose.resolve(name, GPU, NORM) == name
    assert choose.conv_face("triton", GPU, torch.bfloat16) == "triton"
    assert gpu.checked == []


def test_the_cpu_is_not_checked(gpu):
    assert choose.resolve("auto", CPU, NORM) == "cpu"
    assert choose.conv_face("auto", CPU, torch.float32, shape=SHAPE) == "cpu"
    assert gpu.checked == []


def put_table(monkeypatch, tmp_path, times: dict[str, tuple[float, float]], dtypes: tuple[str, ...] = (BF16,)) -> None:
    """A table of the imaginary GPU: {op: (seconds of triton, seconds of aten)}."""
    tile = {"t": 64, "n": 64, "k": 32, "num_warps": 4, "num_stages": 3, "splits": 1}
    shape = dict(zip(("c_in", "c_out", "taps", "stride", "dilation"), SHAPE, strict=True))
    rows = []
    for (op, (ours, library)), dtype in itertools.product(times.items(), dtypes):
        same = {"op": op, "dtype": dtype, **shape, "rows_log2": 12}
        rows.append(tables.Row(**same, face="triton", algorithm="direct", tile=tile, time_s=ours))
        rows.append(tables.Row(**same, face="aten", algorithm="library", tile=None, time_s=library))
    write_table(monkeypatch, tmp_path, rows)


def write_table(monkeypatch, tmp_path, rows: list[tables.Row]) -> None:
    header = dict.fromkeys(tables.HEADER, "x") | {"gpu": "NVIDIA Imaginary 9000", "capability": "sm_90"}
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    tables.write(tmp_path / f"{tables.slug(header['gpu'])}.json", header, rows)
    tables._index.cache_clear()


def test_convs_stay_with_the_library_without_a_table(gpu):
    calls = choose.conv_calls(dx=True, dw=True)
    assert choose.conv_face("auto", GPU, torch.bfloat16, calls=calls, shape=SHAPE, rows_log2=12) == "aten"
    assert choose.fused_face("auto", GPU, torch.bfloat16) == "aten"
    assert gpu.checked == [], "what is not used is not checked"


def test_convs_take_the_face_that_the_table_says(gpu, monkeypatch, tmp_path):
    put_table(monkeypatch, tmp_path, {"conv1d.forward": (1.0, 2.0), "conv1d.wgrad": (5.0, 1.0)})
    forward, both = choose.conv_calls(), choose.conv_calls(dw=True)
    ask = {"shape": SHAPE, "rows_log2": 12}
    assert choose.conv_face("auto", GPU, torch.bfloat16, calls=forward, **ask) == "triton"
    assert choose.conv_face("auto", GPU, torch.bfloat16, calls=forward, shape=SHAPE) == "triton", "under torch.compile"
    assert choose.conv_face("auto", GPU, torch.bfloat16, calls=both, **ask) == "aten"
    assert choose.conv_face("auto", GPU, torch.float16, calls=forward, **ask) == "aten", "not measured"
    assert choose.conv_face("auto", GPU, torch.float64, calls=forward, **ask) == "aten"
    assert choose.conv_face("auto", GPU, torch.bfloat16, calls=forward, strided_dx=True, **ask) == "aten"
    assert gpu.checked == [(GPU, "conv1d", "triton", BF16)]


def test_a_faster_face_that_is_wrong_is_not_taken(gpu, monkeypatch, tmp_path):
    put_table(monkeypatch, tmp_path, {"conv1d.forward": (1.0, 2.0), "conv1d.fused": (1.0, 2.0)})
    gpu.found["conv1d"] = verdict("conv1d", BAD)
    with pytest.warns(RuntimeWarning, match=r"conv1d \(triton, bfloat16\) is WRONG") as said:
        assert choose.conv_face("auto", GPU, torch.bfloat16, shape=SHAPE, rows_log2=12) == "aten"
        assert choose.conv_face("auto", GPU, torch.bfloat16, shape=SHAPE, rows_log2=13) == "aten"
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.fused_face("auto", GPU, torch.bfloat16) == "triton", "the verdict on inference is another"


# {(channels, rows_log2): {face: (seconds of forward, of backward)}}
NORMS = {
    (256, 12): {"triton": (1.0, 1.0), "cuda": (1.5, 0.2), "reference": (9.0, 9.0)},
    (256, 15): {"triton": (8.0, 8.0), "cuda": (9.0, 9.0), "reference": (90.0, 90.0)},
    (384, 12): {"triton": (3.0, 3.0), "cuda": (2.0, 2.0), "reference": (1.0, 1.0)},
    (768, 12): {"triton": (1.0, 1.0), "cuda": (0.5, 2.0), "reference": (9.0, 9.0)},
}


@pytest.fixture
def norm_table(monkeypatch, tmp_path):
    rows = []
    for (channels, rows_log2), of_faces in NORMS.items():
        same = {"dtype": "bfloat16", **tables.shape_of_norm(channels), "rows_log2": rows_log2, "tile": None}
        for face, times in of_faces.items():
            same |= {"face": face, "algorithm": "library" if face == "reference" else "direct"}
            rows += [tables.Row(op=op, time_s=spent, **same) for op, spent in zip(tables.NORM_OPS, times, strict=True)]
    for face, spent in (("triton", 2.0), ("cuda", 1.0)):  # forward alone says nothing of both
        same = {"dtype": "bfloat16", **tables.shape_of_norm(640), "rows_log2": 12, "tile": None, "time_s": spent}
        rows.append(tables.Row(op=tables.NORM_OPS[0], face=face, algorithm="direct", **same))
    write_table(monkeypatch, tmp_path, rows)


def norm_face(channels: int, rows_log2: int | None = 12, dtype=torch.bfloat16, backend: str = "auto") -> str:
    return choose.norm_face(backend, GPU, dtype, channels, rows_log2)


def test_norms_run_in_triton_without_a_table(gpu):
    assert norm_face(256) == norm_face(768, None) == "triton"
    assert gpu.checked == [(GPU, NORM, "triton", BF16)]


def test_norms_take_the_face_that_the_table_says_is_faster_both_ways(gpu, norm_table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm_face(256) == "cuda", "1.5 + 0.2 < 1 + 1"
        assert gpu.checked == [(GPU, NORM, "cuda", BF16)], "one face, one verdict"
        assert norm_face(768) == "triton", "0.5 + 2 > 1 + 1"
        assert norm_face(384) == "reference"
        assert norm_face(256, 15) == norm_face(256, 16) == norm_face(256, None) == "triton", "the most measured"
        assert norm_face(256, 11) == "cuda", "the nearest measured"
        assert norm_face(640) == "triton", "backward was not measured"
        assert norm_face(512) == "triton"
        assert gpu.checked == [(GPU, NORM, "cuda", BF16), (GPU, NORM, "triton", BF16)]
        assert norm_face(256, dtype=torch.float16) == "triton", "not measured"
        assert norm_face(256, dtype=torch.float64) == "reference", "no kernel takes it"
    assert gpu.checked[2:] == [(GPU, NORM, "triton", FP16)]


def test_norms_asked_for_by_name_and_on_the_cpu_are_not_looked_up(gpu, norm_table, monkeypatch):
    monkeypatch.setattr(tables, "fastest", lambda *_, **__: pytest.fail("looked up"))
    for name in ("triton", "cuda", "reference"):
        assert norm_face(256, backend=name) == norm_face(768, backend=name) == name
    assert choose.norm_face("auto", CPU, torch.float32, 256, 12) == "cpu"
    assert gpu.checked == []


def test_norms_are_looked_up_once(gpu, norm_table, monkeypatch):
    assert norm_face(256) == "cuda"
    monkeypatch.setattr(tables, "fastest", lambda *_, **__: pytest.fail("looked up again"))
    assert norm_face(256) == "cuda"
    choose.forget()
    with pytest.raises(pytest.fail.Exception):
        norm_face(256)


def test_a_norm_that_is_wrong_in_cuda_runs_in_triton(gpu, norm_table):
    gpu.found[NORM, "cuda"] = verdict(NORM, BAD, face="cuda")
    with pytest.warns(RuntimeWarning) as said:
        assert norm_face(256) == norm_face(256, 11) == "triton"
    assert len(said) == 1 and "bn_relu_dropout (cuda, bfloat16) is WRONG" in str(said[0].message)
    assert gpu.checked == [(GPU, NORM, "cuda", BF16), (GPU, NORM, "triton", BF16)]


def test_a_norm_that_is_wrong_in_triton_runs_in_cuda_where_that_is_faster(gpu, norm_table):
    gpu.found[NORM, "triton"] = verdict(NORM, BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm_face(256) == "cuda"
    with pytest.warns(RuntimeWarning, match=r"bn_relu_dropout \(triton, bfloat16\) is WRONG"):
        assert norm_face(768) == "reference"


def test_a_norm_that_is_wrong_on_both_faces_is_plain_pytorch(gpu, norm_table):
    gpu.found[NORM] = verdict(NORM, BAD)
    with pytest.warns(RuntimeWarning) as said:
        assert norm_face(256) == "reference"
    assert len(said) == 2


def test_a_machine_without_the_cuda_library_runs_norms_in_triton(gpu, norm_table, monkeypatch):
    monkeypatch.setattr(backends, "why_missing", lambda backend, _: "not built" if backend == "cuda" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm_face(256) == "triton"
    assert gpu.checked == [(GPU, NORM, "triton", BF16)]


# ---- GPUs too old for Triton ----


@pytest.fixture
def turing(gpu, monkeypatch):
    """An sm_75 with the CUDA library."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(backends, "why_missing", WHY_MISSING)
    monkeypatch.setattr(native, "cuda_available", lambda: True)
    return gpu


WHY_MISSING = backends.why_missing


def test_a_gpu_before_ampere_takes_the_cuda_face_and_the_librarys_convs(turing, monkeypatch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norm_face(256, dtype=torch.float16) == norm_face(768, None, torch.float16) == "cuda"
        assert choose.resolve("auto", GPU, NORM, torch.float16) == choose.resolve("auto", GPU) == "cuda"
        put_table(monkeypatch, tmp_path, {"conv1d.forward": (1.0, 2.0), "conv1d.fused": (1.0, 2.0)}, (FP16,))
        assert choose.conv_face("auto", GPU, torch.float16, shape=SHAPE, rows_log2=12) == "aten"
        assert choose.fused_face("auto", GPU, torch.float16) == "aten"
    assert turing.checked == [(GPU, NORM, "cuda", FP16)]


def test_a_cuda_face_that_is_wrong_before_ampere_gives_plain_pytorch(turing):
    turing.found[NORM] = verdict(NORM, BAD)
    with pytest.warns(RuntimeWarning, match=r"\(cuda, float16\) is WRONG.*takes plain PyTorch for it instead") as said:
        assert norm_face(256, dtype=torch.float16) == "reference"
    assert len(said) == 1


def test_without_the_cuda_library_before_ampere_both_reasons_are_told(turing, monkeypatch):
    monkeypatch.setattr(native, "cuda_available", lambda: False)
    monkeypatch.setattr(native, "explain", lambda: {"cuda": "backend 'cuda': not built"})  # this machine may have it
    with pytest.warns(RuntimeWarning, match="this GPU has 7.5.*backend 'cuda'"):
        assert norm_face(256, dtype=torch.float16) == "reference"


def test_triton_asked_for_by_name_before_ampere_is_an_error_that_says_why(turing):
    for ask in (lambda: choose.resolve("triton", GPU), lambda: norm_face(256, backend="triton"),
                lambda: choose.conv_face("triton", GPU, torch.float16)):  # fmt: skip
        with pytest.raises(backends.BackendMissing, match=r"backend 'triton': .*8\.0 and later, this GPU has 7\.5"):
            ask()
    assert not backends.is_available("triton", GPU)
    assert choose.resolve("cuda", GPU) == "cuda"


def test_ampere_is_young_enough(turing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose.resolve("triton", GPU) == choose.resolve("auto", GPU, NORM, torch.bfloat16) == "triton"


@pytest.mark.parametrize(("capability", "faces"), [((7, 5), {"cuda", "aten"}), ((8, 6), {"triton", "cuda", "aten"})])
def test_the_plan_has_the_faces_that_the_gpus_age_allows(turing, monkeypatch, tmp_path, capability, faces):
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Imaginary 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    plan = checks.plan(GPU)
    assert {check.face for check in plan} == faces
    assert {check.dtype for check in plan} == {FP16, FP32} | ({BF16} if capability >= (8, 0) else set())


# ---- panes ----


def test_panes_take_the_gram_form_on_a_gpu_where_it_is_right(gpu):
    gpu.found["panes", "aten", FP16] = verdict("panes", BAD)
    assert choose.pane_form("auto", GPU, torch.bfloat16) == "gram"
    with pytest.warns(RuntimeWarning, match=r"panes \(aten, float16\) is WRONG") as said:
        assert [choose.pane_form("auto", GPU, torch.float16) for _ in range(2)] == ["plain"] * 2
    assert len(said) == 1
    assert gpu.checked == [(GPU, "panes", "aten", BF16), (GPU, "panes", "aten", FP16)]
    assert choose.pane_form("auto", GPU, torch.float64) == "gram"
    assert choose.pane_form("triton", GPU, torch.float16) == "gram"
    assert choose.pane_form("auto", CPU, torch.float32) == "plain"
    assert len(gpu.checked) == 2, "no kernel of theirs, named, and a CPU"


@pytest.mark.parametrize(("form", "status", "wanted"), [
    ("auto", GOOD, True), ("auto", BAD, False), ("gram", BAD, True), ("plain", GOOD, False),
])  # fmt: skip
def test_a_block_takes_the_form_that_was_chosen(gpu, form, status, wanted):
    from jasper_fast.nn.block import JasperBlock
    from jasper_fast.nn.config import JasperConfig

    b = JasperConfig.from_yaml(ROOT / "configs" / "jasper10x5dr.yaml").encoder.blocks[1]
    block = JasperBlock(8, b, [8], pane_form=form)
    gpu.found["panes"] = verdict("panes", status)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert block._is_gram(torch.empty(2, 8, 5, device=GPU, dtype=torch.float16)) is wanted


class Faces(TorchDispatchMode):
    """Records which face of bn_relu_dropout the ops that are called name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        named = {a.name: v for a, v in zip(func._schema.arguments, args)}
        if func.namespace == "jasper_fast":
            self.seen.append((func._schema.name.split("::")[1], named.get("bn_face", named.get("face"))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("channels", "wanted"), [(256, "cuda"), (768, "triton")])
def test_the_ops_run_on_the_face_that_was_chosen(gpu, norm_table, channels, wanted):
    """On tensors of a GPU without content: statistics, the op itself, and the op with the next conv."""
    with FakeTensorMode(), Faces() as faces:
        y = torch.empty(4, 1000, channels, dtype=torch.bfloat16, device=GPU).transpose(1, 2)
        vectors = [torch.ones(channels, device=GPU) for _ in range(4)]
        assert ops.bn_relu_dropout(y, *vectors, p=0.2).shape == y.shape
        weight = torch.ones(96, channels, 3, device=GPU)
        assert ops.sub_block(y, *vectors, weight, padding=1, p=0.2).shape == (4, 96, 1000)
    stats = ("bn_stats", wanted)
    assert faces.seen == [stats, (NORM, wanted), stats, ("sub_block", wanted)]


def test_a_convs_statistics_come_from_the_face_of_the_norm_after_it(gpu, norm_table):
    """The verdict asked for is the norm's own; none is where Triton's conv gives them, or nobody wants them."""
    with FakeTensorMode(), Faces() as faces:
        x = torch.empty(4, 1000, 96, dtype=torch.bfloat16, device=GPU).transpose(1, 2)
        weight = torch.ones(256, 96, 3, device=GPU)
        ops.conv1d(x, weight, padding=1)
        ops.conv1d(x, weight, padding=1, backend="triton", stats=True)
        assert gpu.checked == []
        y, stats = ops.conv1d(x, weight, padding=1, stats=True)
        ops.bn_relu_dropout(y, *(torch.ones(256, device=GPU) for _ in range(4)), stats=stats)
    assert faces.seen[2:] == [("conv1d", "cuda"), (NORM, "cuda")]
    assert gpu.checked == [(GPU, NORM, "cuda", BF16)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_face_of_a_norm_is_a_constant_of_a_compiled_graph(gpu, norm_table, dynamic):
    """Of one without sizes too: the channels become a constant, batch and frames do not."""
    counter = CompileCounter()

    def chosen(y):
        return y * 2, norm_face_of(y, "auto")

    compiled = torch.compile(chosen, backend=counter, fullgraph=True, dynamic=dynamic)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for channels, wanted in ((384, "reference"), (768, "triton")):
            for frames in (1000, 1300):
                y = torch.empty(4, frames, channels, dtype=torch.bfloat16, device=GPU).transpose(1, 2)
                assert compiled(y)[1] == wanted
    if dynamic:
        assert counter.frame_count == 2, "a graph for each width, not for each length"


def test_the_calls_of_a_conv_are_those_of_its_use():
    assert choose.conv_calls() == ("conv1d.forward",)
    assert choose.conv_calls(stats=True, dw=True) == ("conv1d.forward_stats", "conv1d.wgrad")
    assert choose.conv_calls(stats=True, dx=True, dw=True, norm=True) == (
        "conv1d.forward_stats", "conv1d.dgrad_bn", "conv1d.wgrad",
    )  # fmt: skip


def test_the_choice_is_a_constant_of_a_compiled_graph():
    def chosen(x, weight):
        c_out, c_in, taps = weight.shape
        calls = choose.conv_calls(dw=True)
        face = choose.conv_face("auto", x.device, x.dtype, calls=calls, shape=(c_in, c_out, taps, 1, 1))
        norm = choose.resolve("auto", x.device, NORM)
        return x * len(face) + len(norm)

    x, weight = torch.ones(2, 3, 4), torch.ones(5, 3, 1)
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tracing into the choice would warn, and on a GPU run into files and processes
        assert torch.equal(compiled(x, weight), chosen(x, weight))


def test_a_first_check_may_happen_while_a_graph_is_traced(gpu):
    """The check reads files and starts a process: tracing must not follow it."""

    def chosen(x):
        return x * len(choose.resolve("auto", torch.device("cuda", 0), NORM, torch.bfloat16))

    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(torch.ones(2)), torch.full((2,), 6.0))
    assert gpu.checked == [(GPU, NORM, "triton", BF16)]


@pytest.mark.parametrize("quick", [True, False])
def test_every_face_of_the_norms_that_can_be_chosen_has_its_checks(monkeypatch, tmp_path, quick):
    """A verdict on the CUDA face is one of its own kernels, in every function, as that on Triton's."""
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Imaginary 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "why_missing", lambda backend, kind: None)
    of = {}
    for face in ("triton", "cuda"):
        plan = checks.plan(GPU, quick=quick, ops=(NORM,), faces=(face,))
        assert {check.face for check in plan} == {face}
        of[face] = {check.id.replace(f"| {face} |", "|") for check in plan}
        assert {check.function for check in plan} == {"stats", "forward", "backward"}
    assert of["cuda"] == of["triton"]


# ---- the real check, end to end ----


def test_first_use_runs_the_check_and_says_so_in_one_line(capfd):
    if backends.why_missing("cpu", "cpu"):
        pytest.skip("the native CPU library is not built")
    found = verdicts.verdict(NORM, "cpu", CPU, FP32)
    assert found == dataclasses.replace(found, status=GOOD, quick=True) and found.checked >= 5
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "first use of bn_relu_dropout (cpu, float32)" in lines[0] and "good" in lines[0]
    verdicts._memory.clear()
    assert verdicts.verdict(NORM, "cpu", CPU, FP32) == found
    assert capfd.readouterr().err == ""


def test_a_check_that_cannot_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(probe, "command", lambda: [sys.executable, "-c", "raise SystemExit('no device for you')"])
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
