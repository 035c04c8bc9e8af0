"""Names the cache folder, and writes files that other processes may read at the same time."""

import os
import threading
from pathlib import Path


def cache() -> Path:
    """Returns the cache folder: `$JASPER_FAST_CACHE`, or `$XDG_CACHE_HOME/jasper_fast`, or `~/.cache/jasper_fast`."""
    own = os.environ.get("JASPER_FAST_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jasper_fast"))


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and makes its folder if needed. Text is written as UTF-8.

    Readers see the whole old or the whole new file, even if the writing process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
