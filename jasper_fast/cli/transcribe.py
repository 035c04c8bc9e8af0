"""`jasper-fast transcribe`: audio files to text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jasper_fast.cli import common
from jasper_fast.options import option

DESCRIPTION = """\
Writes one line per file to the standard output: the path, a tab, the text; with --json one JSON object per line, with
the words in time. Files of any rate and number of channels that libsndfile reads (WAV, FLAC, OGG, MP3, ...).
Messages go to the standard error. A file that cannot be read is reported there and left out."""
END = """\
exit status: 0 if at least one file was transcribed (with --strict: if all were), 1 otherwise, 2 for a wrong command,
checkpoint or configuration.

example: jasper-fast transcribe talk.wav call.flac --checkpoint runs/best.pt"""


HELP = "audio files to text"
OPTIONS = {
    "": [
        option("files", nargs="*", metavar="FILE", help="audio files"),
        option("--list", metavar="FILE", help="a text file that names more audio files, one a line ('-': stdin)"),
        option("--json", action="store_true", help="JSON lines with words, their times and confidences"),
        option("--out", metavar="FILE", help="write there instead of to the standard output"),
        option("--strict", action="store_true", help="exit with 1 if any file could not be read"),
    ],
    **common.MODEL,
}


def run(arguments: argparse.Namespace) -> int:
    from jasper_fast.data.manifest import Utterance
    from jasper_fast.speech import audio

    files = list(arguments.files)
    if arguments.list:
        source = sys.stdin.read() if arguments.list == "-" else Path(arguments.list).read_text(encoding="utf-8")
        files += filter(None, map(str.strip, source.splitlines()))
    if not files:
        raise common.UsageError("no files; name audio files, or a list of them with --list")
    common.check_writable(arguments.out)
    recognizer = common.load(arguments)
    utterances = []
    for file in files:
        try:
            seconds = audio.duration(file)
        except audio.AudioError:
            seconds = 0.0  # reading it will say why
        utterances.append(Utterance(file, seconds, ""))
    result = common.recognize(arguments, recognizer, utterances)
    line = _record if arguments.json else lambda file, transcript, seconds: f"{file}\t{transcript.text.strip()}"
    found = zip(files, result.transcripts, result.seconds, strict=True)
    lines = [line(file, transcript, seconds) for file, transcript, seconds in found if transcript is not None]
    text = "".join(f"{line}\n" for line in lines)
    if arguments.out:
        common.write(arguments.out, text)
    else:
        sys.stdout.write(text)
        sys.stdout.flush()
    if not arguments.quiet:
        print(common.speed(result), file=sys.stderr)
    return int(not lines or (arguments.strict and len(lines) < len(files)))


def _record(file: str, transcript: Any, seconds: float) -> str:
    words = [
        {"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3), "confidence": round(w.confidence, 4)}
        for w in transcript.words
    ]
    record = {"audio_filepath": file, "duration": round(seconds, 3), "pred_text": transcript.text.strip()}
    record |= {"confidence": round(transcript.confidence, 4), "words": words}
    return json.dumps(record, ensure_ascii=False)
