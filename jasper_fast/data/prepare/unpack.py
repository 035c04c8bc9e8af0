"""Unpacks untrusted archives: a member outside the folder, a link or a device is an error."""

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from jasper_fast.data.prepare.writing import PrepareError, Progress, whole


class HostileArchive(PrepareError):
    """An archive would write outside its folder, or contains links or devices."""


def parts_of(member: tarfile.TarInfo, archive: Path) -> tuple[str, ...]:
    """Returns the parts of a member's path. Raises HostileArchive if the path leads out of the folder, or if the member
    is neither a file nor a folder."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise HostileArchive(f"{archive}: the member {member.name!r} would lie outside the folder; get another copy")
    if not (member.isreg() or member.isdir()):
        raise HostileArchive(f"{archive}: the member {member.name!r} is a link or a device; only files are unpacked")
    return tuple(part for part in name.parts if part != ".")


def unpack(archive: Path, inside: str, folder: Path, progress: Progress) -> None:
    """Unpacks the files under the path ``inside`` of a tar (plain or compressed) into ``folder``. Complete files
    from an earlier run are kept. A file is written under a temporary name beside ``folder``, so files in it are
    complete. Raises PrepareError for a damaged or hostile archive."""
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
                    with whole(target, folder.parent) as temporary, open(temporary, "wb") as file:
                        shutil.copyfileobj(tar.extractfile(member), file, 1 << 20)
                tar.members.clear()  # tarfile would keep all 150,000 members in memory
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        why = " ".join(str(error).split())[:200]
        raise PrepareError(f"{archive}: not a complete tar archive ({why}); get another copy") from error
    if not count:
        raise PrepareError(f"{archive}: the archive has no file under {inside}")
