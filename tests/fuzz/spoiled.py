"""Runs the command line on damaged corpora: each run must end with a report, never with a traceback."""

import contextlib
import io
import json
import random
import tempfile
from pathlib import Path

from hostile import ARRAY, LINES, SOUNDS, damage, mutate, sound, time_limit

from jasper_fast.cli.command import main

TABLE = [["client_id", "path", "sentence"], ["s", "a.wav", 'one, "two"'], ["t", "b.wav", "three"], ["", "c.flac", ""]]
CUT = {
    "id": "c",
    "start": 0.1,
    "duration": 0.4,
    "supervisions": [{"text": "one", "speaker": "s"}],
    "recording": {"sources": [{"type": "file", "source": "a.wav"}]},
}
KALDI = {
    "wav.scp": "r a.wav\nq flac -cd b.wav |\n",
    "text": "u one\nv two\n",
    "utt2spk": "u s\nv s\n",
    "segments": "u r 0 0.01\nv q 0.01 -1\n",
}


def _row(cells: list[str], rng: random.Random) -> str:
    cells = [cell if rng.random() < 0.9 else rng.choice(["", '"', "x,y", "\0", "é", "a\nb"]) for cell in cells]
    return rng.choice([",", ",", "\t"]).join(cells[: rng.choice([3, 3, 3, 2, 1])])


def _content(kind: str, rng: random.Random) -> bytes:
    if kind == "table":
        content = "\n".join(_row(cells, rng) for cells in TABLE).encode()
    elif kind == "lhotse":
        content = "\n".join(json.dumps(mutate(CUT, rng)) for _ in range(2)).encode()
    elif rng.random() < 0.5:
        content = json.dumps(mutate(ARRAY, rng)).encode()
    else:
        content = "\n".join(json.dumps(mutate(line, rng)) for line in LINES).encode()
    return damage(content, rng) if rng.random() < 0.5 else content


def case(seed: int) -> None:
    rng = random.Random(seed)
    kind = rng.choice(["check", "check", "lines", "table", "lhotse", "kaldi"])
    with tempfile.TemporaryDirectory() as name, time_limit():
        folder = Path(name)
        for file in ("a.wav", "b.wav", "c.flac"):
            content = sound(*rng.choice(SOUNDS), rng.choice([1, 2]))
            (folder / file).write_bytes(damage(content, rng, 60) if rng.random() < 0.5 else content)
        source = folder / {"table": rng.choice(["t.csv", "t.tsv"]), "lhotse": "cuts.jsonl"}.get(kind, "m.json")
        if kind == "kaldi":
            source = folder / "kaldi"
            source.mkdir()
            for file, text in KALDI.items():
                (source / file).write_bytes(damage(text.encode(), rng) if rng.random() < 0.4 else text.encode())
        else:
            source.write_bytes(_content(kind, rng))
        printed = io.StringIO()
        printed.reconfigure = lambda **_: None
        command = ["check", str(source), "--clean", str(folder / "clean"), "--html", str(folder / "page")]
        if kind != "check":
            command = ["prepare", "manifest", str(source), "--out", str(folder / "clean"), "--audio-dir", str(folder)]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = main(command)
        output = printed.getvalue()
        assert status in (0, 1, 2) and output.strip(), f"status {status}, output {output!r}"
        assert status != 2 or source.name in output, f"the message does not name the file: {output}"
        assert status or kind == "check" or (folder / "clean").is_file()
