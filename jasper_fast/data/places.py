"""Joins, expands and reads paths and URLs. A URL may have any scheme that fsspec or one of its plugins supports."""

import itertools
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from jasper_fast.extras import need

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_MOST = 1_000_000  # a pattern may expand to at most this many paths


def is_url(place: str) -> bool:
    return "://" in place


def joined(root: str, name: str) -> str:
    """Returns ``name`` below ``root``, or ``name`` itself if it is a URL or an absolute path. Raises TypeError if
    ``name`` is not a string."""
    if not isinstance(name, str):
        raise TypeError(f"a path must be a string, got {name!r}")
    if is_url(name) or os.path.isabs(name):
        return name
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root) / name)


def absolute(file: str | os.PathLike) -> str:
    """Returns the absolute path of a file. Symbolic links in it are kept, but those in its folder are resolved if the
    folder's path contains "..", because ".." after a link means the folder above the link's target."""
    folder, name = os.path.split(file)
    return os.path.join(os.path.realpath(folder), name) if ".." in Path(folder).parts else os.path.abspath(file)


def placed(file: str, manifest: Path) -> str:
    """Returns the path by which a manifest names a file. It is relative to the manifest's folder if the file is below
    that folder, before or after symbolic links are resolved, and absolute otherwise."""
    path, folder = absolute(file), os.path.dirname(absolute(manifest))
    if Path(path).is_relative_to(folder):
        return os.path.relpath(path, folder)
    names = path, os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    roots = folder, os.path.realpath(manifest.parent)
    below = (os.path.relpath(n, root) for n in names for root in roots if Path(n).is_relative_to(root))
    return next(below, path)


def parent(place: str) -> str:
    """Returns the folder of a file."""
    return place.rpartition("/")[0] if is_url(place) else str(Path(place).parent)


def expanded(pattern: str) -> list[str]:
    """Expands a pattern with {0..127}, {000..127}, {a,b} or NeMo's _OP_0..127_CL_ to its paths. A path that exists or
    is not a pattern is returned as it is.

    Raises ValueError for a pattern of more than a million paths.
    """
    braces = pattern.replace("_OP_", "{").replace("_CL_", "}")
    if not _RANGE.search(braces) or (not is_url(pattern) and os.path.exists(pattern)):
        return [pattern]
    parts, end = [], 0
    for found in _RANGE.finditer(braces):
        first, last, names = found.groups()
        parts += [[braces[end : found.start()]], names.split(",") if names else _numbers(first, last)]
        end = found.end()
        if math.prod(map(len, parts)) > _MOST:
            raise ValueError(f"{pattern}: the pattern expands to more than {_MOST:,} paths")
    return ["".join(words) for words in itertools.product(*parts, [braces[end:]])]


def _numbers(first: str, last: str) -> list[str]:
    """Returns the numbers from ``first`` to ``last``. If ``first`` begins with 0, they are padded with zeros to its
    width. Stops after _MOST + 1 numbers, which ``expanded`` refuses."""
    width = len(first) if first.startswith("0") else 0
    return [f"{i:0{width}d}" for i in range(int(first), min(int(last), int(first) + _MOST) + 1)]


@contextmanager
def _remote() -> Iterator[None]:
    """Turns any error in its block into an OSError, because the plugins of fsspec raise errors of other classes."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise OSError(str(error) or type(error).__name__) from error
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def files_of(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and the path in it. Raises OSError, for instance if the file system's
    plugin (s3fs, gcsfs) is not installed."""
    with _remote():
        return need("fsspec.core", "train").url_to_fs(url)


def read(place: str, start: int = 0, end: int | None = None) -> bytes:
    """Returns the bytes of a URL from ``start`` to ``end`` (exclusive; None: to the end). Raises OSError."""
    files, path = files_of(place)
    with _remote():
        return files.cat_file(path, start=start, end=end)


def read_text(place: str) -> str:
    """Returns the text of a UTF-8 file or URL. Raises OSError or UnicodeDecodeError."""
    return read(place).decode("utf-8-sig") if is_url(place) else Path(place).read_text(encoding="utf-8-sig")


def opened(place: str) -> BinaryIO:
    """Opens a file or URL for reading bytes. Raises OSError."""
    if not is_url(place):
        return open(place, "rb")
    files, path = files_of(place)
    with _remote():
        return files.open(path, "rb")
