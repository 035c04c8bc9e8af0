"""`transcribe` on many files, some of them faulty: each fault is reported in one line, all other files are transcribed,
and after a kill `--resume` completes the output."""

import io
import json
import os
import random
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from test_cli import sweep, tiny_checkpoint  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("model")]
KILLED = """
import os, signal, sys
from jasper_fast.cli import command
from jasper_fast.inference.recognizer import Recognizer
original, left = Recognizer.begin, int(sys.argv[1])
def call(self, audio, lengths, keep=None):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, audio, lengths, keep)
Recognizer.begin = call
sys.exit(command.main(sys.argv[2:]))
"""


def wav(samples, rate=16000, format="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def good_file(i, rng):
    data = wav(sweep(rng.uniform(0.3, 1.2), 16000, rng), subtype="GSM610" if i % 20 == 3 else None)
    name = {5: b"\xff%d.wav", 6: "\u0451\u2028%d.wav".encode(), 7: b"line\\n%d.wav"}.get(i % 20, b"good%d.wav") % i
    return os.fsdecode(name), data[: len(data) // 2] if i % 20 == 9 else data


def odd_files(folder, copy):
    """Returns the names of twenty files that cannot be used, each with a part of the expected reason. Makes those files
    that have to exist."""
    nan, loud = np.full(800, 0.1), np.full(800, 0.1)
    nan[7], loud[7] = np.nan, 1e19
    noise = np.random.default_rng(0).uniform(-1, 1, 16000)
    flac, caf = wav(noise, format="FLAC"), wav(noise, format="CAF")
    contents = {
        "text": (b"no audio at all", "cannot be read as audio"),
        "empty": (b"", "empty file"),
        "headerless.raw": (bytes(1000), "cannot be read as audio"),
        "loud": (wav(loud, subtype="FLOAT"), "full scale is 1"),
        "nan": (wav(nan, subtype="FLOAT"), "1 of 800 samples are NaN"),
        "infinite": (wav(nan * np.inf, subtype="FLOAT"), "800 of 800 samples are NaN or infinite"),
        "nothing": (wav(np.zeros(0)), "has no samples"),
        "half.flac": (flac[: len(flac) // 2], "damaged"),
        "half.caf": (caf[: len(caf) // 2], "malformed"),
        "header": (wav(noise)[:12], "cannot be read as audio"),
        "slow": (wav(noise, 8), "8 Hz is too low"),
        "random.mp3": (b"\xff\xfb\x90" + bytes(noise.astype(np.int8)[:100]), "cannot be read as audio"),
        os.fsdecode(b"\xfe.wav"): (b"no audio", "cannot be read as audio"),
    }
    for name, (data, _) in contents.items():
        (folder / f"{copy}{name}").write_bytes(data)
    os.mknod(folder / f"{copy}socket", stat.S_IFSOCK | 0o600)
    (folder / f"{copy}folder").mkdir()
    (folder / f"{copy}loop").symlink_to(f"{copy}loop")
    os.mkfifo(folder / f"{copy}pipe")
    others = {
        f"{copy}missing.wav": "no such file",
        f"{copy}{'n' * 256}.wav": "File name too long",
        f"good{copy}.wav/a.wav": "Not a directory",
        f"{copy}socket": "neither a regular file nor a pipe",
        f"{copy}folder": "is a folder",
        f"{copy}loop": "symbolic links",
        f"{copy}pipe": "delivered no data",
    }
    return [*((f"{copy}{name}", reason) for name, (_, reason) in contents.items()), *others.items()]


def transcribe(folder, *argv, kill=None, check=True, **environment):
    """Runs `transcribe` in `folder`. With `kill`, the process kills itself when batch number `kill` + 1
    begins."""
    start = ["-m", "jasper_fast"] if kill is None else ["-c", KILLED, str(kill)]
    command = [sys.executable, *start, "transcribe", "--checkpoint", "model.pt", "--backend", "reference", *argv]
    environment |= {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, cwd=folder, env=os.environ | environment)
    assert not check or done.returncode == (0 if kill is None else -signal.SIGKILL), done.stderr.decode()
    return done


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_forty_odd_files_of_two_hundred_and_kills_at_random(tmp_path, form):
    rng, chance = np.random.default_rng(1), random.Random(1)
    good = [good_file(i, rng) for i in range(160)]
    for name, data in good:
        (tmp_path / name).write_bytes(data)
    odd = odd_files(tmp_path, 0) + odd_files(tmp_path, 1)
    names = [name for name, _ in good]
    for name, _ in odd:
        names.insert(chance.randrange(len(names)), name)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + os.fsencode("\r\n".join(names)))

    arguments = ["--list", "list.txt", "--batch-size", "4", *form]
    whole = transcribe(tmp_path, *arguments, "--out", "whole")
    lines = (tmp_path / "whole").read_bytes().split(b"\n")[:-1]
    given = (
        [json.loads(x)["audio_filepath"] for x in lines]
        if form
        else [os.fsdecode(x.rpartition(b"\t")[0]) for x in lines]
    )
    bad = {name for name, _ in odd}
    assert given == [name for name in names if name not in bad] and len(given) == 160 and len(bad) == 40
    said = whole.stderr.decode("utf-8").splitlines()
    for name, reason in odd:
        shown = name.encode("utf-8", "backslashreplace").decode()
        (line,) = [x for x in said if x.startswith("skipped (unreadable): ") and f": {shown}: " in x]
        assert reason in line
    assert sum(x.startswith("warning (truncated): ") for x in said) == 8
    if not form:
        assert transcribe(tmp_path, *arguments, "--strict", "--out", "again", check=False).returncode == 1

    kills = 0
    for _ in range(2 if form else 3):
        transcribe(tmp_path, *arguments, "--out", "parts", "--resume", kill=chance.randint(2, 12))
        part = (tmp_path / "parts").read_bytes()
        assert len(part) < (tmp_path / "whole").stat().st_size
        end = chance.randint(max(len(part) - 30, 0), len(part))  # as if the last line were half written
        (tmp_path / "parts").write_bytes(part[:end])
        kills += bool(part)
    assert kills
    transcribe(tmp_path, *arguments, "--out", "parts", "--resume")
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    before = (tmp_path / "parts").stat().st_mtime_ns
    transcribe(tmp_path, *map(os.fsencode, given), *form, "--out", "parts", "--resume")  # nothing is left to do
    assert (tmp_path / "parts").stat().st_mtime_ns == before


def test_names_pass_through_an_ascii_output(tmp_path):
    names = [b"\xff.wav", "\u0451.wav".encode(), b"two\nlines.wav"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(wav(np.full(8000, 0.1)))
    printed = transcribe(tmp_path, *names, PYTHONIOENCODING="ascii").stdout
    assert [x.partition(b"\t")[0] for x in printed.split(b"\n")[:-1]] == [*names[:2], b"two\\nlines.wav"]


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ("notes of mine\n", ["--out", "out"], b"line 1 is not a name, a tab and a text; the file was not changed"),
        ('{"audio_filepath": []}\n', ["--json", "--out", "out"], b"line 1 is not a record of --json"),
        ("", [], b"give --out too"),
    ],
)
def test_resume_refuses_what_it_did_not_write(tmp_path, content, options, told):
    (tmp_path / "out").write_text(content)
    done = transcribe(tmp_path, "a.wav", "--resume", *options, check=False)
    assert done.returncode == 2 and told in done.stderr
    assert (tmp_path / "out").read_text() == content
