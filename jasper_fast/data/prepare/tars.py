"""Utterances in tar files without a manifest, as WebDataset writes them: NAME.flac beside NAME.txt or NAME.json."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jasper_fast.data import places
from jasper_fast.data.prepare.writing import PrepareError
from jasper_fast.speech import audio
from jasper_fast.speech.audio import SOUNDS, AudioError

TEXTS = ("txt", "lab", "trn", "transcript")


def named(source: str) -> list[str]:
    """The tars that a source names: a folder, a path, a pattern or a URL; empty if it is no such source."""
    if not places.is_url(source) and os.path.isdir(source):
        return sorted(str(path) for path in Path(source).glob("*.tar"))
    return [tar for tar in places.expanded(source) if tar.endswith(".tar")]


def entries(source: str, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """An entry for each sample with audio and text, with its place, so that it is read from the tar as it lies.

    ``report`` takes a line for each sample that is left out. Raises PrepareError naming a file that is no tar.
    """
    tars = named(source)
    if not tars:
        raise PrepareError(f"{source}: names no *.tar")
    for shard, tar in enumerate(tars):
        try:
            with places.opened(tar) as file:
                yield from _of_tar(tar, shard, file, report)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise PrepareError(f"{tar}: not a whole tar file without compression: {error}") from error


def _of_tar(tar: str, shard: int, file: BinaryIO, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=file, mode="r|") as opened:
        members = (m for m in opened if m.isreg())
        for key, sample in itertools.groupby(members, lambda m: _split(m.name)[0]):
            parts = {_split(m.name)[1]: (m, opened.extractfile(m).read()) for m in sample}
            entry = _entry(f"{tar}/{key}", parts, report)
            if entry is not None:
                yield entry | {"shard_id": shard, "tar": tar}


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member: WebDataset parts names at the first dot."""
    folder, _, last = name.rpartition("/")
    stem, _, end = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), end.lower()


def _entry(
    name: str, parts: dict[str, tuple[tarfile.TarInfo, bytes]], report: Callable[[str], None]
) -> dict[str, Any] | None:
    sound = next((end for end in parts if f".{end.rpartition('.')[2]}" in SOUNDS), None)
    try:
        told = json.loads(parts["json"][1]) if "json" in parts else {}
        told = told if isinstance(told, dict) else {}
        texts = (parts[end][1].decode("utf-8-sig") for end in TEXTS if end in parts)
        text = next(texts, None) or told.get("text") or told.get("transcript")
    except (ValueError, RecursionError) as error:
        report(f"{name}: {error}")
        return None
    if sound is None or not isinstance(text, str):
        report(f"{name}: {'no audio' if sound is None else 'no text'} among {', '.join(sorted(parts))}")
        return None
    member, data = parts[sound]
    try:
        seconds = audio.duration(audio.Memory(f"{name}.{sound}", data))
    except AudioError as error:
        report(str(error))
        return None
    entry = {"audio_filepath": member.name, "duration": round(seconds, 6), "text": " ".join(text.split())}
    speaker = told.get("speaker") or told.get("speaker_id")
    entry |= {"speaker": str(speaker)} if speaker else {}
    return entry | {"tar_start": member.offset_data, "tar_size": member.size}
