"""Unpacks archives that are not trusted: a member outside the folder, a link or a device is an error."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from jasper_fast.data.prepare.writing import PrepareError, Progress, silent, whole, writing


class HostileArchive(PrepareError):
    """An archive would write outside its folder, or holds links or devices."""


_BAD = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


def parts_of(member: tarfile.TarInfo, archive: Path) -> tuple[str, ...]:
    """Returns the parts of a member's path. Raises HostileArchive if the path leads out of the folder, or if the member
    is neither a file nor a folder."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise HostileArchive(f"{archive}: the member {member.name!r} would lie outside the folder; get another copy")
    if not (member.isreg() or member.isdir()):
        raise HostileArchive(f"{archive}: the member {member.name!r} is a link or a device; only files are unpacked")
    return tuple(part for part in name.parts if part != ".")


def unpack(archive: Path, inside: str, folder: Path, progress: Progress = silent) -> int:
    """Unpacks the files under the path ``inside`` of a tar (plain or compressed) into ``folder``, and returns their
    number. Files from an earlier run are kept. Until a file is complete, it lies beside ``folder``. Raises PrepareError
    for a damaged or hostile archive."""
    wanted, count, size = PurePosixPath(inside).parts, 0, archive.stat().st_size
    try:
        with open(archive, "rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
            for member in tar:
                parts = parts_of(member, archive)
                if not member.isreg() or parts[: len(wanted)] != wanted or len(parts) == len(wanted):
                    continue
                target = folder.joinpath(*parts[len(wanted) :])
                count += 1
                progress(f"unpack {archive.name}", min(raw.tell(), size), size)
                if not (target.is_file() and target.stat().st_size == member.size):
                    _write(tar, member, target, folder)
                tar.members.clear()  # tarfile would keep all 150,000 members in memory
    except _BAD as error:
        why = " ".join(str(error).split())[:200]
        raise PrepareError(f"{archive}: not a complete tar archive ({why}); get another copy") from error
    if not count:
        raise PrepareError(f"{archive}: the archive has no file under {inside}")
    return count


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, folder: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise tarfile.ReadError(f"{member.name} has no content")
    with whole(target, folder.parent) as temporary, open(temporary, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        if file.tell() != member.size:
            raise tarfile.ReadError(f"{member.name} is cut off")


def move(folder: Path, target: Path) -> None:
    """Moves a finished folder to its place."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, target)
