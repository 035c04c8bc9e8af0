"""Archives over HTTP, with resume and retries, and their MD5."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from jasper_fast.data.prepare.writing import PrepareError, Progress, silent, writing

TRIES = 8  # in a row that bring nothing
PAUSE = 1.0  # seconds before the second try; doubled for each further one
LONGEST_PAUSE = 60.0
TIMEOUT = 60.0  # seconds in which nothing comes
_CHUNK = 1 << 20
_LATER = {408, 425, 429}  # of the statuses 4xx those that ask for another try


def md5_of(path: Path, progress: Progress = silent) -> str:
    """The MD5 of a file, in hexadecimal digits."""
    digest, done, total = hashlib.md5(usedforsecurity=False), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(f"verify {path.name}", done, total)
    return digest.hexdigest()


def verify(path: Path, md5: str, progress: Progress = silent, advice: str = "take another copy") -> None:
    """Raises PrepareError unless the file has this MD5."""
    found = md5_of(path, progress)
    if found != md5.lower():
        raise PrepareError(f"{path}: its MD5 is {found}, it should be {md5.lower()}: damaged or another file; {advice}")


def fetch(url: str, target: Path, md5: str, progress: Progress = silent) -> None:
    """Downloads ``url`` to ``target``, which appears when its MD5 is right.

    What a run before left in ``target.part`` is gone on with. A connection that breaks off, is silent for a minute or
    says that the server is busy is tried again, ``TRIES`` times in a row that bring nothing. Raises PrepareError for
    what does not pass by itself, and for a wrong MD5, after which the file is deleted.
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
                raise PrepareError(f"{url}: the server says {error.code} {error.reason}") from error
            cause: Exception = error
        except (OSError, http.client.HTTPException) as error:
            cause = error
        came = part.exists() and part.stat().st_size > before
        failures = 1 if came else failures + 1
        if failures >= TRIES:
            raise PrepareError(f"{url}: {cause}, {TRIES} times in a row; run again to go on") from cause
        time.sleep(min(PAUSE * 2 ** (failures - 1), LONGEST_PAUSE))
    try:
        verify(part, md5, progress)
    except PrepareError as error:
        part.unlink()
        raise PrepareError(f"{url}: {str(error).partition(': ')[2]}; it was deleted") from error
    with writing(target):
        os.replace(part, target)


def _receive(url: str, part: Path, progress: Progress) -> None:
    """Appends what is missing of ``url`` to ``part``; raises OSError or HTTPException where it breaks off."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if whole and int(whole[1]) == have:
            return  # all of it is there
        part.unlink()
        raise ConnectionError("the part from an earlier run is longer than the file") from error
    with answer:
        if not have or answer.status != 206:
            have = 0  # the server sends all of it
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sends another range than it was asked for")
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
