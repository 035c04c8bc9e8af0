"""The size of a step: accumulation for a global batch, the scan of the largest batches, restarts by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speech import train_arguments, write_corpus

import train
from jasper_fast.data.batches import BatchSampler
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.model import Jasper
from jasper_fast.training import scale
from jasper_fast.training.runs import RunError, StopRequest, read_log
from jasper_fast.training.split import Split

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return write_corpus(tmp_path)


def run(arguments: list[str], monkeypatch) -> None:
    stop = StopRequest()
    try:
        train.main(train.arguments(arguments), stop)
    finally:
        stop.restore()


@pytest.mark.parametrize(
    ("wanted", "sizes", "world", "count", "said"),
    [
        (512, {"batch_size": 64}, 8, 1, "a step is 1 micro-batch of 64 utterances on each of 8 processes: 512"),
        (512, {"batch_size": 32}, 1, 16, "16 micro-batches of 32 utterances on each of 1 process: 512"),
        (500, {"batch_size": 64}, 4, 2, ": 512, 500 were asked for"),
        (64, {"max_seconds": 100.0}, 2, 3, "of 10 utterances on each of 2 processes: 60, 64 were asked for"),
    ],
)
def test_accumulation_for_a_global_batch(wanted: int, sizes: dict, world: int, count: int, said: str) -> None:
    sampler = BatchSampler([10.0] * 1000, world_size=world, **sizes)
    found, told = scale.accumulation_for(wanted, sampler, 1000)
    assert found == count and told.endswith(said)


def test_a_global_batch_below_a_micro_batch_is_an_error() -> None:
    with pytest.raises(RunError, match="lower --batch-size"):
        scale.accumulation_for(8, BatchSampler([1.0] * 100, 16), 100)


def test_the_global_batch_makes_the_steps_of_a_run(paths, tmp_path, monkeypatch) -> None:
    arguments = train_arguments(paths, tmp_path / "out", epochs=1, batch_size=2, global_batch=8, val_manifests=None)
    run(arguments, monkeypatch)
    records = [r for r in read_log(tmp_path / "out" / "log.jsonl") if r["kind"] == "train"]
    assert len(records) == 2, "16 utterances, 8 a step"
    assert all(r["waited_s"] > 0 for r in records)


def split_and_model(paths) -> tuple[Split, torch.nn.Module]:
    config = JasperConfig.from_yaml(paths["config"])
    split = Split.load("training", [str(paths["train"])], config, batch_size=8)
    return split, Jasper(config, backend="reference").train()


def test_the_scan_runs_the_largest_batches_and_changes_nothing(paths, monkeypatch) -> None:
    split, model = split_and_model(paths)
    seconds = split.dataset.durations(0)
    shapes = scale.largest_batches(split.sampler, seconds)
    assert max(s for _, s in shapes) == max(seconds) and all(n <= 8 for n, _ in shapes)
    before, seen = {k: v.clone() for k, v in model.state_dict().items()}, []
    model.register_forward_hook(lambda m, i, o: seen.append(tuple(i[0].shape[:1])))
    generator = torch.get_rng_state()
    said = scale.scan_memory(model, split.frontend.train(), shapes, torch.device("cpu"))
    assert "fits" in said and [n for (n,) in seen] == [n for n, _ in shapes]
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("most", "said"), [(3, "2 do: give --batch-size 2 or --batch-seconds 2"), (0, "not even one")])
def test_what_does_not_fit_is_told_with_advice(paths, most: int, said: str) -> None:
    split, model = split_and_model(paths)

    def small(module, inputs, output) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("of the test")

    model.register_forward_hook(small)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RunError, match=said):
        scale.scan_memory(model, split.frontend, [(8, 1.0)], torch.device("cpu"))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_restart_by_torchrun_resumes(paths, tmp_path, monkeypatch) -> None:
    arguments = train_arguments(paths, tmp_path / "out", steps=2, val_manifests=None, save_every=1)
    run(arguments, monkeypatch)
    with pytest.raises(RunError, match="add --resume"):
        run(arguments, monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(arguments, monkeypatch)


KILLED = """
import os, signal, sys, train
from jasper_fast.training.runs import StopRequest

def watch(state):
    if state.step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

train.main(train.arguments(sys.argv[1:]), StopRequest(), watch)
"""


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_losses_are_those_of_an_undisturbed_run(paths, tmp_path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    losses = {}
    for name, program in (("undisturbed", ROOT / "train.py"), ("killed", script)):
        arguments = train_arguments(paths, tmp_path / name, steps=6, save_every=2, batch_size=2, val_manifests=None)
        launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
        # Without the second, torchrun gives a restarted group the addresses of the one before (pytorch#135712).
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-m", "torch.distributed.run", *launch, str(program), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        records = [r for r in read_log(tmp_path / name / "log.jsonl") if r["kind"] == "train"]
        losses[name] = [(r["step"], r["loss"]) for r in records]
    assert losses["killed"] == losses["undisturbed"] and len(losses["killed"]) == 6
