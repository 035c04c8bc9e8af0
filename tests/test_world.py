"""Training in several processes: a fault or signal in one process makes all of them skip the step or end."""

import inspect
import re
import sys
from unittest import mock

import corpora
import pytest
import torch
import torch.distributed as dist
import worlds
from speech import corpus_of_beeps, records, train_arguments  # noqa: F401

from jasper_fast import train
from jasper_fast.nn import checkpoint
from jasper_fast.training.runs import Ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo"),
]


def without(paths, which: str, gone, tmp_path) -> dict:
    """Returns `paths` with a copy of the manifest `which`, in which the lines with numbers in `gone` name missing
    files."""
    lines = corpora.read_lines(paths[which])
    for i, line in enumerate(lines):
        line["audio_filepath"] = f"gone{i}.wav" if i in gone else str(paths[which].parent / line["audio_filepath"])
    return paths | {which: corpora.write_lines(tmp_path / f"{which}_gone.jsonl", lines)}


@pytest.fixture
def ran(paths, tmp_path):
    """Returns a function that trains in `size` processes, see `worlds.world`. The run's folder is `name`."""

    def run(size, *prepare, corpus=paths, name="run", status=0, **options):
        return worlds.world(
            size,
            train_arguments(corpus, tmp_path / name, **options),
            tmp_path / f"world {name}",
            *prepare,
            status=status,
        )

    return run


def no_substitutes(train, rank: int) -> None:
    """Keeps the dataset from putting other utterances in the place of those that cannot be read."""
    from jasper_fast.data import dataset

    dataset._SUBSTITUTES = 0


def test_a_step_that_one_rank_cannot_read_is_skipped_by_all(ran, paths, tmp_path):
    flawed = without(paths, "train", {3}, tmp_path)
    members = ran(2, no_substitutes, corpus=flawed, batch_size=1, epochs=1, val_manifests=None)
    said = members[0].said + members[1].said
    assert "step skipped: " in said and "gone3.wav" in said
    assert [len(m.steps) for m in members] == [7, 7]
    state = checkpoint.load(tmp_path / "run" / "step_00000008.pt")
    assert state["meter"]["unread"] == 1 and (state["epoch"], state["position"]) == (1, 0)
    assert "done: step 8" in members[0].said


def test_a_step_in_which_one_rank_has_a_nan_is_skipped_by_all(ran, tmp_path):
    members = ran(2, worlds.nan_in, "train7.wav", batch_size=2, epochs=2, val_manifests=None)
    said = members[0].said + members[1].said
    assert "Warning" not in said  # for instance a DeprecationWarning of PyTorch
    assert said.count("step skipped: ") == 2 and said.count("train7.wav: its features are not finite") == 2
    assert [len(m.steps) for m in members] == [8, 8] and "done: step 8" in members[0].said
    state = checkpoint.load(tmp_path / "run" / "step_00000008.pt")
    assert all(torch.isfinite(t).all() for t in state["state_dict"].values())
    assert state["meter"]["bad_losses"] + state["meter"]["overflows"] == 2


def test_a_run_that_can_read_nothing_ends_saved(ran, paths, tmp_path):
    flawed = without(paths, "train", range(16), tmp_path)
    for size in (1, 2):
        for member in ran(size, corpus=flawed, name=str(size), status=1, epochs=9, val_manifests=None, max_bad_steps=3):
            assert "error: 3 steps in a row were skipped" in member.said and "gone" in member.said
        assert checkpoint.load(tmp_path / str(size) / "step_00000003.pt")["step"] == 3


def test_without_a_readable_validation_file_all_ranks_end_saved(ran, paths, tmp_path):
    members = ran(2, corpus=without(paths, "val", range(4), tmp_path), epochs=2, status=1)
    assert all("error: the validation manifests have no usable utterance" in m.said for m in members)
    assert (tmp_path / "run" / "step_00000002.pt").exists()


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_is_heard_while_a_step_is_loaded(ran, tmp_path, size):
    """The signal comes while the second step loads the first of its four micro-batches. That step is not taken."""
    members = ran(
        size, worlds.signal_in, size - 1, "load", batch_size=1, epochs=9, grad_accumulation=4, val_manifests=None
    )
    assert [len(m.steps) for m in members] == [1] * size
    assert (tmp_path / "run" / "step_00000001.pt").exists()


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_is_heard_while_validating(ran, tmp_path, size):
    """A signal to one process ends the validation in all, and a resumed run repeats the validation."""
    how = {"batch_size": 1, "epochs": 9, "val_every": 3, "save_every": 100, "ema": 0.9}
    members = ran(size, worlds.signal_in, size - 1, "validate", **how)
    assert [len(m.steps) for m in members] == [3] * size
    assert "validation was interrupted by a signal" in members[0].said and "stopped by" in members[0].said
    assert not records(tmp_path / "run", "val_live", "val_ema")
    assert (tmp_path / "run" / "step_00000003.pt").exists() and not (tmp_path / "run" / "best.pt").exists()
    ran(size, **how, resume=True, steps=4)
    found = records(tmp_path / "run", "start", "val_live", "val_ema", "train")
    wanted = [("start", 3), ("val_live", 3), ("val_ema", 3), ("train", 4), ("val_live", 4), ("val_ema", 4)]
    assert [(r["kind"], r["step"]) for r in found][-6:] == wanted


@pytest.mark.parametrize("name", ["train_manifests", "val_manifests"])
def test_what_keeps_one_process_from_starting_ends_all(ran, name):
    members = ran(2, worlds.other_manifest, name, status=1)
    assert "error: another process failed: see its message" in members[0].said
    assert "gone.jsonl" in members[1].said and "Traceback" not in members[0].said + members[1].said


def other_clock(train, rank: int) -> None:
    """Sets the clock of rank 1 ahead of that of rank 0, and prints the learning rates."""
    train.TrainingState.minutes = property(lambda state: 0.2 + 0.3 * rank)
    told = lambda inner, run: print(f"rate {(lr := inner(run))}", file=sys.stderr) or lr  # noqa: E731
    worlds.wrap(train.Loop, "set_learning_rate", told)


def test_the_learning_rates_of_all_ranks_follow_the_same_clock(ran):
    how = {"lr_policy": "polynomial", "lr_by_clock": True, "max_minutes": 1, "warmup_steps": 0}
    rates = [re.findall(r"^rate (.*)", m.said, re.MULTILINE) for m in ran(2, other_clock, steps=4, lr=0.01, **how)]
    assert rates[0] == rates[1] and [float(r) for r in rates[0]] == pytest.approx([0.0025] * 3 + [0.000625])


def no_checkpoints(train, rank: int) -> None:
    """Hides the checkpoints from rank 1, as on a machine that does not share the folder."""
    if rank == 1:
        train.Folder.candidates = lambda folder: []


def test_processes_that_find_different_checkpoints_do_not_start(ran):
    ran(2, steps=1)
    for member in ran(2, no_checkpoints, steps=2, resume=True, status=1):
        assert "error: the processes found different checkpoints" in member.said


@pytest.mark.parametrize("name", ["broadcast_buffers", "forward_sync_buffers"])
def test_buffers_are_left_alone_by_either_name(name, monkeypatch):
    """DDP's broadcast of buffers is off, both by the option's old name and by its name in torch 2.13."""
    known = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)])
    parallel = mock.Mock(__signature__=known)
    monkeypatch.setattr(train, "DistributedDataParallel", parallel)
    core = torch.nn.Linear(1, 1)
    train.distributed(core, Ranks(0, 2, torch.device("cpu")))
    parallel.assert_called_once_with(core, device_ids=None, gradient_as_bucket_view=True, **{name: False})
