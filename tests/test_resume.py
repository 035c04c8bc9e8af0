"""A run that was killed or stopped continues with exactly the losses of an uninterrupted run. The tests use real
processes and signals."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import worlds
from speech import corpus_of_beeps, train_arguments  # noqa: F401

from jasper_fast.training import step
from jasper_fast.training.runs import read_log

SETTINGS = {"steps": 12, "grad_accumulation": 2, "save_every": 3, "val_every": 4, "ema": 0.9}  # 2 steps per epoch


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_the_group() -> None:
    """Sends SIGTERM to the process group, and so also to the loader's processes, as torchrun and SLURM do."""
    os.killpg(0, signal.SIGTERM)


# Each of these functions patches a process of train.py so that it is killed or stopped at a chosen point.


def in_a_step(train, rank: int, strike: Callable[[], None]) -> None:
    os.setsid()  # a process group of its own
    calls = itertools.count(1)

    def struck(ctc_loss, *args):
        if next(calls) == 10:  # the second of two micro-batches of step 5
            strike()
        return ctc_loss(*args)

    worlds.wrap(step, "ctc_loss", struck)


def in_a_write(train, rank: int) -> None:
    def half(save, state, file) -> None:
        save(state, file)
        if state["step"] == 6 and ".step_" in file.name:
            file.truncate(file.tell() // 2)
            kill()

    worlds.wrap(torch, "save", half)


def before_the_rename(train, rank: int) -> None:
    def struck(replace, source, target) -> None:
        if str(target).endswith("step_00000009.pt"):
            kill()
        replace(source, target)

    worlds.wrap(os, "replace", struck)


def finish(arguments: list[str], folder: Path, expected: int, *patch) -> str:
    """Runs train.py in a process of its own, and returns its standard error."""
    return worlds.world(1, arguments, folder / "said", *patch, status=expected)[0].said


def curves(folder: Path) -> list[dict]:
    """Returns the records of the log, except those of kind "start", without their times."""
    times = {"utterances_per_s", "waited_s", "minutes"}
    records = [r for r in read_log(folder / "log.jsonl") if r["kind"] != "start"]
    return [{k: v for k, v in r.items() if k not in times} for r in records]


@pytest.fixture(scope="module")
def untouched(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched")
    finish(train_arguments(paths, folder, **SETTINGS), folder, 0)
    result = curves(folder)
    assert [r["step"] for r in result if r["kind"] == "val_ema"] == [4, 8, 12]
    steps = {r["step"]: r["loss"] for r in result if r["kind"] == "train"}
    assert list(steps) == list(range(1, 13)) and len({*steps.values()}) == 12
    return result


@pytest.mark.slow
def test_three_kills_change_nothing(paths, untouched, tmp_path):
    """The run is killed in a step, while it writes a checkpoint, and before it renames one. No figure changes."""
    fresh = train_arguments(paths, tmp_path, **SETTINGS)
    again = [*fresh, "--resume"]
    finish(fresh, tmp_path, -signal.SIGKILL, in_a_step, kill)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000003.pt"]
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 4
    assert "step_00000003.pt: epoch 2, step 3" in finish(again, tmp_path, -signal.SIGKILL, in_a_write)
    assert [p.name.split(".", 2)[2] for p in tmp_path.glob(".*.tmp")] == ["step_00000006.pt.tmp"]
    assert "step_00000003.pt: epoch 2, step 3" in finish(again, tmp_path, -signal.SIGKILL, before_the_rename)
    assert [p.name.split(".", 2)[2] for p in tmp_path.glob(".*.tmp")] == ["step_00000009.pt.tmp"]
    (tmp_path / "step_00000007.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    errors = finish(again, tmp_path, 0)
    assert "step_00000007.pt is not a complete PyTorch checkpoint" in errors
    assert "step_00000006.pt: epoch 4, step 6" in errors
    assert not list(tmp_path.glob(".*.tmp"))
    assert curves(tmp_path) == untouched


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(paths, untouched, tmp_path):
    """Shows that the run is saved although the loader's processes get SIGTERM too."""
    arguments = train_arguments(paths, tmp_path, **SETTINGS, num_workers=2)
    assert "stopped by SIGTERM; go on with --resume" in finish(arguments, tmp_path, 0, in_a_step, stop_the_group)
    assert (tmp_path / "step_00000005.pt").exists()
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 5
    finish([*arguments, "--resume"], tmp_path, 0)
    assert curves(tmp_path) == untouched
