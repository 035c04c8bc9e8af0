"""Checkpoint files: atomic writes, which files are kept, and the errors for files that cannot be read."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jasper_fast.nn import checkpoint
from jasper_fast.nn.checkpoint import CheckpointError, load, save
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.formats import read_weights
from jasper_fast.nn.model import Jasper
from jasper_fast.training import randomness
from jasper_fast.training.runs import Folder

ROOT = Path(__file__).resolve().parents[1]
LABELS = list(" abcdefg")
BLOCKS = [
    {"filters": 8, "repeat": 1, "kernel_size": [5], "stride": [2], "residual": False},
    {"filters": 8, "repeat": 2, "kernel_size": [3], "residual": True, "residual_dense": True},
    {"filters": 8, "repeat": 2, "kernel_size": [3], "residual": True, "residual_dense": True},
    {"filters": 12, "repeat": 1, "kernel_size": [1], "residual": False},
]


def config(labels=LABELS):
    encoder = {"in_feats": 6, "blocks": BLOCKS}
    return JasperConfig.from_dict({"labels": labels, "jasper": {"encoder": encoder, "decoder": {"in_feats": 12}}})


def trained_model():
    """Returns a model in which every entry of the state dict differs from a fresh model's."""
    model = Jasper(config(), backend="reference")
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand_like(tensor) + 0.1 if tensor.is_floating_point() else torch.tensor(7))
    return model.eval()


def own_document(model, **more):
    """Returns the content of a checkpoint that this project writes for `model`. `more`: entries to add or replace."""
    return {
        "format": checkpoint.FORMAT, "config": model.config.to_dict(), "labels": LABELS,
        "state_dict": model.state_dict(),
    } | more  # fmt: skip


@torch.no_grad()
def outputs(model):
    return model(torch.linspace(-1, 1, 2 * 6 * 32).view(2, 6, 32), torch.tensor([32, 20]))[0]


def same(got: dict, want: dict) -> bool:
    """Returns whether two state dicts have the same names, dtypes, shapes and bits."""
    found, wanted = (
        {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for name, t in state.items()}
        for state in (got, want)
    )
    return found == wanted


class Bomb:
    """Makes the folder `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def run_state(step, **more):
    return {"format": checkpoint.FORMAT, "step": step, "state_dict": {"w": torch.full((3,), float(step))}} | more


# --- writing -----------------------------------------------------------------------------------------------------


def test_round_trip_leaves_nothing_beside(tmp_path):
    save(tmp_path / "new" / "a.pt", {"x": torch.arange(3), "step": 4, "name": "b"})
    state = load(tmp_path / "new" / "a.pt")
    assert torch.equal(state["x"], torch.arange(3)) and state["step"] == 4 and state["name"] == "b"
    assert os.listdir(tmp_path / "new") == ["a.pt"]


@pytest.mark.slow
def test_two_processes_that_write_one_file_do_not_mix(tmp_path):
    """The file is whole while the other process still writes."""
    code = """
import sys
from jasper_fast.nn.checkpoint import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"theirs")
    file.flush()
    print(flush=True)
    input()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.pt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        with checkpoint.replacing(tmp_path / "a.pt") as file:
            file.write(b"ours")
        assert (tmp_path / "a.pt").read_bytes() == b"ours"
        other.communicate(b"\n")
    assert other.returncode == 0 and (tmp_path / "a.pt").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The system's limit on file sizes makes the second write fail."""
    program = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from jasper_fast.nn.checkpoint import CheckpointError, save
path = {str(tmp_path / "a.pt")!r}
save(path, {{"x": torch.ones(10)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save(path, {{"x": torch.zeros(1_000_000)}})
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.search(r"cannot write .*a\.pt: .*too large.*untouched.*Free some space", done.stdout), done.stdout
    assert torch.equal(load(tmp_path / "a.pt")["x"], torch.ones(10))
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/a\.pt"):
        save(tmp_path / "file" / "a.pt", {})


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 10, 600, -1, None])
def test_a_file_cut_short_or_with_a_flipped_bit_is_named(tmp_path, keep):
    path = tmp_path / "a.pt"
    save(path, {"x": torch.randn(10_000)})
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= keep is None
    path.write_bytes(whole[:keep])
    said = r"a\.pt is damaged" if keep is None else r"a\.pt .*cut short.*earlier checkpoint"
    with pytest.raises(CheckpointError, match=said):
        load(path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.pt", lambda path: None, r"none\.pt: no such file"),
        ("text.pt", lambda path: path.write_text("hello"), r"text\.pt .*another\s+kind of file"),
        ("list.pt", lambda path: torch.save([1, 2], path), r"list\.pt holds a list"),
        ("nothing.pt", lambda path: torch.save({"epoch": 3}, path), "holds no model"),
    ],
)
def test_foreign_files_are_named(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / name)


def test_a_lack_of_memory_is_not_called_damage(tmp_path, monkeypatch):
    """If a lack of memory counted as damage, a resumed run would take an older checkpoint."""
    folder = Folder(tmp_path)
    folder.save(run_state(1))
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**50))
    with pytest.raises(MemoryError, match=r"step_00000001\.pt does not fit into memory"):
        folder.latest()


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"bomb\.pt holds Python objects \(.*mkdir\)"):
        load(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


# --- rotation ----------------------------------------------------------------------------------------------------


def test_the_last_few_the_best_and_the_milestones_are_kept(tmp_path):
    folder = Folder(tmp_path, keep=2)
    for step in range(1, 7):
        folder.save(run_state(step))
        if step == 3:
            folder.save(run_state(step, best_wer=0.5), "best")
            folder.save(run_state(step), "milestone_epoch_0002")
    assert sorted(os.listdir(tmp_path)) == [
        "best.pt", "milestone_epoch_0002.pt", "step_00000005.pt", "step_00000006.pt",
    ]  # fmt: skip
    assert load(tmp_path / "best.pt")["best_wer"] == 0.5
    assert folder.latest()[1]["step"] == 6


def test_a_later_checkpoint_that_cannot_be_read_displaces_no_other(tmp_path):
    (tmp_path / "step_00000009.pt").write_bytes(b"")
    (tmp_path / "step_00000001 (copy).pt").write_bytes(b"")
    folder = Folder(tmp_path, keep=1)
    for step in (7, 8):
        folder.save(run_state(step))
    assert [p.name for p in folder.steps()] == ["step_00000008.pt", "step_00000009.pt"]


def test_leftovers_that_another_rank_removes_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / ".step_00000001.pt.tmp"])
    Folder(tmp_path).clean()


def test_a_broken_newest_is_reported_and_the_one_before_taken(tmp_path):
    folder = Folder(tmp_path, keep=3)
    assert folder.latest() is None
    for step in (1, 2, 3):
        folder.save(run_state(step))
    newest = tmp_path / "step_00000003.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    torch.save({"state_dict": {}}, tmp_path / "step_00000004.pt")  # a checkpoint of another program
    (tmp_path / ".step_00000005.pt.tmp").write_bytes(b"half")
    reports = []
    path, state = folder.latest(reports.append)
    assert (path.name, state["step"]) == ("step_00000002.pt", 2)
    assert len(reports) == 2 and "step_00000004.pt" in reports[0] and "step_00000003.pt" in reports[1]
    folder.clean()
    assert not list(tmp_path.glob(".*"))
    for path in folder.steps():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 4 checkpoints"):
        folder.latest(reports.append)


def test_random_generators_continue(tmp_path):
    random.gauss(0, 1), np.random.randn()  # each of these draws two normal numbers and keeps one for later
    save(tmp_path / "rng.pt", randomness.rng_state())
    draw = lambda: (torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist())  # noqa: E731
    expected = draw()
    draw()
    randomness.set_rng_state(load(tmp_path / "rng.pt"))
    assert draw() == expected
