"""A run that was killed or stopped continues with exactly the losses of an uninterrupted run. Uses real processes and
signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from speech import corpus_of_beeps, train_arguments  # noqa: F401

from jasper_fast.training.runs import read_log

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"steps": 12, "grad_accumulation": 2, "save_every": 3, "val_every": 4, "ema": 0.9}  # 2 steps an epoch

# Each patch makes a process of train.py kill itself, as SIGKILL does, at a chosen point.
IN_A_STEP = """
import jasper_fast.training.step as training
real, calls = training.ctc_loss, 0
def ctc_loss(*args):
    global calls
    calls += 1
    if calls == 12:  # four steps of two, a validation of two weights, and the second micro-batch of step 5
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
training.ctc_loss = ctc_loss
"""
IN_A_WRITE = """
import io, torch
real = torch.save
def save(state, file):
    if state["step"] != 6 or ".step_" not in file.name:
        return real(state, file)
    whole = io.BytesIO()
    real(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""
BEFORE_THE_RENAME = """
real = os.replace
def replace(source, target):
    if str(target).endswith("step_00000009.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
"""
WRAPPER = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
{patch}
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def start(arguments: list[str], patch: str = "") -> subprocess.Popen:
    program = WRAPPER.format(root=str(ROOT), patch=patch, script=str(ROOT / "train.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, expected: int) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == expected, errors
    return errors


def curves(folder: Path) -> dict[str, list]:
    """Returns all figures of the log by kind, without times."""
    kept = {}
    for r in read_log(folder / "log.jsonl"):
        if r["kind"] != "start":
            kept.setdefault(r["kind"], []).append(
                {k: v for k, v in r.items() if k not in ("utterances_per_s", "waited_s", "minutes")}
            )
    return kept


@pytest.fixture(scope="module")
def untouched(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched")
    finish(start(train_arguments(paths, folder, **SETTINGS)), 0)
    result = curves(folder)
    assert [r["step"] for r in result["train"]] == list(range(1, 13))
    assert [r["step"] for r in result["val_ema"]] == [4, 8, 12]
    assert len({r["loss"] for r in result["train"]}) == 12
    return result


@pytest.mark.slow
def test_three_kills_change_nothing(paths, untouched, tmp_path):
    """Shows that kills within a step, while writing a checkpoint and just before renaming it change no figure."""
    fresh = train_arguments(paths, tmp_path, **SETTINGS)
    again = [*fresh, "--resume"]
    finish(start(fresh, IN_A_STEP), -signal.SIGKILL)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000003.pt"]
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 4
    errors = finish(start(again, IN_A_WRITE), -signal.SIGKILL)
    assert "step_00000003.pt: epoch 2, step 3" in errors
    assert [p.name for p in tmp_path.glob(".step_*")] == [".step_00000006.pt.tmp"]
    errors = finish(start(again, BEFORE_THE_RENAME), -signal.SIGKILL)
    assert "step 3" in errors
    assert [p.name for p in tmp_path.glob(".step_*")] == [".step_00000009.pt.tmp"]
    (tmp_path / "step_00000007.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    errors = finish(start(again), 0)
    assert "step_00000007.pt is not a complete PyTorch checkpoint" in errors
    assert "step_00000006.pt: epoch 4, step 6" in errors
    assert not list(tmp_path.glob(".*.tmp"))
    assert curves(tmp_path) == untouched


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(paths, untouched, tmp_path):
    """Shows that SIGTERM to the whole process group, as torchrun and SLURM send it, saves the run, although the
    loader's processes get it too."""
    in_step_5 = IN_A_STEP.replace("os.kill(os.getpid(), signal.SIGKILL)", "os.killpg(0, signal.SIGTERM)")
    arguments = train_arguments(paths, tmp_path, **SETTINGS, num_workers=2)
    errors = finish(start(arguments, in_step_5), 0)
    assert "stopped by SIGTERM; go on with --resume" in errors
    assert (tmp_path / "step_00000005.pt").exists()
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 5
    finish(start([*arguments, "--resume"]), 0)
    assert curves(tmp_path) == untouched
