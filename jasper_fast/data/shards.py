"""Utterances packed in tar files, as in NeMo and WebDataset: the place of each, and its bytes.

A shard is read at the place of an utterance, so that the plan of an epoch stays a function of its seed, and a run goes
on from any step; the sampler keeps to a few shards at a time.
"""

from __future__ import annotations

import functools
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from jasper_fast.extras import need
from jasper_fast.speech.audio import AudioError, Memory


class Packed(NamedTuple):
    """The place of an utterance's file: ``size`` bytes from byte ``start`` of ``tar``, a path or a URL."""

    tar: str
    start: int
    size: int

    def read(self, name: str) -> Memory:
        """The file, in memory. Raises AudioError where the shard does not hold it."""
        try:
            data = _read_url(self) if "://" in self.tar else _read_file(self)
        except (OSError, ValueError, ImportError) as error:
            raise AudioError(name, f"the shard cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if len(data) < self.size:
            raise AudioError(name, f"the shard ends {self.size - len(data)} bytes before the utterance does")
        return Memory(name, data)


def _read_file(packed: Packed) -> bytes:
    descriptor = os.open(packed.tar, os.O_RDONLY)
    try:
        return os.pread(descriptor, packed.size, packed.start)
    finally:
        os.close(descriptor)


def _read_url(packed: Packed) -> bytes:
    files, path = need("fsspec.core", "train").url_to_fs(packed.tar)
    return files.cat_file(path, start=packed.start, end=packed.start + packed.size)


def locate(entry: dict[str, Any], root: Path) -> tuple[str, Packed]:
    """Name and place of a manifest's entry that has ``shard_id``: in ``tar`` from byte ``tar_start`` on ``tar_size``
    bytes, as `prepare shards` writes it, else found in audio_SHARD.tar beside the manifest, as of NeMo.

    Raises KeyError, TypeError, ValueError or OSError for an entry that is none.
    """
    member = str(entry["audio_filepath"])
    tar = str(entry.get("tar", f"audio_{entry['shard_id']}.tar"))
    place = tar if "://" in tar else str(root / tar)
    if "tar_start" in entry:
        start, size = int(entry["tar_start"]), int(entry["tar_size"])
        if start < 0 or size <= 0:
            raise ValueError(f"tar_start {start} and tar_size {size} are no place in a tar")
        return f"{place}/{member}", Packed(place, start, size)
    found = members(place).get(member)
    if found is None:
        raise ValueError(f"{place} holds no {member}")
    return f"{place}/{member}", Packed(place, *found)


@functools.lru_cache(maxsize=8)
def members(tar: str) -> dict[str, tuple[int, int]]:
    """Start and size of each file in a tar that is not compressed, by name. Raises ValueError for another file."""
    try:
        with tarfile.open(tar, "r:") as opened:
            return {m.name: (m.offset_data, m.size) for m in opened if m.isreg()}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar}: not a complete, uncompressed tar file ({error})") from error
