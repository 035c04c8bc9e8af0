"""Utterances packed in tar files: written, read, sampled a few shards at a time, resumed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import corpora
import numpy as np
import pytest
import soundfile
import test_cli

from jasper_fast.cli.command import main
from jasper_fast.data.batches import BatchSampler, load_batches
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.data.manifest import read_manifest
from jasper_fast.data.perturb import SPEED, Perturb
from jasper_fast.data.settings import AudioSettings
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError
from jasper_fast.speech.text import Vocabulary


def corpus(folder: Path, count: int = 12) -> Path:
    """A manifest of files in several folders, of which two have one name, and one is used in part."""
    lines = []
    for i in range(count):
        file = folder / f"s{i % 3}" / f"a.{i // 6}.{i // 3}.flac"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(corpora.tone(i, 0.4 + 0.05 * i))
        entry = {"audio_filepath": str(file.relative_to(folder)), "duration": 0.4 + 0.05 * i, "text": "abc" * (i % 4)}
        lines.append(entry | {"text": f"text {'i' * i}", "speaker": f"s{i % 3}"})
    lines.append({"audio_filepath": lines[-1]["audio_filepath"], "offset": 0.1, "duration": 0.3, "text": "a part"})
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "m.jsonl"


def pack(folder: Path, out: str = "shards", *more: str) -> Path:
    command = ["prepare", "shards", str(folder / "m.jsonl"), "--out", str(folder / out), "--shard-mb", "0.02", "-q"]
    assert main([*command, *more]) == 0
    return folder / out / "tarred_audio_manifest.json"


def test_shards_hold_what_the_files_hold(tmp_path: Path) -> None:
    plain = {u.text: u for u in read_manifest(corpus(tmp_path))}
    packed = read_manifest(pack(tmp_path))
    assert {u.text for u in packed} == set(plain) and len(packed) == len(plain)
    assert len({u.packed.tar for u in packed}) > 2
    for u in packed:
        mine = plain[u.text]
        np.testing.assert_array_equal(audio.load(u.source()), audio.load(mine.path, 16000, mine.offset, mine.seconds))
        assert u.speaker == mine.speaker and u.duration == pytest.approx(mine.duration, abs=1e-4)
    again = pack(tmp_path, "again", "--jobs", "2")
    assert corpora.tree(again.parent) == corpora.tree(tmp_path / "shards")


def test_other_tools_find_their_names(tmp_path: Path) -> None:
    corpus(tmp_path)
    lines = [json.loads(line) for line in pack(tmp_path).read_text().splitlines()]
    names = []
    for path in sorted((tmp_path / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                names.append(member.name)
                [line] = [x for x in lines if x["audio_filepath"] == member.name]
                assert path.name == f"audio_{line['shard_id']}.tar"
                assert (line["tar_start"], line["tar_size"]) == (member.offset_data, member.size)
    assert len(set(names)) == len(lines) and all(name.count(".") == 1 for name in names)


def test_shards_of_nemo_have_no_places_and_are_read(tmp_path: Path) -> None:
    corpus(tmp_path)
    path = pack(tmp_path)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        for key in ("tar", "tar_start", "tar_size"):
            del entry[key]
    other = path.with_name("nemo.json")
    other.write_text("\n".join(map(json.dumps, entries)))
    assert read_manifest(other) == read_manifest(path)


def test_shards_are_read_through_a_url(tmp_path: Path) -> None:
    corpus(tmp_path)
    for u in read_manifest(pack(tmp_path, "shards", "--url", f"file://{tmp_path}/shards/")):
        assert u.packed.tar.startswith("file://") and len(audio.load(u.source()))


def test_recognition_of_shards_and_files_is_the_same(tmp_path: Path) -> None:
    corpus(tmp_path)
    model, found = test_cli.write_checkpoint(tmp_path / "model.pt"), []
    for manifest in (tmp_path / "m.jsonl", pack(tmp_path)):
        out = tmp_path / "out.json"
        assert main(["evaluate", "--manifest", str(manifest), "--checkpoint", model, "--out", str(out)]) == 0
        told = json.loads(out.read_text())
        rows = sorted((row["text"], row["pred_text"]) for row in told["utterances_list"])
        found.append((rows, told["wer"], told["cer"], told["words"]))
    assert found[0] == found[1]


def test_damaged_shards_are_named_and_the_rest_is_used(tmp_path: Path, capsys) -> None:
    corpus(tmp_path)
    path = pack(tmp_path)
    utterances = read_manifest(path)
    first = Path(utterances[0].packed.tar)
    first.write_bytes(first.read_bytes()[:600])
    with pytest.raises(AudioError, match=r"audio_0\.tar/.* the shard ends"):
        utterances[0].source()
    first.unlink()
    assert main(["check", str(path), "--min-duration", "0"]) == 1
    assert "the shard cannot be read" in capsys.readouterr().out
    data = SpeechDataset(utterances, Vocabulary(), AudioSettings(min_duration=0.0))
    batches = list(load_batches(data, BatchSampler(data.durations, 4, shards=data.shards)))
    assert sum(map(len, batches)) == len(utterances) and "unreadable" in data.skipped.counts


@pytest.mark.parametrize(
    "entry", [{"shard_id": 9}, {"shard_id": 0, "tar": "m.jsonl"}, {"tar_start": -1, "tar_size": 5}]
)
def test_places_that_are_none_are_one_line_errors(tmp_path: Path, capsys, entry: dict) -> None:
    corpus(tmp_path)
    entry = {"audio_filepath": "x.flac", "text": "a", "duration": 1.0, "shard_id": 0} | entry
    (tmp_path / "n.jsonl").write_text(json.dumps(entry))
    assert main(["evaluate", "--manifest", str(tmp_path / "n.jsonl"), "--checkpoint", "x"]) == 2
    error = capsys.readouterr().err
    assert "n.jsonl, line 1" in error and error.count("\n") == 1


def test_files_that_cannot_be_packed_are_named(tmp_path: Path, capsys) -> None:
    corpus(tmp_path)
    bad = next(tmp_path.rglob("*.flac"))
    bad.write_bytes(b"no audio")
    assert main(["prepare", "shards", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "s"), "-q"]) == 2
    assert bad.name in capsys.readouterr().err and not (tmp_path / "s" / "tarred_audio_manifest.json").exists()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sizes", [{"batch_size": 4}, {"max_seconds": 30.0}])
def test_a_plan_by_shards_has_each_item_once_and_few_shards_at_a_time(world: int, sizes: dict) -> None:
    rng = np.random.default_rng(0)
    shards, seconds = np.repeat(np.arange(20), 15), rng.uniform(1, 10, 300)
    plans = [
        BatchSampler(seconds, rank=r, world_size=world, shards=shards, open_shards=4, **sizes) for r in range(world)
    ]
    for epoch in (0, 1):
        steps = list(zip(*(plan.batches(epoch) for plan in plans), strict=True))
        items = [i for step in steps for batch in step for i in batch]
        assert sorted(items) == list(range(300))
        assert [len(set(shards[items[at : at + 60]])) for at in range(0, 300, 60)] == [4] * 5
    assert plans[0].batches(0) != plans[0].batches(1)


def test_a_run_over_shards_goes_on_from_any_step(tmp_path: Path) -> None:
    corpus(tmp_path)
    utterances = read_manifest(pack(tmp_path))

    def batches(start: int) -> list:
        data = SpeechDataset(utterances, Vocabulary(), AudioSettings(perturb=Perturb(speed=SPEED)))
        sampler = BatchSampler(data.durations, 3, shards=data.shards, open_shards=2)
        return list(load_batches(data, sampler, epoch=1, start_step=start))

    every = batches(0)
    for start in (1, 3):
        for one, other in zip(batches(start), every[start:], strict=True):
            assert one.names == other.names and np.array_equal(one.audio, other.audio)


def test_memory_is_read_as_a_file_is(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.linspace(-0.5, 0.5, 8000), 8000)
    data = (tmp_path / "a.wav").read_bytes()
    np.testing.assert_array_equal(audio.load(audio.Memory("x", data)), audio.load(tmp_path / "a.wav"))
    assert audio.duration(audio.Memory("x", data)) == 1.0
    for content in (b"", b"nothing", data[:30]):
        with pytest.raises(AudioError, match="x: "):
            audio.load(audio.Memory("x", content))
