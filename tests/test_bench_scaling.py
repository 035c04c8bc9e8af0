"""`python -m bench train` with several processes."""

import argparse
import contextlib
import json
import os
import re
import runpy
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from bench_runs import LIMITS
from conftest import assert_raises, raising
from speech import CONFIG
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from jasper_fast.bench import cli
from jasper_fast.bench.cases import scaling as cases
from jasper_fast.bench.commands import scaling
from jasper_fast.bench.harness import cudnn_search, limits, result_file

N, T = 2, 64


class Deaf(torch.nn.parallel.DistributedDataParallel):
    """A DDP that ignores the gradients of the other processes."""

    def forward(self, *inputs):
        with self.no_sync():
            return super().forward(*inputs)


def one_of_two(rank: int, folder: str, port: int) -> None:
    """Runs in each of two processes. Sets the environment as torchrun does, writes what the check finds wrong, first
    with gradients that are not averaged and then with averaged ones, and runs the command."""
    torch.set_num_threads(1)
    places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in places.items()}
    limits.measure = lambda *_: dict(LIMITS)

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    at = cases.Setting(f"{folder}/tiny.yaml", N, T, torch.device("cpu"), torch.float32, "reference")
    wrong = []
    for ddp in (Deaf, torch.nn.parallel.DistributedDataParallel):
        cases.DistributedDataParallel = ddp
        wrong.append(cases.steps(cases.OURS, at, rank, dist.group.WORLD).wrong())
    dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(wrong))

    options = ["--model", f"{folder}/tiny.yaml:{N},{T}", "--seconds", "0.05", "--backend", "reference", "--out", folder]
    assert cli.main(["train", "--quick", *options]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_two_processes_measure_steps_and_their_communication(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (str(tmp_path), port), nprocs=2)
    for rank in (0, 1):
        wrong, right = json.loads((tmp_path / f"{rank}.json").read_text())
        assert right == "" and "from the mean of all processes" in wrong
    [path] = tmp_path.glob("train_*.json")
    found = result_file.read(path)
    assert found["finished"] and len(found["rows"]) == 4 and all(row["status"] == "ok" for row in found["rows"])
    rows = {(row["contender"], row["key"]["processes"]): row for row in found["rows"]}
    assert set(rows) == {(name, world) for name in (cases.OURS, cases.EAGER) for world in (1, 2)}
    for (name, world), row in rows.items():
        scaled = row["scaling"]
        assert row["ours"] == (name == cases.OURS) and scaled["processes"] == world and row["key"]["mode"] == "step"
        assert row["items_per_s"] == pytest.approx(world * N / row["time_s"]["median"])
        assert scaled["efficiency"] == pytest.approx(row["items_per_s"] / (world * rows[name, 1]["items_per_s"]))
        if world == 2:
            assert scaled["exposed_low_s"] <= scaled["exposed_s"] <= scaled["exposed_high_s"]
            assert scaled["silent_s"] > 0 and scaled["pairs"] == row["time_s"]["samples"]


def test_numbers_of_processes() -> None:
    assert scaling.sizes("4,2") == (1, 2, 4) and scaling.sizes("1") == (1,)
    assert_raises(
        [(partial(scaling.sizes, text), "numbers of processes") for text in ("", "0", "two", "2,-1")],
        argparse.ArgumentTypeError,
    )


def test_processes_are_begun_unless_torchrun_did(monkeypatch) -> None:
    begun = []
    monkeypatch.setattr(scaling, "launch", lambda *args: begun.append(args) or 0)
    arguments = ["train", "--world", "1,4", "--model", "small"]
    assert cli.main(arguments) == 0 and begun == [(arguments, 4)]
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="torchrun started 2 processes"):
        cli.main(arguments)


FAILED = ChildFailedError("bench", {1: ProcessFailure(1, 7, 2, "<N/A>")})


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (None, 0),
        (SignalException("Process 1 got signal: 2", signal.SIGINT), 130),
        (FAILED, 2),
    ],
    ids=["success", "Ctrl-C", "failure"],
)
def test_processes_end_with_a_status_and_without_a_traceback(ends, status, monkeypatch, capfd) -> None:
    monkeypatch.setattr("torch.distributed.run.main", raising(ends) if ends else lambda arguments: None)
    assert scaling.launch(["train"], 2) == status
    assert ("exitcode" in capfd.readouterr().err) == (ends is FAILED)


@pytest.mark.parametrize(("rank", "said"), [("0", f"{cli.NOTHING}\n"), ("1", "")])
def test_only_the_first_process_says_that_it_was_interrupted(rank, said, monkeypatch, capfd) -> None:
    """Ctrl-C comes once at the start of the processes and once during the imports."""
    monkeypatch.setenv("RANK", rank)
    interrupted = raising(KeyboardInterrupt())
    monkeypatch.setattr("torch.distributed.run.main", interrupted)
    assert cli.main(["train", "--world", "2"]) == 130
    assert capfd.readouterr().err == said
    monkeypatch.setattr(cli, "shell", interrupted)
    with pytest.raises(SystemExit, match="130"):
        runpy.run_module("jasper_fast.bench", run_name="__main__")
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("option", [["--mode", "forward+backward"], ["--rivals", "compile"]])
def test_an_option_that_several_processes_would_ignore_is_a_mistake(option, monkeypatch) -> None:
    monkeypatch.setattr(scaling, "launch", raising(AssertionError("launched")))
    with pytest.raises(SystemExit, match=rf"{option[0]} {re.escape(option[1])}: several processes"):
        cli.main(["train", "--world", "2", *option])


def test_every_process_makes_cudnn_search(monkeypatch) -> None:
    """Shows that a process other than the first prepares PyTorch as the first does. If only the first one made cuDNN
    time its algorithms, the others would be slower, and the time of a step is that of the slowest process."""
    seen = []
    monkeypatch.setattr(scaling, "grouped", lambda: True)
    monkeypatch.setattr(scaling, "joined", lambda args: contextlib.nullcontext(scaling.Team(1, (1, 2))))
    monkeypatch.setattr(scaling, "main", lambda *_: seen.append(torch.backends.cudnn.benchmark))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert cli.main(["train"]) == 0
    cudnn_search.on(torch.device("cpu"))
    assert seen == [True]
