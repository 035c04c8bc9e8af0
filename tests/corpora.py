"""Corpora for tests: a tiny LibriSpeech in archives, a server that can misbehave, and the folder of real speech."""

import hashlib
import io
import json
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import soundfile

from jasper_fast.data.manifest import Utterance

ROOT = Path(__file__).resolve().parents[1]


def speech_folder() -> Path | None:
    """Returns the folder of real speech (JASPER_FAST_DATA, or ../shared/data), or None if it has no manifest."""
    folder = Path(os.environ.get("JASPER_FAST_DATA") or ROOT.parent / "shared" / "data")
    return folder if (folder / "librispeech_dev.jsonl").is_file() else None


def tone(seed: int, seconds: float = 0.5, form: str = "FLAC") -> bytes:
    """Returns an audio file of a tone with a sample rate of 16 kHz. `seed` chooses the pitch."""
    samples, file = 0.3 * np.sin(np.arange(round(seconds * 16000)) * (0.02 + 0.005 * (seed % 17))), io.BytesIO()
    soundfile.write(file, samples, 16000, format=form, subtype="PCM_16")
    return file.getvalue()


def written(folder: Path, count: int) -> list[Utterance]:
    """Writes `count` FLAC files of 0.3 s, 0.35 s, 0.4 s and so on, and returns their utterances."""
    made = [Utterance(str(folder / f"{i}.flac"), 0.3 + 0.05 * i, "a") for i in range(count)]
    for i, each in enumerate(made):
        Path(each.path).write_bytes(tone(i, each.duration))
    return made


def write_lines(path: Path, entries: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def write_spoken(path: Path, entries: list[dict], seed: int = 0) -> Path:
    """Writes a manifest, and the audio file of each entry: a tone. `seed` chooses the pitch of the first."""
    for i, entry in enumerate(entries, seed):
        file = path.parent / entry["audio_filepath"]
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(tone(i, entry["duration"], file.suffix[1:].upper()))
    return write_lines(path, entries)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def utterances(count: int) -> dict[str, tuple[bytes, str]]:
    """Returns the FLAC file and the text of `count` utterances by three speakers, by name."""
    return {f"{10 + i % 3}-{i // 3}-{i:04d}": (tone(i, 0.3 + 0.05 * i), f"WORD NUMBER {'I' * i}") for i in range(count)}


def real_utterances(count: int) -> dict[str, tuple[bytes, str]]:
    """Returns FLAC files and texts of real speech, by name. Skips the test if there is no real speech."""
    folder = speech_folder() or pytest.skip("no real speech: set JASPER_FAST_DATA to its folder")
    found = {}
    for entry in read_lines(folder / "librispeech_dev.jsonl")[:count]:
        path = folder / entry["audio_filepath"]
        found[path.stem] = path.read_bytes(), entry["text"].upper()
    return found


def archive(name: str, spoken: dict[str, tuple[bytes, str]], extra: list[tarfile.TarInfo] = ()) -> bytes:
    """Returns the archive `name`.tar.gz with the folders of LibriSpeech. The members in `extra` come first."""
    listings: dict[str, list[str]] = {}
    files = {"LibriSpeech/README.TXT": b"about\n"}
    for utterance, (audio, text) in spoken.items():
        speaker, chapter, _ = utterance.split("-")
        folder = f"LibriSpeech/{name}/{speaker}/{chapter}"
        files[f"{folder}/{utterance}.flac"] = audio
        listings.setdefault(f"{folder}/{speaker}-{chapter}.trans.txt", []).append(f"{utterance} {text}\n")
    files |= {path: "".join(lines).encode() for path, lines in listings.items()}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for member in extra:
            tar.addfile(member)
        for path, content in files.items():
            add(tar, path, content)
    return out.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def prepare_arguments(folder: Path, source: str, archives: dict[str, bytes], *more: str) -> list[str]:
    """Returns the command that prepares these archives in the folder "out" of `folder`. Also writes the file of MD5
    sums that the command names."""
    sums = folder / "md5sum.txt"
    sums.write_text("".join(f"{md5(content)}  {name}\n" for name, content in archives.items()))
    return [
        "prepare", "librispeech", "--out", str(folder / "out"), "--source", source, "--checksums", str(sums),
        "--sets", *(name.removesuffix(".tar.gz") for name in archives), "-q", *more,
    ]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers the requests to a `Server`."""

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        fault = server.faults.pop(0) if server.faults else ""
        server.asked.append((self.path, wanted))
        content = server.files.get(self.path.rpartition("/")[2])
        if content is None or fault == "busy":
            self.send_error(404 if content is None else 503)
            return
        if fault == "empty":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        first = int(wanted[6:-1]) if wanted and fault != "whole" else 0
        if first >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        if first:
            stated = first + (fault == "shift")
            self.send_header("Content-Range", f"bytes {stated}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        body = bytearray(content[first:])
        if fault == "corrupt":
            body[len(body) // 2] ^= 1
        end = len(body) // 2 if fault == "break" else len(body)
        for at in range(0, end, 4096):
            self.wfile.write(body[at : min(at + 4096, end)])
            if server.slow:
                time.sleep(server.slow)


class Server(ThreadingHTTPServer):
    """An HTTP server of `files` on this machine, which supports byte ranges. Each answer takes the next of `faults`:

    "break" sends half of the bytes, "corrupt" flips a bit, "busy" answers 503, "whole" ignores the range, "empty"
    closes the connection without an answer, and "shift" states a range that begins one byte too late. "" is no fault.
    The server waits `slow` seconds after each 4 KiB.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], faults: list[str] = (), slow: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.slow, self.asked = files, list(faults), slow, []
        self.url = f"http://127.0.0.1:{self.server_port}/mirror"

    def handle_error(self, *_) -> None:  # the client was killed
        pass

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


def tree(folder: Path) -> dict[str, str]:
    """Returns the MD5 of every file in a folder, hidden files too, by relative path."""
    return {str(p.relative_to(folder)): md5(p.read_bytes()) for p in sorted(folder.rglob("*")) if not p.is_dir()}


def hostile_members() -> dict[str, tarfile.TarInfo]:
    """Returns a tar member of each kind that must not be unpacked, by the name of the kind."""
    names = {"parent": "LibriSpeech/dev-clean/../../evil", "absolute": "/tmp/evil", "dots": "../evil"}
    found = {kind: tarfile.TarInfo(name) for kind, name in names.items()}
    for kind, number in (("symlink", tarfile.SYMTYPE), ("hardlink", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)):
        found[kind] = tarfile.TarInfo("LibriSpeech/dev-clean/link")
        found[kind].type, found[kind].linkname = number, "/etc/passwd"
    return found
