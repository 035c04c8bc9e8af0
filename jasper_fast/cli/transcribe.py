"""`jasper-fast transcribe`: transcribe audio files.

Writes one line per file to the standard output: the path, a tab, and the text. With --json each line is a JSON object
that also has the times of the words. Reads all formats of libsndfile (WAV, FLAC, OGG, MP3, ...), at any sample rate
from 1 kHz and with any number of channels. Lines are written in UTF-8, in the order of the files. Bytes of a file name
that are not UTF-8 are written unchanged (in JSON as \\udcXX).

Messages go to the standard error. A file that cannot be used is reported there, with the reason, and left out. If a
file is shorter than its header says, the available audio is transcribed, with a warning.

To continue an interrupted run, repeat the command with --resume. Files that have a line in --out are not transcribed
again, an incomplete last line is dropped, and files that could not be used are tried again. Under torchrun
(torchrun --nproc-per-node 8 -m jasper_fast transcribe ...) the processes share the files, and the first process writes
the output.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.cli import common
from jasper_fast.options import option

if TYPE_CHECKING:
    from jasper_fast.data.manifest import Utterance
    from jasper_fast.inference.recognizer import Recognizer
    from jasper_fast.training.runs import Ranks

END = """\
exit status: 0 if at least one file was transcribed (with --strict: if all were), 1 otherwise, 2 for a wrong command,
checkpoint or configuration.

examples:
  jasper-fast transcribe talk.wav call.flac --checkpoint runs/best.pt
  jasper-fast transcribe talk.wav --checkpoint runs/best.pt --lm 4-gram.arpa.gz --json --n-best 5"""


# Files are sorted by length in groups of this many batches. Large groups save padding, small ones give output earlier.
_WINDOW = 8
OPTIONS = {
    "": [
        option("files", nargs="*", metavar="FILE", help="audio files, or folders of them"),
        option("--list", metavar="FILE", help="text file with the names of more audio files, one per line; -: stdin"),
        option("--json", action="store_true", help="print JSON lines with words, their times and confidences"),
        option("--out", metavar="FILE", help="write to this file instead of the standard output"),
        option("--resume", action="store_true", help="keep the lines in --out and transcribe only the other files"),
        option("--strict", action="store_true", help="exit with 1 if any file was not transcribed"),
    ],
    **common.DECODING,
    **common.MODEL,
}


_STDIN = {"/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"}


def run(arguments: argparse.Namespace) -> int:
    with common.joined(arguments) as share:
        return _run(arguments, share)


def _run(arguments: argparse.Namespace, share: Ranks) -> int:
    from jasper_fast.data.manifest import Utterance

    files = [file for name in arguments.files for file in (_audio_below(name) if os.path.isdir(name) else [name])]
    if arguments.list == "-" and share.world > 1:
        raise common.UsageError("--list -: under torchrun only one process could read the standard input; name a file")
    if arguments.list:
        source = sys.stdin.buffer.read() if arguments.list == "-" else Path(arguments.list).read_bytes()
        lines = source.decode("utf-8-sig", "surrogateescape").split("\n")
        files += filter(None, (line.strip(" \t\r") for line in lines))
    if not files:
        raise common.UsageError("no files; name audio files, or with --list a file that lists them")
    if arguments.workers and (own := _STDIN & set(files)):
        raise common.UsageError(f"--workers: other processes cannot read {min(own)}; leave --workers out")
    if arguments.resume and not arguments.out:
        raise common.UsageError("--resume continues the file of --out; give --out too")
    if arguments.n_best and arguments.n_best > 1 and not arguments.json:
        raise common.UsageError(f"--n-best {arguments.n_best}: only JSON has room for several texts; give --json too")
    common.check_writable(arguments.out)
    kept = _finished(Path(arguments.out), arguments.json) if arguments.resume and share.first else Counter()
    kept = share.gather(kept)[0]
    every, written = len(files), kept.total()
    files = [file for file in files if not _take(kept, _name(file, arguments.json))]
    if not files:
        return 0
    recognizer = common.load(arguments)
    utterances = [Utterance(file, _seconds(file), "") for file in files]
    line = _record if arguments.json else lambda file, transcript, _: f"{_name(file)}\t{transcript.text.strip()}"
    # JSON shows a byte that is not UTF-8 as \udcXX. In plain text it is written unchanged.
    errors = "backslashreplace" if arguments.json else "surrogateescape"
    with _output(arguments, share) as out:
        for found, speed in _heard(arguments, share, recognizer, utterances):
            summary = speed
            for i, transcript, seconds in found:
                if transcript is not None:
                    out.write(f"{line(files[i], transcript, seconds)}\n".encode("utf-8", errors))
                    written += 1
            out.flush()
    if not arguments.quiet:
        print(summary, file=sys.stderr)
    return int(not written or (arguments.strict and written < every))


def _heard(
    arguments: argparse.Namespace, share: Ranks, recognizer: Recognizer, utterances: Sequence[Utterance]
) -> Iterator[tuple[list[tuple[int, Any, float]], str]]:
    """Yields new results after each batch (with several processes: after each group of files, on every process): a list
    of (index, transcript, seconds) in the order of the utterances, and a line with the speed so far. The transcript of
    a skipped utterance is None."""
    if share.world == 1:
        done = 0
        for result in common.recognize(arguments, recognizer, utterances, _WINDOW * arguments.batch_size):
            found = [(i, result.transcripts[i], result.seconds[i]) for i in range(done, result.done)]
            yield found, common.speed(result)
            done = result.done
        return
    started, heard = time.perf_counter(), 0.0
    size = _WINDOW * arguments.batch_size * share.world
    for start in range(0, len(utterances), size):
        part = utterances[start : start + size]
        mine, found = common.share([u.seconds for u in part], share.rank, share.world), []
        if mine:
            *_, result = common.recognize(arguments, recognizer, [part[i] for i in mine])
            found = [(start + i, *each) for i, *each in zip(mine, result.transcripts, result.seconds, strict=True)]
        every = sorted((each for one in share.gather(found) for each in one), key=lambda each: each[0])
        heard += sum(seconds for _, _, seconds in every)
        took = time.perf_counter() - started
        yield every, f"{heard:.1f} s of audio in {took:.2f} s by {share.world} processes: RTFx {heard / took:.1f}"


def _seconds(file: str) -> float:
    from jasper_fast.speech import audio

    try:
        return audio.duration(file)
    except audio.AudioError:  # reported when the file is read
        return 0.0


def _audio_below(folder: str) -> list[str]:
    """Returns the audio files in a folder and its subfolders, sorted. Raises UsageError if there are none."""
    from jasper_fast.speech.audio import SOUNDS

    found = [str(path) for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in SOUNDS]
    if not found:
        raise common.UsageError(f"{folder}: contains no audio file ({', '.join(sorted(SOUNDS))})")
    return found


def _output(arguments: argparse.Namespace, share: Ranks) -> contextlib.AbstractContextManager[Any]:
    if not share.first:  # the first process writes for all
        return io.BytesIO()
    if arguments.out:
        return open(arguments.out, "ab" if arguments.resume else "wb")
    sys.stdout.flush()
    return contextlib.nullcontext(sys.stdout.buffer)


def _name(file: str, json: bool = False) -> str:
    """Returns the name as it is written: in plain text, a line break becomes \\n."""
    return file if json else file.replace("\n", "\\n")


def _take(kept: Counter[str], name: str) -> bool:
    """Takes one occurrence of a name from the counts. Returns whether there was one."""
    kept[name] -= 1
    return kept[name] >= 0


def _finished(out: Path, as_json: bool) -> Counter[str]:
    """Returns how often each file appears in the output file `out`. Removes an incomplete last line from `out`."""
    content = out.read_bytes() if out.exists() else b""
    if whole := content.rpartition(b"\n")[0]:
        whole += b"\n"
    names: Counter[str] = Counter()
    for number, line in enumerate(whole.decode("utf-8", "surrogateescape").split("\n")[:-1], 1):
        try:
            names[json.loads(line)["audio_filepath"] if as_json else line[: line.rindex("\t")]] += 1
        except (ValueError, TypeError, KeyError):
            raise common.UsageError(
                f"--out {out}, line {number} is not {'a record of --json' if as_json else 'a name, a tab and a text'}; "
                "the file was not changed"
            ) from None
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    return names


def _record(file: str, transcript: Any, seconds: float) -> str:
    return json.dumps({
        "audio_filepath": file,
        "duration": round(seconds, 3),
        "pred_text": transcript.text.strip(),
        "confidence": round(transcript.confidence, 4),
        "words": [
            {"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3), "confidence": round(w.confidence, 4)}
            for w in transcript.words
        ],
        **common.hypotheses(transcript),
    }, ensure_ascii=False)  # fmt: skip
