"""Copying batches to the device, and `python -m bench data`."""

import itertools
import json
import time
from pathlib import Path

import corpora
import pytest
import torch

from jasper_fast.bench import cli
from jasper_fast.bench.commands import data as command
from jasper_fast.data.batches import BatchSampler, load_batches
from jasper_fast.data.feed import Wait, feed


def test_fed_batches_are_those_that_were_loaded(tmp_path: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = command.data_of(corpora.written(tmp_path, 6))
    sampler = BatchSampler(data.durations, 2)
    plain = list(load_batches(data, sampler))
    fed = list(feed(load_batches(data, sampler, pin_memory=device.type == "cuda"), device, Wait()))
    assert len(fed) == len(plain) == 3
    for one, other in zip(fed, plain, strict=True):
        assert one.audio.device.type == one.targets.device.type == device.type
        assert one.audio_lengths.device.type == one.target_lengths.device.type == "cpu"
        for name in ("audio", "targets", "audio_lengths", "target_lengths"):
            assert torch.equal(getattr(one, name).cpu(), getattr(other, name))


def test_the_wait_is_what_the_loader_takes_and_not_what_the_step_takes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    wait = Wait()
    data = command.data_of(corpora.written(tmp_path, 2))
    for _ in feed(load_batches(data, BatchSampler(data.durations, 1)), torch.device("cpu"), wait):
        time.perf_counter()  # the time of a step, which must not count as waiting
    assert wait.take() == 3, "one for each of two batches, and one for the end"
    assert wait.take() == 0


def test_bench_data_measures_every_stage_of_a_manifest_with_a_url(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setattr(command, "BATCH_SECONDS", 1.0)
    made = corpora.written(tmp_path, 6)
    lines = ({"audio_filepath": u.path, "duration": u.duration, "text": "x"} for u in made)
    path = corpora.write_lines(tmp_path / "m.jsonl", lines)
    options = ["data", "--manifest", f"file://{path}", "--seconds", "0.01", "--workers", "1"]
    assert cli.main([*options, "--rate", "480", "--length", "16.7", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("data_*.json")
    told = json.loads(path.read_text())["data"]
    assert set(told["stages"]) == {"decoded", "decoded, speed changed", "padded batches"}
    assert told["wanted"] == pytest.approx(8016) and told["cores"] == -(-told["wanted"] // told["workers_cpu"])
    assert f"{told['cores']} such cores" in "".join(capsys.readouterr())
    with command.corpus(None, 2) as made:
        assert all(10 <= u.duration <= command.SECONDS and Path(u.path).is_file() for u in made)
    assert not Path(made[0].path).exists()


def test_bench_data_names_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "x.wav", "text": "a", "duration": 1}\n')
    for name, said in (("absent.jsonl", "absent"), ("m.jsonl", r"x\.wav: no such file")):
        with pytest.raises(SystemExit, match=said):
            cli.main(["data", "--manifest", str(tmp_path / name), "--seconds", "0.01", "--out", str(tmp_path)])
