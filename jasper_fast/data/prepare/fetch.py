"""Downloads archives over HTTP, with resume and retries, and verifies their MD5."""

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from jasper_fast.data.prepare.writing import PrepareError, Progress, move, writing

TRIES = 8  # give up after this many failures in a row; an attempt that received data counts as the first
PAUSE = 1.0  # seconds before the second attempt; doubled before each further one
LONGEST_PAUSE = 60.0  # seconds
TIMEOUT = 60.0  # seconds without data after which a connection counts as broken
_CHUNK = 1 << 20  # bytes read at a time
_LATER = {408, 425, 429}  # the 4xx statuses that ask the client to try again


def verify(path: Path, md5: str, progress: Progress) -> None:
    """Raises PrepareError unless the file has this MD5 (hexadecimal)."""
    digest, done, total = hashlib.md5(usedforsecurity=False), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(f"verify {path.name}", done, total)
    if (found := digest.hexdigest()) != md5.lower():
        raise PrepareError(
            f"{path}: its MD5 is {found}, expected {md5.lower()}: damaged, or another file; get another copy"
        )


def fetch(url: str, target: Path, md5: str, progress: Progress) -> None:
    """Downloads ``url`` to ``target.part``, verifies the MD5, and renames the file to ``target``.

    A ``target.part`` from an earlier run is continued. If the connection breaks or is silent for a minute, or if the
    server answers with status 408, 425, 429 or 5xx, the download is tried again. Raises PrepareError after ``TRIES``
    failures in a row, where a failed attempt that received data counts as the first. Also raises it for other errors of
    the server, for errors of the disk, and for a wrong MD5, after which ``target.part`` is deleted.
    """
    part = target.with_name(f"{target.name}.part")
    with writing(part):
        part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in _LATER:
                raise PrepareError(f"{url}: the server answers {error.code} {error.reason}") from error
            cause: Exception = error
        except (OSError, http.client.HTTPException) as error:
            cause = error
        failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
        if failures >= TRIES:
            raise PrepareError(f"{url}: failed {TRIES} times ({cause}); run the command again to continue") from cause
        time.sleep(min(PAUSE * 2 ** (failures - 1), LONGEST_PAUSE))
    try:
        verify(part, md5, progress)
    except PrepareError as error:
        part.unlink()
        raise PrepareError(f"{url}: {str(error).partition(': ')[2]}; the download was deleted") from error
    move(part, target)


def _receive(url: str, part: Path, progress: Progress) -> None:
    """Appends to ``part`` the bytes of ``url`` that are missing in it. Raises OSError or HTTPException for errors of
    the connection or the server, and PrepareError if ``part`` cannot be written."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if whole and int(whole[1]) == have:
            return  # the file is complete
        part.unlink()
        raise ConnectionError("the part from an earlier run does not belong to this file") from error
    with answer:
        if not have or answer.status != 206:
            have = 0  # the server ignores the range and sends the whole file
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sent another range than requested")
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with writing(part):
            file = open(part, "ab" if have else "wb")  # noqa: SIM115
        with file:
            while chunk := answer.read1(_CHUNK):
                with writing(part):
                    file.write(chunk)
                have += len(chunk)
                progress(f"download {part.stem}", have, total)
            with writing(part):
                file.flush()
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke off after {have} of {total} bytes")
