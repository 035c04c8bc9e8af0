"""`jasper-fast prepare librispeech` with small archives from a local server that can misbehave."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import corpora
import numpy as np
import pytest
import soundfile
from conftest import raising
from corpora import prepare_arguments as arguments

from jasper_fast.cli.command import main
from jasper_fast.data.manifest import read_manifest
from jasper_fast.data.prepare import copies, fetch, librispeech, unpack, writing


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    """Removes the pause between download attempts."""
    monkeypatch.setattr(fetch, "PAUSE", 0.0)


def of_folder(folder: Path, name: str, content: bytes, *more: str) -> list[str]:
    """Writes the archive of one set to the folder, and returns arguments that prepare it."""
    (folder / f"{name}.tar.gz").write_bytes(content)
    return arguments(folder, str(folder), {f"{name}.tar.gz": content}, *more)


@pytest.fixture
def archives() -> dict[str, bytes]:
    return {
        f"{name}.tar.gz": corpora.archive(name, corpora.utterances(count))
        for name, count in (("dev-clean", 6), ("train-clean-100", 4))
    }


def test_sets_are_fetched_unpacked_copied_and_described(tmp_path: Path, archives) -> None:
    with corpora.Server(archives) as server:
        assert main(arguments(tmp_path, server.url, archives, "--speeds", "0.9", "1.1", "1", "--jobs", "2")) == 0
    out = tmp_path / "out"
    spoken = corpora.utterances(6)
    for line, name in zip(corpora.read_lines(out / "dev-clean.jsonl"), sorted(spoken), strict=True):
        audio, text = spoken[name]
        assert (line["text"], line["speaker"]) == (text.lower().strip(), name.split("-")[0])
        assert (out / line["audio_filepath"]).read_bytes() == audio, "FLAC files stay as they are"
        assert [f["speed"] for f in line["files"]] == [1.0, 0.9, 1.1]
        plain, rate = soundfile.read(out / line["audio_filepath"])
        for file in line["files"]:
            samples, copied_rate = soundfile.read(out / file["fname"])
            assert copied_rate == rate and file["duration"] == pytest.approx(len(samples) / rate, abs=1e-6)
            assert abs(len(samples) - len(plain) / file["speed"]) <= 1
    utterance = read_manifest(out / "dev-clean.jsonl", offline_speeds=True)[0]
    assert len(utterance.alternatives) == 3 and all(Path(p).is_file() for p in utterance.alternatives)
    assert sorted(p.name for p in out.iterdir()) == ["LibriSpeech", "dev-clean.jsonl", "train-clean-100.jsonl"]


def test_a_copy_plays_at_its_speed(tmp_path: Path) -> None:
    content = corpora.archive("x", {"1-2-3": (corpora.tone(4, 2.0), "A")})
    assert main(of_folder(tmp_path, "x", content, "--speeds", "0.8", "--wav")) == 0
    folders = (tmp_path / "out" / "LibriSpeech" / name / "1" / "2" for name in ("x-wav", "x-sp0.8-wav"))
    read = (soundfile.read(folder / "1-2-3.wav") for folder in folders)
    plain, slow = (np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples) for samples, rate in read)
    assert slow / plain == pytest.approx(0.8, rel=0.01)
    assert (tmp_path / "x.tar.gz").is_file(), "a folder's archives are the user's"


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        (["break", "break"], 2),
        (["busy", "empty", "break"], 1),
        (["break", "whole"], 1),
        (["break", "shift"], 1),
    ],
)
def test_a_download_goes_on_after_faults(tmp_path: Path, archives, faults: list[str], ranges: int) -> None:
    archives = {"dev-clean.tar.gz": archives["dev-clean.tar.gz"]}
    with corpora.Server(archives, faults) as server:
        assert main(arguments(tmp_path, server.url, archives)) == 0
    assert sum(wanted is not None for _, wanted in server.asked) == ranges
    assert len((tmp_path / "out" / "dev-clean.jsonl").read_text().splitlines()) == 6


def test_a_wrong_md5_is_an_error_and_the_next_run_starts_anew(tmp_path: Path, archives, capsys) -> None:
    with corpora.Server(archives, ["corrupt"]) as server:
        given = arguments(tmp_path, server.url, archives)
        assert main(given) == 2
        said = capsys.readouterr().err.splitlines()
        assert "MD5" in said[-1] and "dev-clean.tar.gz" in said[-1] and "deleted" in said[-1]
        assert not (tmp_path / "out" / "LibriSpeech").exists()
        assert main(given) == 0


@pytest.mark.parametrize(("held", "tries", "said"), [(False, 1, "404"), (True, fetch.TRIES, "503")])
def test_a_server_that_brings_nothing_is_given_up(tmp_path: Path, archives, capsys, held, tries, said) -> None:
    """A file that the server does not have is requested only once; a busy server is asked TRIES times."""
    with corpora.Server(archives if held else {}, ["busy"] * 50) as server:
        assert main(arguments(tmp_path, server.url, archives)) == 2
    assert len(server.asked) == tries and said in capsys.readouterr().err


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_part_that_is_whole_or_too_long_is_settled(tmp_path: Path, archives, more: bytes) -> None:
    name = "dev-clean.tar.gz"
    part = tmp_path / "out" / ".prepare" / f"{name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(archives[name] + more)
    with corpora.Server(archives) as server:
        assert main(arguments(tmp_path, server.url, {name: archives[name]})) == 0
    assert [wanted for _, wanted in server.asked] == [f"bytes={len(archives[name] + more)}-", *([None] if more else [])]


@pytest.mark.parametrize("kind", corpora.hostile_members())
def test_hostile_members_are_one_line_errors(tmp_path: Path, capsys, kind: str) -> None:
    member = corpora.hostile_members()[kind]
    given = of_folder(tmp_path, "dev-clean", corpora.archive("dev-clean", corpora.utterances(2), [member]))
    before = corpora.tree(tmp_path)
    assert main(given) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "dev-clean.tar.gz" in last and repr(member.name) in last
    assert corpora.tree(tmp_path) == before
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("cut", [0, 40, 0.5, 0.99])
def test_a_damaged_archive_is_a_one_line_error(tmp_path: Path, archives, capsys, cut: float) -> None:
    content = archives["dev-clean.tar.gz"]
    content = content[: int(cut * len(content)) if isinstance(cut, float) else cut]
    assert main(of_folder(tmp_path, "dev-clean", content)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "dev-clean.tar.gz" in error and "tar" in error
    assert not (tmp_path / "out" / "dev-clean.jsonl").exists()


def test_a_full_disk_is_a_one_line_error_and_the_run_goes_on_later(tmp_path: Path, archives, capsys, monkeypatch):
    with corpora.Server(archives) as server:
        given = arguments(tmp_path, server.url, archives)
        free = shutil.disk_usage(tmp_path)._replace(free=1000)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _: free)
            assert main(given) == 2
        assert "are free" in capsys.readouterr().err.splitlines()[-1] and server.asked == []

        for module, name in ((unpack.shutil, "copyfileobj"), (writing.os, "replace")):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
                assert main(given) == 2
            assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
        assert main(given) == 0


def test_a_copy_for_which_there_is_no_room_is_named_not_its_original(tmp_path: Path) -> None:
    original, (soft, hard) = tmp_path / "x" / "a.flac", resource.getrlimit(resource.RLIMIT_FSIZE)
    original.parent.mkdir()
    soundfile.write(original, np.zeros(16000), 16000)
    copy = copies.Copy(1.0, ".wav")
    target = copy.path(original, original.parent)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(writing.PrepareError, match=rf"{target}: File too large"):
            copies.make(original, copy, target, tmp_path / "work")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert copies.make(original, copy, target, tmp_path / "work") == 1.0


def test_missing_pieces_are_named(tmp_path: Path, capsys) -> None:
    spoken = corpora.utterances(3)
    name = sorted(spoken)[1]
    spoken[name] = b"not audio", "TEXT"
    assert main(of_folder(tmp_path, "dev-clean", corpora.archive("dev-clean", spoken))) == 2
    assert f"{name}.flac" in capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "out" / "LibriSpeech" / "dev-clean"
    next(folder.rglob(f"{name}.flac")).unlink()
    with pytest.raises(writing.PrepareError, match=f"1 utterances have no audio, e.g. {name}"):
        librispeech.spoken(folder)
    for listing in folder.rglob("*.trans.txt"):
        listing.write_text("")
    with pytest.raises(writing.PrepareError, match="have no text"):
        librispeech.spoken(folder)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sets", "dev-dirty", "--source", "."], "no set 'dev-dirty'"),
        (["--sets", "../x", "--source", "."], "not the name of a set"),
        (["--sets", "dev-clean", "--source", "no/such/folder"], "no such archive"),
        (["--speeds", "9"], "between 0.25 and 4"),
        (["--checksums", "absent.txt"], "absent.txt"),
        (["--checksums", "sums", "--sets", "mine"], "no set 'mine'"),  # an unknown set needs a source too
    ],
)
def test_wrong_wishes_are_told_before_anything_is_done(tmp_path, capsys, monkeypatch, more: list[str], said: str):
    monkeypatch.chdir(tmp_path)
    Path("sums").write_text(f"{'0' * 32}  mine.tar.gz\n")
    assert main(["prepare", "librispeech", "--out", str(tmp_path / "out"), *more]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_second_run_in_the_same_folder_is_kept_out(tmp_path: Path, archives, capsys) -> None:
    with writing.alone_in(tmp_path / "out"), corpora.Server(archives) as server:
        assert main(arguments(tmp_path, server.url, archives)) == 2
    assert "another run" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_random_points_it_finishes_to_the_same_bytes(tmp_path: Path) -> None:
    spoken = corpora.real_utterances(8) if corpora.speech_folder() else corpora.utterances(30)
    names = sorted(spoken)
    halves = {"dev-clean": names[::2], "train-clean-100": names[1::2]}
    archives = {f"{s}.tar.gz": corpora.archive(s, {n: spoken[n] for n in half}) for s, half in halves.items()}
    rng, context = random.Random(0), multiprocessing.get_context("fork")  # a forked process starts fast
    with corpora.Server(archives, slow=0.4 * 4096 / max(map(len, archives.values()))) as server:
        folders = {}
        for name in ("undisturbed", "killed"):
            (tmp_path / name).mkdir()
            folders[name] = arguments(tmp_path / name, server.url, archives, "--speeds", "0.9", "1.1", "--jobs", "2")
        started = time.perf_counter()
        assert main(folders["undisturbed"]) == 0
        took = time.perf_counter() - started
        for _ in range(20):
            process = context.Process(target=main, args=(folders["killed"],))
            process.start()
            process.join(rng.uniform(0.02, 0.6) * took)
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        assert main(folders["killed"]) == 0
    assert corpora.tree(tmp_path / "killed") == corpora.tree(tmp_path / "undisturbed")
