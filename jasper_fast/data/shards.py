"""Finds and reads utterances packed in tar files (shards), as NeMo and WebDataset write them.

Each utterance is read from its byte range of the shard; the library `webdataset` would read the shard from front to
back. With byte ranges the batches of an epoch depend only on its number and the seed, utterances of similar length
share a batch, and a run can resume at any step with any number of processes. The sampler uses few shards at a time, and
all utterances that a batch needs from an object store are requested together.
"""

import functools
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from jasper_fast.data import places
from jasper_fast.speech.audio import AudioError, Memory


class Packed(NamedTuple):
    """The place of an utterance's file: ``size`` bytes from byte ``start`` of the shard ``tar`` (path or URL)."""

    tar: str
    start: int
    size: int

    def read(self, name: str) -> Memory:
        """Reads the file into memory. Raises AudioError if the shard cannot be read or ends too early."""
        try:
            if places.is_url(self.tar):
                data = places.read(self.tar, self.start, self.start + self.size)
            else:
                with open(self.tar, "rb", buffering=0) as file:
                    data = os.pread(file.fileno(), self.size, self.start)
        except (OSError, ValueError) as error:
            raise AudioError(name, f"the shard cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if len(data) < self.size:
            raise AudioError(name, f"the shard ends {self.size - len(data)} bytes before the utterance does")
        if len(data) > self.size:
            raise AudioError(name, f"the server of {self.tar} cannot send a part of a file, which shards need")
        return Memory(name, data)


def fetch(packed: Iterable[Packed]) -> dict[Packed, bytes]:
    """Returns the bytes of those files that lie in object stores, requested from each store all at the same time. Files
    that cannot be read are left out; ``Packed.read`` then raises the error."""
    # by file system: the files in it, and the path there of the shard of each
    groups: dict[Any, dict[Packed, str]] = defaultdict(dict)
    for each in dict.fromkeys(p for p in packed if places.is_url(p.tar)):
        try:
            files, path = places.files_of(each.tar)
        except OSError:
            continue
        groups[files][each] = path
    found: dict[Packed, bytes] = {}
    for files, mine in groups.items():
        data = files.cat_ranges(
            [*mine.values()], [p.start for p in mine], [p.start + p.size for p in mine], on_error="return"
        )
        found |= {p: d for p, d in zip(mine, data, strict=True) if isinstance(d, bytes) and len(d) == p.size}
    return found


def locate(entry: dict[str, Any], root: str) -> tuple[str, Packed]:
    """Returns the name of a manifest entry that has ``shard_id``, and its place in its shard.

    The shard is the entry's ``tar``, if it has one. Otherwise it is audio_N.tar in the folder ``root``, where N is
    ``shard_id``, or, if ``root`` is a pattern (audio__OP_0..127_CL_.tar), the pattern's path number N (from 0 on). The
    file is ``tar_size`` bytes from byte ``tar_start`` on, as `prepare shards` writes them. Without these keys, as in
    NeMo's manifests, the file is looked up in the shard by its name. Raises KeyError, TypeError, ValueError or OSError
    for an invalid entry.
    """
    member, shard = str(entry["audio_filepath"]), entry["shard_id"]
    tars, folder = _tars(root)
    if "tar" in entry or not tars:
        tar = places.joined(folder, str(entry.get("tar", f"audio_{shard}.tar")))
    elif 0 <= int(shard) < len(tars):
        tar = tars[int(shard)]
    else:
        raise ValueError(f"shard_id {shard} is out of range: {root} names {len(tars)} shards")
    if "tar_start" in entry:
        start, size = int(entry["tar_start"]), int(entry["tar_size"])
        if start < 0 or size <= 0:
            raise ValueError(f"tar_start {start} must not be negative, and tar_size {size} must be positive")
        return f"{tar}/{member}", Packed(tar, start, size)
    found = members(tar)
    place = found.get(member) or found.get(_stem(member))
    if place is None:
        raise ValueError(f"{tar} does not contain {member}")
    return f"{tar}/{member}", Packed(tar, *place)


@functools.lru_cache(maxsize=8)
def _tars(root: str) -> tuple[list[str], str]:
    """Returns the shards that ``root`` names if it is a pattern of tar files, and the folder for other shards."""
    return (places.expanded(root), places.parent(root)) if root.endswith(".tar") else ([], root)


def _stem(member: str) -> str:
    """Returns the name by which NeMo finds a member: the file name without extension and part number (-sub2)."""
    return re.sub(r"-sub\d+$", "", os.path.splitext(os.path.basename(member))[0])


@functools.lru_cache(maxsize=8)
def members(tar: str) -> dict[str, tuple[int, int]]:
    """Returns start and size of each file in an uncompressed tar, under its full name and under the name that `_stem`
    returns.

    Raises OSError if the file cannot be read, and ValueError if it is not a complete, uncompressed tar.
    """
    try:
        with places.opened(tar) as file, tarfile.open(fileobj=file, mode="r:") as opened:
            whole = {m.name: (m.offset_data, m.size) for m in opened if m.isreg()}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar}: not a complete, uncompressed tar file ({error})") from error
    return {_stem(name): place for name, place in whole.items()} | whole
