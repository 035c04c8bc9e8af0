"""Reads the entries of corpora in other formats: folders, Kaldi, CSV and TSV, NVIDIA's JSON array, Lhotse's cuts."""

import csv
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jasper_fast.data import places
from jasper_fast.data.manifest import ManifestError, entry, read_manifest
from jasper_fast.data.prepare import tars
from jasper_fast.data.prepare.writing import PrepareError
from jasper_fast.speech.audio import SOUNDS

TEXTS = (".txt", ".lab", ".trn")
Entry = dict[str, Any]
Report = Callable[[str], None]  # called with a message for each utterance that is left out

_AUDIO_COLUMNS = ("path", "audio_filepath", "audio", "wav_filename", "file", "filename", "file_name", "wav", "mp3_path")
_TEXT_COLUMNS = ("sentence", "text", "transcript", "transcription", "normalized_text", "normalized_transcription")
_SPEAKER_COLUMNS = ("client_id", "speaker", "speaker_id", "spk_id")
_LONGEST_FIELD = 1 << 24  # characters in a field of a CSV file


def kind_of(name: str) -> str:
    """Returns the kind of a source: "folder", "kaldi", "csv", "lines", "lhotse" or "shards". Raises PrepareError if the
    source does not exist."""
    source = Path(name)
    if tars.named(name) and not (source / "wav.scp").is_file():
        return "shards"
    if places.is_url(name) or places.expanded(name) != [name]:
        return "lines"
    if source.is_dir():
        return "kaldi" if (source / "wav.scp").is_file() else "folder"
    if not source.is_file():
        raise PrepareError(f"{source}: no such file or folder")
    name = source.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        return "csv"
    first = next((line for _, line in _lines(source)), "")
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        found = None
    return "lhotse" if isinstance(found, dict) and {"supervisions", "recording"} & found.keys() else "lines"


def entries(source: str, kind: str, audio_dir: Path | None, report: Report) -> Iterator[Entry]:
    """Yields manifest entries: audio_filepath, duration, text and, if known, speaker and offset.

    ``audio_dir``: where relative paths of audio start (default: depends on the format). ``report`` is called with a
    message for each utterance that is left out. Raises PrepareError, which names the file (and the line or
    utterance, if one is at fault), for a source that is not in the format ``kind``.
    """
    if kind == "shards":
        return tars.entries(source, report)
    return _READERS[kind](source if kind == "lines" else Path(source), audio_dir, report)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the number and content of each line that is not blank. The file may be gzipped."""
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise PrepareError(f"{path}: cannot be read as text: {error}") from error


def _text_of(path: Path) -> str:
    return " ".join(word for _, line in _lines(path) for word in line.split())


# ------------------------------------------------------------------ a folder


def _folder(source: Path, audio_dir: Path | None, report: Report) -> Iterator[Entry]:
    """Reads a folder of audio files. The text of each is in a .txt, .lab or .trn beside it, or in a *.trans.txt
    (LibriSpeech) or metadata.csv (LJ Speech) in its folder or in a folder above."""
    listed: dict[Path, dict[str, str]] = {}
    found = 0
    for folder, folders, files in os.walk(source):
        folders.sort()
        here = Path(folder)
        listed[here] = dict(listed.get(here.parent, {}))
        for name in sorted(files):
            if name.endswith(".trans.txt"):
                listed[here] |= {n: t for n, _, t in (line.partition(" ") for _, line in _lines(here / name))}
            elif name == "metadata.csv":
                rows = [line.split("|") for _, line in _lines(here / name)]
                listed[here] |= {Path(row[0]).stem: row[-1] for row in rows if len(row) > 1}
        for name in sorted(files):
            path = here / name
            if path.suffix.lower() not in SOUNDS:
                continue
            found += 1
            beside = next((file for suffix in TEXTS if (file := path.with_suffix(suffix)).is_file()), None)
            text = _text_of(beside) if beside else listed[here].get(path.stem)
            if text is None:
                report(f"{path}: no text for it in {path.stem}.txt, .lab or .trn, *.trans.txt or metadata.csv")
            elif (seconds := tars.seconds_of(path, report)) is not None:
                yield entry(path, seconds, text, speaker=here.name if here != source else None)
    if not found:
        raise PrepareError(f"{source}: there is no audio ({', '.join(sorted(SOUNDS))}) and no wav.scp of Kaldi in it")


# ------------------------------------------------------------------ Kaldi


def _table(path: Path, least: int = 1) -> dict[str, str]:
    """Reads a Kaldi file. Returns a dict from the first word of each line to the rest of the line."""
    found = {}
    for number, line in _lines(path):
        key, *rest = line.split(maxsplit=1)
        if len(rest) < least:
            raise PrepareError(f"{path}, line {number}: expected a key and a value, got {line[:80]!r}")
        found[key] = rest[0].strip() if rest else ""
    return found


def _kaldi(source: Path, audio_dir: Path | None, report: Report) -> Iterator[Entry]:
    """Reads wav.scp and text of a Kaldi folder, and segments and utt2spk if they exist. Relative paths start at
    ``audio_dir``, the folder in which Kaldi was run. Without it, a file is looked for in ``source``, then in the
    current working directory."""
    recordings, texts = _table(source / "wav.scp"), _table(source / "text", 0)
    speakers = _table(source / "utt2spk") if (source / "utt2spk").is_file() else {}
    segments: dict[str, tuple[str, float, float]] = {name: (name, 0.0, 0.0) for name in recordings}
    if (source / "segments").is_file():
        segments = {}
        for name, rest in _table(source / "segments").items():
            try:
                recording, start, end = rest.split()[:3]
                segments[name] = recording, float(start), float(end)
            except ValueError:
                raise PrepareError(
                    f"{source / 'segments'}: {name}: expected a recording, its start and end, got {rest!r}"
                ) from None
    lengths: dict[str, float | None] = {}
    for name, (recording, start, end) in sorted(segments.items()):
        place = recordings.get(recording)
        if place is None or name not in texts:
            report(f"{source}: {name}: {'no text' if place is not None else f'no recording {recording} in wav.scp'}")
            continue
        path = _kaldi_path(place, source, audio_dir)
        if path is None:
            report(f"{source}: {name}: wav.scp has a command, not a file: {place[:60]}; convert it to a file first")
            continue
        if recording not in lengths:
            lengths[recording] = tars.seconds_of(path, report)
        whole = lengths[recording]
        if whole is None:
            continue
        seconds = (min(end, whole) if end > 0 else whole) - start  # 0 or -1 means the end of the recording
        if not (seconds > 0 and start >= 0):
            report(f"{source}: {name}: {start} s to {end} s is not within the audio, which has {whole} s")
            continue
        yield entry(path, round(seconds, 6), texts[name], offset=start, speaker=speakers.get(name))


def _kaldi_path(place: str, source: Path, audio_dir: Path | None) -> Path | None:
    """Returns the file that ``place``, the value in a line of wav.scp, names. The file may be in a command `flac ...
    FILE |` or `cat FILE |`. Returns None for any other command."""
    if place.endswith("|"):
        words = place.rstrip("| ").split()
        files = [word for word in words if Path(word).suffix.lower() in SOUNDS]
        if len(files) != 1 or words[0] not in ("flac", "cat"):
            return None
        place = files[0]
    if audio_dir is not None:
        return audio_dir / place
    return source / place if (source / place).is_file() else Path(place)


# ------------------------------------------------------------------ CSV and TSV


def _csv(source: Path, audio_dir: Path | None, report: Report) -> Iterator[Entry]:
    """Reads a table with a header. Audio is in ``audio_dir``; without it, in the folder of the table, or in the folder
    ``clips`` there (Common Voice)."""
    tabs = source.name.lower().removesuffix(".gz").endswith(".tsv")
    number = 0

    def lines() -> Iterator[str]:  # `rows.line_num` would not count blank lines
        nonlocal number
        for at, line in _lines(source):
            number = at
            yield f"{line}\n"

    csv.field_size_limit(_LONGEST_FIELD)
    # In Common Voice's TSV a quotation mark is part of the sentence.
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    rows = csv.DictReader(lines(), **quoting)
    try:
        rows.fieldnames = header = [(name or "").strip() for name in rows.fieldnames or []]
        sound, text, speaker = (
            next((name for name in names if name in header), None)
            for names in (_AUDIO_COLUMNS, _TEXT_COLUMNS, _SPEAKER_COLUMNS)
        )
        for column, what, known in ((sound, "audio", _AUDIO_COLUMNS), (text, "text", _TEXT_COLUMNS)):
            if column is None:
                names = ", ".join(header)[:200]
                raise PrepareError(f"{source}: its header has no column for {what} ({', '.join(known)}), only {names}")
        for row in rows:
            name, said = row[sound], row[text]
            if not name or said is None:
                report(f"{source}, line {number}: {'no audio' if not name else 'no text'}")
                continue
            path = _beside(name, source, audio_dir)
            if (seconds := tars.seconds_of(path, report)) is not None:
                yield entry(path, seconds, said.strip(), speaker=speaker and row[speaker])
    except csv.Error as error:
        raise PrepareError(f"{source}, line {number}: not a valid table: {error}") from error


def _beside(name: str, source: Path, audio_dir: Path | None) -> Path:
    if audio_dir is not None:
        return audio_dir / name
    try:
        return next(p for p in (source.parent / name, source.parent / "clips" / name) if p.is_file())
    except (StopIteration, ValueError, OSError):
        return source.parent / name


# ------------------------------------------------------------------ JSON


def _manifest(source: str, audio_dir: Path | None, report: Report) -> Iterator[Entry]:
    """Reads NeMo's JSON lines, or the JSON array of NVIDIA's Jasper. Of each entry's files one is used, at speed 1 if
    there is one."""
    try:
        utterances = read_manifest(source, audio_dir)
    except ManifestError as error:
        raise PrepareError(str(error)) from error
    shards: dict[str, int] = {}
    for u in utterances:
        if not (u.duration > 0 and math.isfinite(u.duration)):
            report(f"{u.name}: its duration is {u.duration} s")
            continue
        path, place = u.path, {}
        if u.packed:
            tar, start, size = u.packed
            path, number = path.removeprefix(f"{tar}/"), shards.setdefault(tar, len(shards))
            place = {"shard_id": number, "tar": tar, "tar_start": start, "tar_size": size}
        yield entry(path, u.duration, u.text, offset=u.offset, speaker=u.speaker) | place


def _lhotse(source: Path, audio_dir: Path | None, report: Report) -> Iterator[Entry]:
    """Reads Lhotse's cuts from JSON lines. Reports and leaves out a cut that is not one file with one supervision."""
    for number, line in _lines(source):
        where = f"{source}, line {number}"
        try:
            cut = json.loads(line)
            sources, supervisions = cut["recording"]["sources"], cut["supervisions"]
            if len(sources) != 1 or sources[0]["type"] != "file" or len(supervisions) != 1:
                report(f"{where}: {cut.get('id')}: the cut is not one file with one supervision")
                continue
            start, seconds = float(cut.get("start", 0.0)), float(cut["duration"])
            path, text = (audio_dir or Path()) / sources[0]["source"], supervisions[0]["text"]
            if not isinstance(text, str) or not (start >= 0 and 0 < seconds < math.inf):
                raise ValueError(f"text {text!r}, start {start}, duration {seconds}")
            speaker = str(supervisions[0].get("speaker") or "")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise PrepareError(f"{where}: not a valid cut of Lhotse: {what}") from error
        yield entry(path, seconds, text, offset=start, speaker=speaker)


_READERS = {"folder": _folder, "kaldi": _kaldi, "csv": _csv, "lines": _manifest, "lhotse": _lhotse}
