"""Utterances packed in tar files, as in NeMo and WebDataset: the place of each, and its bytes.

A shard is read at the place of an utterance, not from front to back as the library `webdataset` does it: so the plan of
an epoch stays a function of its seed, batches hold utterances of like length, and a run goes on from any step with any
number of processes. The sampler keeps to a few shards at a time; what a batch takes from an object store is asked for
together.
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from jasper_fast.data import places
from jasper_fast.speech.audio import AudioError, Memory


class Packed(NamedTuple):
    """The place of an utterance's file: ``size`` bytes from byte ``start`` of ``tar``, a path or a URL."""

    tar: str
    start: int
    size: int

    def read(self, name: str) -> Memory:
        """The file, in memory. Raises AudioError where the shard does not hold it."""
        try:
            remote = places.is_url(self.tar)
            data = places.read(self.tar, self.start, self.start + self.size) if remote else _read_file(self)
        except (OSError, ValueError) as error:
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


def fetch(packed: Iterable[Packed]) -> dict[Packed, bytes]:
    """The bytes of those that lie in object stores, asked for together. Those that fail are left out: reading one by
    itself says why."""
    groups: dict[int, tuple[Any, list[Packed], list[str]]] = {}
    for each in dict.fromkeys(p for p in packed if places.is_url(p.tar)):
        try:
            files, path = places.files_of(each.tar)
        except OSError:
            continue
        _, mine, paths = groups.setdefault(id(files), (files, [], []))
        mine.append(each)
        paths.append(path)
    found: dict[Packed, bytes] = {}
    for files, mine, paths in groups.values():
        ends = [p.start + p.size for p in mine]
        data = files.cat_ranges(paths, [p.start for p in mine], ends, on_error="return")
        found |= {p: d for p, d in zip(mine, data, strict=True) if isinstance(d, bytes)}
    return found


def locate(entry: dict[str, Any], root: str) -> tuple[str, Packed]:
    """Name and place of a manifest's entry that has ``shard_id``: in ``tar`` from byte ``tar_start`` on ``tar_size``
    bytes, as `prepare shards` writes it, else found in the shard of that number, as of NeMo: audio_SHARD.tar in
    ``root``, or if that is a pattern (audio__OP_0..127_CL_.tar) the path of that number in it.

    Raises KeyError, TypeError, ValueError or OSError for an entry that is none.
    """
    member, shard = str(entry["audio_filepath"]), entry["shard_id"]
    tars, folder = _tars(root)
    if "tar" in entry or not tars:
        tar = places.joined(folder, str(entry.get("tar", f"audio_{shard}.tar")))
    elif 0 <= int(shard) < len(tars):
        tar = tars[int(shard)]
    else:
        raise ValueError(f"shard_id {shard}: {root} names {len(tars)} shards")
    if "tar_start" in entry:
        start, size = int(entry["tar_start"]), int(entry["tar_size"])
        if start < 0 or size <= 0:
            raise ValueError(f"tar_start {start} and tar_size {size} are no place in a tar")
        return f"{tar}/{member}", Packed(tar, start, size)
    found = members(tar)
    place = found.get(member) or found.get(_stem(member))
    if place is None:
        raise ValueError(f"{tar} holds no {member}")
    return f"{tar}/{member}", Packed(tar, *place)


@functools.lru_cache(maxsize=8)
def _tars(root: str) -> tuple[list[str], str]:
    """The shards that ``root`` names, if it is a pattern, and the folder of shards that it does not name."""
    return (places.expanded(root), places.parent(root)) if root.endswith(".tar") else ([], root)


def _stem(member: str) -> str:
    """By what NeMo finds a member: its name without folders, its end, and the number of a part of it (-sub2)."""
    return re.sub(r"-sub\d+$", "", os.path.splitext(os.path.basename(member))[0])


@functools.lru_cache(maxsize=8)
def members(tar: str) -> dict[str, tuple[int, int]]:
    """Start and size of each file in a tar that is not compressed, by name and by name without folders and end.

    Raises OSError or, for another file, ValueError.
    """
    try:
        with places.opened(tar) as file, tarfile.open(fileobj=file, mode="r:") as opened:
            whole = {m.name: (m.offset_data, m.size) for m in opened if m.isreg()}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar}: not a whole tar file without compression ({error})") from error
    return {_stem(name): place for name, place in whole.items()} | whole
