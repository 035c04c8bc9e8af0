"""Utterances packed in tar files (shards): writing, reading, sampling from a few shards at a time, resuming."""

import gzip
import json
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import corpora
import numpy as np
import pytest
import soundfile
import test_cli
from standins import spied

from jasper_fast.cli.command import main
from jasper_fast.data import places
from jasper_fast.data.batches import BatchSampler, load_batches
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.data.manifest import ManifestError, Utterance, read_manifest
from jasper_fast.data.perturb import SPEED, Perturb
from jasper_fast.data.prepare import packing
from jasper_fast.data.reading import AudioReader
from jasper_fast.data.settings import AudioSettings
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError
from jasper_fast.speech.text import Vocabulary


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Writes a manifest of files in several folders, and returns its path. Some files have the same name. The last line
    names a part of the last file."""
    spoken = [
        {"audio_filepath": f"s{i % 3}/a.{i // 6}.{i // 3}.flac", "duration": 0.4 + 0.05 * i, "text": f"text {'i' * i}",
         "speaker": f"s{i % 3}"} for i in range(12)
    ]  # fmt: skip
    path = corpora.write_spoken(tmp_path / "m.jsonl", spoken)
    part = {"audio_filepath": spoken[-1]["audio_filepath"], "offset": 0.1, "duration": 0.3, "text": "a part"}
    return corpora.write_lines(path, [*spoken, part])


def pack(folder: Path, out: str = "shards", *more: str) -> Path:
    command = ["prepare", "shards", str(folder / "m.jsonl"), "--out", str(folder / out), "--shard-mb", "0.02", "-q"]
    assert main([*command, *more]) == 0
    return folder / out / "tarred_audio_manifest.json"


@pytest.fixture
def packed(tmp_path: Path, corpus: Path) -> Path:
    """Packs the corpus into shards and returns the path of their manifest."""
    return pack(tmp_path)


def without_places(path: Path, out: Path) -> tuple[Path, list[dict]]:
    """Writes the manifest at `path` to `out` without the byte ranges in tars, which NeMo's manifests lack. Returns the
    path and the entries of the copy."""
    entries = [{k: v for k, v in e.items() if not k.startswith("tar")} for e in corpora.read_lines(path)]
    return corpora.write_lines(out, entries), entries


def by_text(manifest: Path) -> dict[str, Utterance]:
    return {u.text: u for u in read_manifest(manifest)}


def read_all(utterances: list[Utterance]) -> tuple[SpeechDataset, int]:
    """Returns a dataset, and how many utterances its batches have."""
    data = SpeechDataset(utterances, Vocabulary(), AudioSettings(min_duration=0.0))
    return data, sum(map(len, load_batches(data, BatchSampler(data.durations, 4, shards=data.shards))))


def test_shards_hold_what_the_files_hold(tmp_path: Path, corpus: Path, packed: Path) -> None:
    plain, found = by_text(corpus), read_manifest(packed)
    assert {u.text for u in found} == set(plain) and len(found) == len(plain)
    assert len({u.packed.tar for u in found}) > 2
    for u in found:
        mine = plain[u.text]
        np.testing.assert_array_equal(audio.load(u.source()), audio.load(mine.path, 16000, mine.offset, mine.seconds))
        assert u.speaker == mine.speaker and u.duration == pytest.approx(mine.duration, abs=1e-4)
    assert corpora.tree(pack(tmp_path, "again", "--jobs", "2").parent) == corpora.tree(tmp_path / "shards")
    for size, shards in (("inf", 1), ("1e-9", 13)):
        pack(tmp_path, size, "--shard-mb", size)
        assert len([*(tmp_path / size).glob("*.tar")]) == shards


def test_other_tools_find_their_names(tmp_path: Path, packed: Path) -> None:
    lines, found = corpora.read_lines(packed), {}
    for path in (tmp_path / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {m.name: (path.name, m.offset_data, m.size) for m in tar}
    wanted = {x["audio_filepath"]: (f"audio_{x['shard_id']}.tar", x["tar_start"], x["tar_size"]) for x in lines}
    assert found == wanted and len(found) == len(lines) and all(name.count(".") == 1 for name in found)


def test_the_first_part_of_a_wav_file_is_named_as_the_flac_file_that_it_is(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    corpora.write_lines(tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "duration": 0.3, "text": "a part"}])
    [line] = corpora.read_lines(pack(tmp_path))
    assert (line["audio_filepath"], line["duration"]) == ("a.flac", 0.3)
    assert read_manifest(tmp_path / "shards/tarred_audio_manifest.json")[0].source().data[:4] == b"fLaC"


URL = "memory://bucket/shards"


@pytest.fixture
def store(tmp_path: Path, corpus: Path, monkeypatch):
    """Copies the shards to an object store (fsspec's in memory). Yields `files`, its filesystem, and `asked`, a list
    of the numbers of byte ranges in the later requests."""
    files = pytest.importorskip("fsspec").filesystem("memory")
    pack(tmp_path, "shards", "--url", f"{URL}/")
    files.store.clear()
    for path in (tmp_path / "shards").iterdir():
        files.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    asked = spied(monkeypatch, files, "cat_ranges", lambda paths, *more, **how: len(paths))
    yield SimpleNamespace(files=files, asked=asked)
    files.store.clear()


def test_an_object_store_gives_what_the_files_give(tmp_path: Path, store) -> None:
    remote = read_manifest(f"{URL}/tarred_audio_manifest.json")
    local, plain = by_text(tmp_path / "shards" / "tarred_audio_manifest.json"), by_text(tmp_path / "m.jsonl")
    assert {u.text for u in remote} == set(plain) and all(u.packed.tar.startswith(URL) for u in remote)
    assert remote[0].packed == local[remote[0].text].packed  # the manifest has the address that --url gave
    made = []
    for utterances in ([plain[u.text] for u in remote], remote):
        data = SpeechDataset(utterances, Vocabulary(), AudioSettings(min_duration=0.0, perturb=Perturb(speed=SPEED)))
        made.append(list(load_batches(data, BatchSampler(data.durations, 5))))
        assert not data.skipped.items
    assert all(np.array_equal(one.audio, other.audio) for one, other in zip(*made, strict=True))
    assert sorted(store.asked) == [3, 5, 5], "one request for each batch"


def test_what_an_object_store_does_not_give_is_named(store, capsys) -> None:
    utterances = read_manifest(f"{URL}/tarred_audio_manifest.json")
    assert utterances[0].packed.tar != utterances[-1].packed.tar
    bucket, broken = "/bucket/shards", Path(utterances[-1].packed.tar).name
    store.files.pipe_file(f"{bucket}/{broken}", store.files.cat_file(f"{bucket}/{broken}")[:600])
    with pytest.raises(AudioError, match=rf"{broken}/.* the shard ends"):
        reader = AudioReader(16000)
        reader.fetch(utterances[-1:])
        reader.read(utterances[-1])
    store.files.rm_file(f"{bucket}/audio_0.tar")
    data, count = read_all(utterances)
    assert count == len(utterances) and any("the shard cannot be read" in s.detail for s in data.skipped.items)
    for url in (f"{URL}/absent.json", "nothing://at/all.json", "http://127.0.0.1:9/m.json"):
        assert main(["check", url]) == 2
        error = capsys.readouterr().err
        assert f"{url}: cannot read the manifest" in error and error.count("\n") == 1


def test_a_server_that_sends_whole_files_is_named(store, monkeypatch) -> None:
    monkeypatch.setattr(store.files, "cat_file", lambda path, **_: store.files.store[path].getvalue())
    with pytest.raises(AudioError, match=r"audio_\d\.tar cannot send a part of a file"):
        read_manifest(f"{URL}/tarred_audio_manifest.json")[0].source()


def test_single_files_in_a_store_are_read_and_packed(tmp_path: Path, store) -> None:
    for name, seconds in (("one", 0.5), ("fast", 0.4)):
        soundfile.write(tmp_path / f"{name}.flac", np.zeros(int(16000 * seconds)), 16000)
        store.files.put_file(str(tmp_path / f"{name}.flac"), f"/bucket/{name}.flac")
    files = [{"fname": "one.flac", "speed": 1.0}, {"fname": "fast.flac", "speed": 1.25}]
    store.files.pipe_file("/bucket/m.json", json.dumps([{"files": files, "transcript": "one"}]).encode())
    [utterance] = read_manifest("memory://bucket/m.json", offline_speeds=True)
    lengths = [len(AudioReader(16000).read(utterance, variant)[0]) for variant in (0.0, 0.9)]
    assert lengths == [8000, 6400] and utterance.duration == 0.5
    manifest, _ = packing.pack([utterance], tmp_path / "packed", 1 << 20, 0, None, 1, lambda *_: None)
    assert read_manifest(manifest)[0].source().data == (tmp_path / "one.flac").read_bytes()


def test_shards_of_nemo_in_a_store_by_their_pattern(tmp_path: Path, store) -> None:
    """Each shard has a manifest of its own, and the tars have other names than ours. The file names in the manifests
    have another folder in front. One name per shard ends in -sub1, which in NeMo marks a part of a file."""
    manifest = tmp_path / "shards" / "tarred_audio_manifest.json"
    _, entries = without_places(manifest, tmp_path / "nemo.json")
    count = max(e["shard_id"] for e in entries) + 1
    for shard in range(count):
        mine = [e | {"audio_filepath": f"old/place/{e['audio_filepath']}"} for e in entries if e["shard_id"] == shard]
        mine[0]["audio_filepath"] = mine[0]["audio_filepath"].replace(".flac", "-sub1.flac")
        store.files.pipe_file(f"/bucket/manifest_{shard}.json", "\n".join(map(json.dumps, mine)).encode())
        store.files.mv(f"/bucket/shards/audio_{shard}.tar", f"/bucket/tars/part-{shard:03d}.tar")
    tars = f"memory://bucket/tars/part-_OP_000..{count - 1:03d}_CL_.tar"
    found = read_manifest(f"memory://bucket/manifest__OP_0..{count - 1}_CL_.json", tars)
    assert [(u.text, u.packed[1:]) for u in found] == [(u.text, u.packed[1:]) for u in read_manifest(manifest)]
    assert all(len(audio.load(u.source())) for u in found)
    with pytest.raises(ManifestError, match="names 1 shards"):
        read_manifest(f"memory://bucket/manifest_{count - 1}.json", "memory://bucket/tars/part-{000..000}.tar")


def test_places_in_shards_of_nemo_are_found_once(tmp_path: Path, packed: Path) -> None:
    """`prepare manifest` writes where each utterance lies in NeMo's tars (its byte range) into the manifest, and
    `check --clean` keeps this."""
    nemo, _ = without_places(packed, packed.with_name("nemo.json"))
    assert read_manifest(nemo) == read_manifest(packed)
    (tmp_path / "other").mkdir()
    made, clean = tmp_path / "other" / "m.jsonl", tmp_path / "clean.jsonl"
    assert main(["prepare", "manifest", str(nemo), "--out", str(made), "-q"]) == 0
    main(["check", str(made), "--min-duration", "0", "--clean", str(clean), "-q"])
    for manifest in (made, clean):
        assert {(u.text, u.packed) for u in read_manifest(manifest)} == {
            (u.text, u.packed) for u in read_manifest(packed)
        }
        assert all("tar_start" in entry for entry in corpora.read_lines(manifest))


def test_shards_of_webdataset_without_a_manifest(tmp_path: Path, capsys) -> None:
    samples = {
        "a/one": {"flac": corpora.tone(1, 0.5), "txt": b"the first\n"},
        "a/two": {
            "json": json.dumps({"text": "the second", "speaker": 7}).encode(),
            "wav": corpora.tone(2, 0.4, "WAV"),
        },
        "three": {"seg.flac": corpora.tone(3, 0.6), "json": b'{"transcript": "the third"}', "cls": b"1"},
        "mute": {"txt": b"no audio"},
        "wordless": {"flac": corpora.tone(4, 0.5), "json": b"[1]"},
        "broken": {"flac": b"no audio", "txt": b"x"},
    }
    for number, names in enumerate((("a/one", "mute", "a/two"), ("wordless", "broken", "three"))):
        with tarfile.open(tmp_path / f"part-{number:02d}.tar", "w") as tar:
            for name in names:
                for end, content in samples[name].items():
                    corpora.add(tar, f"{name}.{end}", content)
    for source in (tmp_path, tmp_path / "part-{00..01}.tar", f"file://{tmp_path}/part-{{00,01}}.tar"):
        out = tmp_path / "out" / "m.jsonl"
        out.parent.mkdir(exist_ok=True)
        assert main(["prepare", "manifest", str(source), "--out", str(out)]) == 0
        left = capsys.readouterr().err
        for message in ("mute: no audio among txt", "wordless: no text", "broken.flac: cannot be read", "3 left out"):
            assert message in left
        found = [(u.text, round(u.duration, 3), u.speaker, len(audio.load(u.source()))) for u in read_manifest(out)]
        assert found == [("the first", 0.5, None, 8000), ("the second", 0.4, "7", 6400), ("the third", 0.6, None, 9600)]
    (tmp_path / "part-01.tar").write_bytes(gzip.compress((tmp_path / "part-01.tar").read_bytes()))
    assert main(["prepare", "manifest", str(tmp_path), "--out", str(out)]) == 2
    assert "part-01.tar: not a complete, uncompressed tar file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("plain.tar", ["plain.tar"]),
        ("a_{0..2}.tar", ["a_0.tar", "a_1.tar", "a_2.tar"]),
        ("a_{098..101}", ["a_098", "a_099", "a_100", "a_101"]),
        ("s3://b/{x,y}__OP_1..2_CL_", ["s3://b/x_1", "s3://b/x_2", "s3://b/y_1", "s3://b/y_2"]),
        ("{odd", ["{odd"]),
        ("an _OP_ alone", ["an _OP_ alone"]),
        ("a{1,2}", ["a{1,2}"]),  # there is a file of this name
    ],
)
def test_patterns(pattern: str, paths: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a{1,2}").write_text("")
    assert places.expanded(pattern) == paths


@pytest.mark.parametrize("pattern", ["{0..999}{0..1000}{0..9}", "a_{0..1000000}", "a_{0..99999999999999999999}"])
def test_patterns_without_end_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="more than 1,000,000"):
        places.expanded(pattern)


def test_recognition_of_shards_and_files_is_the_same(tmp_path: Path, corpus: Path, packed: Path) -> None:
    model, found = test_cli.write_checkpoint(tmp_path / "model.pt"), []
    for manifest, size in ((corpus, 16), (packed, 16), (packed, 1)):
        out, page = tmp_path / "out.json", tmp_path / "page.html"
        options = ["--checkpoint", model, "--out", str(out), "--html", str(page), "--worst", "4"]
        assert main(["evaluate", "--manifest", str(manifest), "--batch-size", str(size), *options]) == 0
        told = json.loads(out.read_text())
        rows = sorted((row["text"], row["pred_text"]) for row in told["utterances_list"])
        sounds = sorted(re.findall(r'<audio[^>]* src="([^"]*)"', page.read_text()))
        assert len(sounds) == 4
        found.append((rows, told["wer"], told["cer"], told["words"], sounds))
    assert found[0] == found[1] == found[2]


def test_damaged_shards_are_named_and_the_rest_is_used(packed: Path, capsys) -> None:
    utterances = read_manifest(packed)
    first = Path(utterances[0].packed.tar)
    first.write_bytes(first.read_bytes()[:600])
    with pytest.raises(AudioError, match=r"audio_0\.tar/.* the shard ends"):
        utterances[0].source()
    first.unlink()
    assert main(["check", str(packed), "--min-duration", "0"]) == 1
    assert "the shard cannot be read" in capsys.readouterr().out
    data, count = read_all(utterances)
    assert count == len(utterances) and "unreadable" in data.skipped.counts


@pytest.mark.parametrize(
    "entry", [{"shard_id": 9}, {"shard_id": 0, "tar": "m.jsonl"}, {"tar_start": -1, "tar_size": 5}]
)
def test_places_that_are_none_are_one_line_errors(tmp_path: Path, corpus: Path, capsys, entry: dict) -> None:
    entry = {"audio_filepath": "x.flac", "text": "a", "duration": 1.0, "shard_id": 0} | entry
    (tmp_path / "n.jsonl").write_text(json.dumps(entry))
    assert main(["evaluate", "--manifest", str(tmp_path / "n.jsonl"), "--checkpoint", "x"]) == 2
    error = capsys.readouterr().err
    assert "n.jsonl, line 1" in error and error.count("\n") == 1


def test_files_that_cannot_be_packed_are_named(tmp_path: Path, corpus: Path, capsys) -> None:
    bad = next(tmp_path.rglob("*.flac"))
    bad.write_bytes(b"no audio")
    assert main(["prepare", "shards", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "s"), "-q"]) == 2
    assert bad.name in capsys.readouterr().err and not (tmp_path / "s" / "tarred_audio_manifest.json").exists()
    bad.unlink()
    bad.mkdir()
    assert main(["prepare", "shards", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "s"), "-q"]) == 2
    assert f"{bad.name}: is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sizes", [{"batch_size": 4}, {"max_seconds": 30.0}])
def test_a_plan_by_shards_has_each_item_once_and_few_shards_at_a_time(world: int, sizes: dict) -> None:
    shards, seconds = np.repeat(np.arange(20), 15), np.random.default_rng(0).uniform(1, 10, 300)
    plans = [
        BatchSampler(seconds, rank=r, world_size=world, shards=shards, open_shards=4, **sizes) for r in range(world)
    ]
    for epoch in (0, 1):
        steps = zip(*(plan.batches(epoch) for plan in plans), strict=True)
        items = [i for step in steps for batch in step for i in batch]
        assert sorted(items) == list(range(300))
        assert [len(set(shards[items[at : at + 60]])) for at in range(0, 300, 60)] == [4] * 5
    assert plans[0].batches(0) != plans[0].batches(1)


def test_a_run_over_shards_goes_on_from_any_step(packed: Path) -> None:
    def batches(start: int) -> list:
        data = SpeechDataset(read_manifest(packed), Vocabulary(), AudioSettings(perturb=Perturb(speed=SPEED)))
        sampler = BatchSampler(data.durations, 3, shards=data.shards, open_shards=2)
        return list(load_batches(data, sampler, epoch=1, start_step=start))

    every = batches(0)
    for start in (1, 3):
        for one, other in zip(batches(start), every[start:], strict=True):
            assert one.names == other.names and np.array_equal(one.audio, other.audio)


def test_memory_is_read_as_a_file_is(tmp_path: Path) -> None:
    data = corpora.tone(1, 1.0, "WAV")
    (tmp_path / "a.wav").write_bytes(data)
    np.testing.assert_array_equal(audio.load(audio.Memory("x", data)), audio.load(tmp_path / "a.wav"))
    assert audio.duration(audio.Memory("x", data)) == 1.0
    for content in (b"", b"nothing", data[:30]):
        with pytest.raises(AudioError, match="x: "):
            audio.load(audio.Memory("x", content))
