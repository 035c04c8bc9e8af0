"""`jasper-fast prepare manifest` and `jasper-fast check`."""

import gzip
import json
from pathlib import Path

import corpora
import numpy as np
import pytest
import soundfile

from jasper_fast import page
from jasper_fast.cli.command import main
from jasper_fast.data.manifest import read_manifest


def write(folder: Path, *names: str, seconds: float = 0.5) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(corpora.tone(i, seconds))


def manifest_of(source: Path, out: Path, *more: str) -> list[dict]:
    assert main(["prepare", "manifest", str(source), "--out", str(out), *more]) == 0
    return corpora.read_lines(out)


def test_a_folder_with_texts_beside_its_audio(tmp_path: Path, capsys) -> None:
    write(tmp_path, "anna/1.flac", "anna/2.flac", "ben/3-1-1.flac", "ben/4.flac", "5.flac")
    (tmp_path / "anna" / "1.txt").write_text("one\n")
    (tmp_path / "anna" / "2.lab").write_text("two")
    (tmp_path / "ben" / "3-1.trans.txt").write_text("3-1-1 THREE OF THEM\n")
    (tmp_path / "metadata.csv").write_text("5|raw 5|five\n")
    found = manifest_of(tmp_path, tmp_path / "all.jsonl")
    assert [(e["audio_filepath"], e["text"], e.get("speaker"), e["duration"]) for e in found] == [
        ("5.flac", "five", None, 0.5),
        ("anna/1.flac", "one", "anna", 0.5),
        ("anna/2.flac", "two", "anna", 0.5),
        ("ben/3-1-1.flac", "THREE OF THEM", "ben", 0.5),
    ]
    assert "ben/4.flac: no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "out", "written"),
    [
        ("link", "m.jsonl", "link/1.flac"),
        ("link", "link/m.jsonl", "1.flac"),
        ("link", "far/real/m.jsonl", "1.flac"),
        ("far/real", "link/m.jsonl", "1.flac"),
        ("link/../next", "link/m.jsonl", "{}/far/next/1.flac"),
        ("link/../next", "m.jsonl", "far/next/1.flac"),
        ("far/real", "far/real/old.jsonl", "1.flac"),  # old.jsonl links to another folder; the link is replaced
    ],
)
def test_audio_beyond_links_is_found(tmp_path: Path, source: str, out: str, written: str) -> None:
    write(tmp_path, "far/1.flac")
    for folder in (tmp_path / "far" / "real", tmp_path / "far" / "next"):
        folder.mkdir()
        (folder / "1.flac").symlink_to("../1.flac")
        (folder / "1.txt").write_text("one")
    (tmp_path / "link").symlink_to("far/real")
    (tmp_path / "far" / "real" / "old.jsonl").symlink_to("../m.jsonl")
    out, clean = tmp_path / out, tmp_path / "link" / ".." / "c.jsonl"
    assert manifest_of(tmp_path / source, out)[0]["audio_filepath"] == written.format(tmp_path)
    assert main(["check", str(out), "--data-dir", str(out.parent), "--clean", str(clean)]) == 0
    for [utterance] in (read_manifest(out), read_manifest(clean)):
        assert Path(utterance.path).is_file()
        assert Path(utterance.path).parent.resolve() == (tmp_path / source).resolve()


@pytest.mark.parametrize("segments", [False, True])
def test_a_folder_of_kaldi(tmp_path: Path, capsys, segments: bool) -> None:
    data = tmp_path / "data"
    write(tmp_path, "a.flac", "b.flac", seconds=1.0)
    data.mkdir()
    (data / "wav.scp").write_text(f"a {tmp_path}/a.flac\nb flac -c -d -s {tmp_path}/b.flac |\nc sox x.wav -t wav - |\n")
    names = ["a1", "a2", "b1", "c1"] if segments else ["a", "b", "c"]
    (data / "text").write_text("".join(f"{name} words of {name}\n" for name in names))
    (data / "utt2spk").write_text("".join(f"{name} speaker_{name[0]}\n" for name in names))
    if segments:
        (data / "segments").write_text("a1 a 0 0.4\na2 a 0.4 -1\nb1 b 0.25 0.75\nc1 c 0 1\n")
    parts = [("a", 0, 0.4), ("a", 0.4, 0.6), ("b", 0.25, 0.5)] if segments else [("a", 0, 1.0), ("b", 0, 1.0)]
    found = manifest_of(data, tmp_path / "all.jsonl")
    assert [(e["audio_filepath"], e.get("offset", 0), e["duration"], e["speaker"]) for e in found] == [
        (f"{name}.flac", start, seconds, f"speaker_{name}") for name, start, seconds in parts
    ]
    assert "a command, not a file" in capsys.readouterr().err


def test_tables_with_a_header(tmp_path: Path, capsys) -> None:
    write(tmp_path, "clips/a.flac", "clips/b.flac")
    rows = [("x", "a.flac", 'he said "no'), ("y", "b.flac", "two"), ("z", "absent.flac", "three"), ("z", "", "four")]
    lines = ["client_id\tpath\tsentence\tage", *("\t".join([*row, ""]) for row in rows)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    found = manifest_of(tmp_path / "train.tsv", tmp_path / "all.jsonl")
    assert [(e["audio_filepath"], e["text"], e["speaker"]) for e in found] == [
        ("clips/a.flac", 'he said "no', "x"),
        ("clips/b.flac", "two", "y"),
    ]
    assert "absent.flac: no such file" in capsys.readouterr().err
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(b'wav_filename,transcript\na.flac,"one, two"\n'))
    found = manifest_of(tmp_path / "train.csv.gz", tmp_path / "b.jsonl", "--audio-dir", str(tmp_path / "clips"))
    assert [(e["audio_filepath"], e["text"]) for e in found] == [("clips/a.flac", "one, two")]
    (tmp_path / "gaps.csv").write_text("\npath,text\n\nclips/a.flac,one\n\n,two\n")
    assert len(manifest_of(tmp_path / "gaps.csv", tmp_path / "c.jsonl")) == 1
    assert "gaps.csv, line 6: no audio" in capsys.readouterr().err


def test_the_array_of_nvidias_jasper_and_cuts(tmp_path: Path, capsys) -> None:
    write(tmp_path, "a.flac")
    files = [{"fname": "a-0.9.flac", "speed": 0.9}, {"fname": "a.flac", "speed": 1.0, "duration": 0.5}]
    (tmp_path / "array.json").write_text(json.dumps([{"transcript": "one", "files": files, "original_duration": 0.5}]))
    assert manifest_of(tmp_path / "array.json", tmp_path / "all.jsonl") == [
        {"audio_filepath": "a.flac", "duration": 0.5, "text": "one"}
    ]
    recording = {"sources": [{"type": "file", "source": str(tmp_path / "a.flac")}]}
    cut = {"id": "c", "start": 0.1, "duration": 0.25, "recording": recording}
    cuts = [cut | {"supervisions": [{"text": "one", "speaker": "s"}]}, cut | {"supervisions": []}]
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, cuts)).encode()))
    assert manifest_of(tmp_path / "cuts.jsonl.gz", tmp_path / "all.jsonl") == [
        {"audio_filepath": "a.flac", "duration": 0.25, "text": "one", "offset": 0.1, "speaker": "s"}
    ]
    assert "the cut is not one file with one supervision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.csv", None, "no such file"),
        ("t.csv", b"a,b\n1,2\n", "its header has no column for audio"),
        ("t.csv", b"path,b\n1,2\n", "its header has no column for text"),
        ("t.tsv", b"\xff\xfe\x00", "cannot be read as text"),
        ("t.csv.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, "cannot be read as text"),
        ("c.jsonl", b'{"recording": {}, "supervisions": []}', "line 1: not a valid cut"),
        ("m.jsonl", b'{"audio_filepath": "a.wav"}', "line 1: 'text' is missing"),
        ("folder", b"", "there is no audio"),
    ],
)
def test_sources_that_cannot_be_read_are_one_line_errors(tmp_path: Path, capsys, name, content, said) -> None:
    source = tmp_path / name
    source.mkdir() if name == "folder" else content is not None and source.write_bytes(content)
    assert main(["prepare", "manifest", str(source), "--out", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and said in error[0] and name in error[0]
    assert not (tmp_path / "out.jsonl").exists()


# ------------------------------------------------------------------ check


def spoiled(folder: Path) -> tuple[Path, dict[str, set[str]]]:
    """Writes a manifest of files with every fault except `out_of_alphabet`. Returns its path and the expected faults by
    file name."""
    rng = np.random.default_rng(0)
    lengths = {"good": 16000, "clipped": 16000, "numbers": 16000, "long": 16000 * 18, "brief": 800, "many": 4000}
    speech = {n: 0.1 * rng.standard_normal(size) for n, size in (lengths | {"short": 8000, "empty": 16000}).items()}
    speech |= {"again": speech["good"], "silent": 1e-4 * speech["clipped"], "clipped": 100 * speech["clipped"]}
    for name, samples in speech.items():
        soundfile.write(folder / f"{name}.wav", samples, 16000, subtype="PCM_16")
    whole = (folder / "numbers.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.wav").write_bytes(b"no audio at all")
    cases = {
        "good.wav": ("one", 1, set()), "again.wav": ("one", 1, {"duplicate"}), "clipped.wav": ("two", 1, {"clipped"}),
        "silent.wav": ("three", 1, {"silent"}), "long.wav": ("four", 18, {"too_long"}),
        "brief.wav": ("a", 0.05, {"too_short"}), "many.wav": ("far too many letters", 0.25, {"too_short_for_ctc"}),
        "short.wav": ("five", 2.0, {"wrong_duration"}), "empty.wav": ("...", 1, {"empty_text"}),
        "cut.wav": ("seven", 1, {"truncated"}),
        "noise.wav": ("eight", 1, {"unreadable"}), "absent.wav": ("nine", 1, {"unreadable"}),
        "numbers.wav": ("Mr. Five", 1, set()),
    }  # fmt: skip
    lines = [json.dumps({"audio_filepath": n, "text": t, "duration": s}) for n, (t, s, _) in cases.items()]
    path = folder / "all.jsonl"
    path.write_text("\n".join([*lines, '{"audio_filepath": "x.wav"}', "{not json"]) + "\n")
    return path, {name: faults for name, (_, _, faults) in cases.items()}


def test_check_finds_every_fault_and_writes_what_is_clean(tmp_path: Path, capsys) -> None:
    path, expected = spoiled(tmp_path)
    files = {option: tmp_path / name for option, name in (("clean", "c.jsonl"), ("html", "p.html"), ("out", "o.json"))}
    options = [text for option, file in files.items() for text in (f"--{option}", str(file))]
    assert main(["check", str(path), *options]) == 1
    told = json.loads(files["out"].read_text())
    found = {Path(c["name"]).name: {f["reason"] for f in c["faults"]} for c in told["culprits"] if c["name"]}
    assert found == {name: faults for name, faults in expected.items() if faults}
    assert told["faults"]["bad_entry"] == 2 and told["entries"] == 15
    kept = [name for name, faults in expected.items() if faults <= {"clipped"}]
    assert [u.path for u in read_manifest(files["clean"])] == [str(tmp_path / name) for name in kept]
    assert main(["check", str(files["clean"])]) == 0, "clipped.wav is reported and kept"
    assert main(["check", str(files["clean"]), "--strict", "--clean", str(tmp_path / "d.jsonl")]) == 1
    assert main(["check", str(tmp_path / "d.jsonl"), "--strict"]) == 0
    html = files["html"].read_text()
    assert html.count("<svg") == 4 and all(name in html for name, faults in expected.items() if faults)
    assert f"{path}: {len(kept)} of 15 utterances are good" in capsys.readouterr().out


def test_check_goes_by_a_configuration(tmp_path: Path) -> None:
    entry = {"audio_filepath": "a.flac", "text": "five words of eleven", "duration": 0.5}
    check = ["check", str(corpora.write_spoken(tmp_path / "m.jsonl", [entry]))]
    assert main(check) == 0
    digits = [*check, "--config", str(corpora.ROOT / "configs" / "digits.yaml")]
    assert main([*digits, "--out", str(tmp_path / "o.json")]) == 1
    assert "out_of_alphabet" in json.loads((tmp_path / "o.json").read_text())["faults"]


def test_a_clean_manifest_elsewhere_finds_its_audio(tmp_path: Path) -> None:
    write(tmp_path, "in/a.flac", "in/b.flac")
    files = [{"fname": "b.flac", "speed": 1.1}, {"fname": "a.flac", "speed": 1.0}]
    (tmp_path / "in" / "m.json").write_text(
        json.dumps([{"files": files, "transcript": "one", "original_duration": 0.5}])
    )
    (tmp_path / "other").mkdir()
    assert main(["check", str(tmp_path / "in" / "m.json"), "--clean", str(tmp_path / "other" / "c.jsonl")]) == 0
    [utterance] = read_manifest(tmp_path / "other" / "c.jsonl", offline_speeds=True)
    assert Path(utterance.path).is_file() and len(utterance.alternatives) == 2
    (tmp_path / "in" / "a.txt").write_text("two")
    line = {"audio_filepath": "a.flac", "text": None, "text_filepath": "a.txt"}
    corpora.write_lines(tmp_path / "in" / "n.jsonl", [line])
    assert main(["check", str(tmp_path / "in" / "n.jsonl"), "--clean", str(tmp_path / "in" / "c.jsonl")]) == 0
    assert read_manifest(tmp_path / "in" / "c.jsonl")[0].text == "two"


def test_histograms_hold_every_value() -> None:
    rng = np.random.default_rng(0)
    for values in ([], [3.0], [0.0, 0.0], rng.normal(-30, 10, 1000).tolist(), [1e-9, 1e9], [-np.inf, 1.0, np.nan, 2.0]):
        finite = [v for v in values if np.isfinite(v)]
        bins = page.histogram(values)
        assert sum(count for _, _, count in bins) == len(finite) and len(bins) <= 30
        if finite:
            assert bins[0][0] <= min(finite) and max(finite) <= bins[-1][1] * (1 + 1e-9) + 1e-12
