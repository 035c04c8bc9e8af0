"""Reads utterances from WebDataset's tar files. They contain audio such as NAME.flac with NAME.txt or NAME.json, and no
manifest."""

import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jasper_fast.data import manifest, places
from jasper_fast.data.prepare.writing import PrepareError
from jasper_fast.speech import audio
from jasper_fast.speech.audio import SOUNDS, AudioError

TEXTS = ("txt", "lab", "trn", "transcript")


def seconds_of(file: Path | audio.Memory, report: Callable[[str], None]) -> float | None:
    """Returns the length of an audio file in seconds, from its header. Returns None, after a report, if the header
    cannot be read."""
    try:
        return round(audio.duration(file), 6)
    except AudioError as error:
        report(str(error))
        return None


def named(source: str) -> list[str]:
    """Returns the tars that a source names (a folder, path, pattern or URL), or an empty list if it names none."""
    if not places.is_url(source) and os.path.isdir(source):
        return sorted(str(path) for path in Path(source).glob("*.tar"))
    return [tar for tar in places.expanded(source) if tar.endswith(".tar")]


def entries(source: str, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields a manifest entry for each sample with audio and text. The entry has the byte range of the audio in the
    tar.

    ``report`` is called with a message for each sample that is left out. Raises PrepareError if ``source`` names
    no tar, and for a file that is not a complete, uncompressed tar.
    """
    tars = named(source)
    if not tars:
        raise PrepareError(f"{source}: there is no *.tar")
    for shard, tar in enumerate(tars):
        try:
            with places.opened(tar) as file:
                yield from _of_tar(tar, shard, file, report)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise PrepareError(f"{tar}: not a complete, uncompressed tar file: {error}") from error


def _of_tar(tar: str, shard: int, file: BinaryIO, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=file, mode="r|") as opened:
        for key, sample in itertools.groupby((m for m in opened if m.isreg()), lambda m: _split(m.name)[0]):
            parts = {_split(m.name)[1]: (m, opened.extractfile(m).read()) for m in sample}
            if (entry := _entry(f"{tar}/{key}", parts, report)) is not None:
                yield entry | {"shard_id": shard, "tar": tar}


def _split(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot, as WebDataset does, and returns key and extension."""
    folder, _, last = name.rpartition("/")
    stem, _, end = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), end.lower()


def _entry(
    name: str, parts: dict[str, tuple[tarfile.TarInfo, bytes]], report: Callable[[str], None]
) -> dict[str, Any] | None:
    sound = next((end for end in parts if f".{end.rpartition('.')[2]}" in SOUNDS), None)
    try:
        metadata = json.loads(parts["json"][1]) if "json" in parts else {}
        metadata = metadata if isinstance(metadata, dict) else {}
        texts = (parts[end][1].decode("utf-8-sig") for end in TEXTS if end in parts)
        text = next(texts, None) or metadata.get("text") or metadata.get("transcript")
    except (ValueError, RecursionError) as error:
        report(f"{name}: {error}")
        return None
    if sound is None or not isinstance(text, str):
        report(f"{name}: {'no audio' if sound is None else 'no text'} among {', '.join(sorted(parts))}")
        return None
    member, data = parts[sound]
    if (seconds := seconds_of(audio.Memory(f"{name}.{sound}", data), report)) is None:
        return None
    speaker = str(metadata.get("speaker") or metadata.get("speaker_id") or "")
    return manifest.entry(member.name, seconds, " ".join(text.split()), speaker=speaker) | {
        "tar_start": member.offset_data,
        "tar_size": member.size,
    }
