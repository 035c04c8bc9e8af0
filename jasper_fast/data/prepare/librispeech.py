"""Prepares LibriSpeech: downloads, verifies and unpacks it, and makes copies and manifests. An interrupted run
continues where it stopped."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jasper_fast.data import manifest
from jasper_fast.data.prepare import copies
from jasper_fast.data.prepare.copies import Copy
from jasper_fast.data.prepare.fetch import fetch, verify
from jasper_fast.data.prepare.unpack import HostileArchive, unpack
from jasper_fast.data.prepare.writing import PrepareError, Progress, alone_in, move, write_manifest

HOME = "https://www.openslr.org/resources"
WORK = Path(".prepare")  # folder within the corpus for downloads and incomplete files
UNFINISHED = WORK / "unfinished"  # folder for unpacked sets, copies and manifests that are incomplete


class Published(NamedTuple):
    """An archive of OpenSLR: its resource number there, its MD5, and its size in bytes."""

    resource: int
    md5: str
    size: int


SETS = {
    "dev-clean": Published(12, "42e2234ba48799c1f50f24a7926300a1", 337926286),
    "dev-other": Published(12, "c8d0bcc9cca99d4f8b62fcc847357931", 314305928),
    "test-clean": Published(12, "32fa31d27d2e1cad72775fee3f4849a9", 346663984),
    "test-other": Published(12, "fb5a50374b501bb3bac4815ee91d3135", 328757843),
    "train-clean-100": Published(12, "2a93770f6d5c6c964bc36631d331a522", 6387309499),
    "train-clean-360": Published(12, "c0e676e450a7ff2f54aeade5171606fa", 23049477885),
    "train-other-500": Published(12, "d1a0fd59409feb2c614ce4d30c387708", 30593501606),
}
MINI = {  # mini-LibriSpeech, a small part for first trials
    "dev-clean-2": Published(31, "6d7ab67ac6a1d2c993d050e16d61080d", 126046265),
    "train-clean-5": Published(31, "5df7d4e78065366204ca6845bb08f490", 332747356),
}
_KNOWN = SETS | MINI
WAV_SIZE = 1.9  # size of a WAV file relative to its FLAC file


def _published(name: str) -> Published:
    if name not in _KNOWN:
        raise PrepareError(
            f"there is no set {name!r}; known: {', '.join(_KNOWN)}; for others give --source and --checksums"
        )
    return _KNOWN[name]


@dataclass(frozen=True)
class Corpus:
    """Which ``sets`` are prepared in the folder ``out``. ``source`` is a URL or folder that has ``SET.tar.gz`` for each
    set (None: OpenSLR).

    ``speeds``: speeds of the copies made beside the originals; ``wav``: make copies in WAV, which is read faster;
    ``checksums``: MD5 by set, for archives that are not the published ones; ``keep_archives``: do not delete archives
    after unpacking.
    """

    out: Path
    sets: Sequence[str] = tuple(SETS)
    source: str | None = None
    speeds: Sequence[float] = ()
    wav: bool = False
    checksums: dict[str, str] | None = None
    keep_archives: bool = False

    def forms(self) -> list[Copy]:
        """Returns the kinds of copy of every utterance, speed 1 first."""
        return [Copy(s, ".wav" if self.wav else ".flac") for s in (1.0, *sorted(set(self.speeds) - {1.0}))]

    def md5(self, name: str) -> str:
        """Returns the MD5 of a set's archive. Raises PrepareError if it is not known."""
        if self.checksums is not None:
            if name not in self.checksums:
                raise PrepareError(f"the file given as --checksums has no line for {name}.tar.gz")
            return self.checksums[name]
        return _published(name).md5

    def place(self, name: str) -> tuple[str, Path]:
        """Returns the URL of a set's archive ("" if ``source`` is a folder), and the archive's path on this machine."""
        file = f"{name}.tar.gz"
        if self.source is not None and not re.match(r"https?://", self.source):
            return "", Path(self.source, file)
        base = self.source or f"{HOME}/{_published(name).resource}"
        return f"{base.rstrip('/')}/{quote(file)}", self.out / WORK / file

    def folder(self, name: str) -> Path:
        """Returns the folder of a set's unpacked utterances."""
        return self.out / "LibriSpeech" / name


def read_checksums(path: Path) -> dict[str, str]:
    """Reads the MD5 of each set from a file in the format of md5sum. Raises PrepareError, which names the line."""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PrepareError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if match := re.fullmatch(r"([0-9a-fA-F]{32})\s+\*?(?:\S*/)?([^\s/]+)\.tar\.gz", line.strip()):
            found[match[2]] = match[1]
        elif line.strip():
            raise PrepareError(f"{path}, line {number}: expected an MD5 and the name of a .tar.gz")
    return found


def needed(corpus: Corpus) -> tuple[int, int]:
    """Returns the bytes still to be downloaded, and the largest additional disk space needed at any time."""
    fetched, kept, largest = 0, 0, 0
    for name in corpus.sets:
        url, archive = corpus.place(name)
        size = archive.stat().st_size if archive.exists() else _KNOWN[name].size if name in _KNOWN else 0
        there = corpus.folder(name).is_dir()
        if url and not there:
            part = archive.with_name(f"{archive.name}.part")
            left = 0 if archive.exists() else size - min(size, part.stat().st_size if part.exists() else 0)
            fetched, largest = fetched + left, max(largest, left)
            kept += left * corpus.keep_archives
        kept += 0 if there else size
        original = sum(f.stat().st_size for f in corpus.folder(name).rglob("*.flac")) if there else size
        kept += sum(
            int(original * (WAV_SIZE if corpus.wav else 1.0) / form.speed)
            for form in corpus.forms()
            if not form.plain and not form.folder(corpus.folder(name)).is_dir()
        )
    return fetched, kept + (0 if corpus.keep_archives else largest)


def prepare(corpus: Corpus, jobs: int, say: Callable[[str], None], progress: Progress) -> None:
    """Prepares every set, and writes a manifest for each (JSON lines: audio_filepath, duration, text, speaker, and
    ``files`` if there are copies at other speeds).

    First calls ``say`` with a line on what will be downloaded and written. Copies are made by ``jobs`` threads (0: one
    per core). Complete audio files are never made again, so the same call continues an interrupted run, with the same
    result. Raises PrepareError for whatever stops the work, such as a wrong MD5, a damaged or hostile archive, too
    little disk space, or a server that does not answer.
    """
    for name in corpus.sets:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise PrepareError(f"{name!r} is not the name of a set")
        corpus.md5(name)
        url, archive = corpus.place(name)
        if not url and not archive.is_file() and not corpus.folder(name).is_dir():
            raise PrepareError(f"{archive}: no such archive; --source must be a folder with SET.tar.gz, or a URL")
    with alone_in(corpus.out):
        fetched, space = needed(corpus)
        free = shutil.disk_usage(corpus.out).free
        say(
            f"{', '.join(corpus.sets)}: {fetched / 1e9:.2f} GB to download, about {space / 1e9:.2f} GB more needed "
            f"on the disk of {corpus.out}, where {free / 1e9:.2f} GB are free"
        )
        if space > free:
            raise PrepareError(
                f"{corpus.out}: about {space / 1e9:.2f} GB are needed, but only {free / 1e9:.2f} GB are free; make "
                "room or name fewer --sets"
            )
        for name in corpus.sets:
            _unpacked(corpus, name, progress)
            path = corpus.out / f"{name}.jsonl"
            count = write_manifest(path, _entries(corpus, name, jobs, progress), corpus.out / UNFINISHED)
            say(f"{path}: {count} utterances")
        shutil.rmtree(corpus.out / (UNFINISHED if corpus.keep_archives else WORK), ignore_errors=True)


def _unpacked(corpus: Corpus, name: str, progress: Progress) -> None:
    """Downloads, verifies and unpacks a set, unless its folder exists. Deletes a downloaded archive, unless archives
    are kept."""
    folder, staged = corpus.folder(name), corpus.out / UNFINISHED / name
    url, archive = corpus.place(name)
    if not folder.is_dir():
        if url and not archive.exists():
            fetch(url, archive, corpus.md5(name), progress)
        else:
            verify(archive, corpus.md5(name), progress)
        try:
            unpack(archive, f"LibriSpeech/{name}", staged, progress)
        except HostileArchive:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        move(staged, folder)
    if url and not corpus.keep_archives:
        archive.unlink(missing_ok=True)


def spoken(folder: Path) -> list[tuple[Path, str]]:
    """Returns the audio file and text of each utterance of an unpacked set, sorted by name. Raises PrepareError if a
    text or an audio file is missing, or if texts are not UTF-8."""
    texts: dict[str, str] = {}
    for listing in sorted(folder.rglob("*.trans.txt")):
        try:
            lines = listing.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise PrepareError(f"{listing}: is not UTF-8: {error}") from error
        for line in filter(str.strip, lines):
            name, _, text = line.partition(" ")
            texts[name] = text.strip().lower()
    files = {file.stem: file for file in folder.rglob("*.flac")}
    for kind, lone in (("text", files.keys() - texts.keys()), ("audio", texts.keys() - files.keys())):
        if lone:
            raise PrepareError(
                f"{folder}: {len(lone)} utterances have no {kind}, e.g. {min(lone)}; remove the folder and run again"
            )
    return [(files[name], texts[name]) for name in sorted(files)]


def _entries(corpus: Corpus, name: str, jobs: int, progress: Progress) -> Iterator[dict[str, Any]]:
    """Makes the copies of a set's utterances, and yields their manifest entries."""
    folder, forms, work = corpus.folder(name), corpus.forms(), corpus.out / UNFINISHED / "copies"

    def entry(one: tuple[Path, str]) -> dict[str, Any]:
        (file, text), files = one, []
        for form in forms:
            path = form.path(file, folder)
            seconds = round(copies.make(file, form, path, work), 6)
            files.append({"fname": path.relative_to(corpus.out).as_posix(), "speed": form.speed, "duration": seconds})
        speaker, more = file.name.partition("-")[0], files if len(files) > 1 else None
        return manifest.entry(files[0]["fname"], files[0]["duration"], text, speaker=speaker, files=more)

    yield from copies.in_parallel(entry, spoken(folder), jobs, f"{name}: audio", progress)
