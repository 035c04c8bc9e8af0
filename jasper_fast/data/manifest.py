"""Reads manifests (JSON lines, or the JSON array of NVIDIA's Jasper), and counts the utterances that are left out."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from jasper_fast.data import places
from jasper_fast.data.shards import Packed, locate
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError, Memory

_SHOWN = 40  # a message about lost symbols lists at most this many of them


class ManifestError(ValueError):
    """A manifest cannot be read. The message says what is wrong in which file and, if one is at fault, in which line or
    entry."""


@dataclass(frozen=True)
class Utterance:
    """One entry of a manifest: ``text`` is spoken in ``duration`` seconds of the file at ``path``, from ``offset``
    seconds on.

    ``alternatives``: files of the same utterance at several speeds, from which training picks one at random;
    ``manifest``: the manifest that lists the utterance; ``packed``: the place of the file in a shard, or None if it is
    not in a shard.
    """

    path: str
    duration: float
    text: str
    offset: float = 0.0
    speaker: str | None = None
    alternatives: tuple[str, ...] = ()
    manifest: str = field(default="", compare=False)
    packed: Packed | None = None

    def source(self) -> str | Memory:
        """Returns the path or bytes from which ``audio.load`` reads the utterance. Raises AudioError if a shard or URL
        cannot be read."""
        if self.packed is not None:
            return self.packed.read(self.path)
        if not places.is_url(self.path):
            return self.path
        try:
            return Memory(self.path, places.read(self.path))
        except OSError as error:
            raise AudioError(self.path, str(error)) from error

    @property
    def name(self) -> str:
        return f"{self.path}@{self.offset:g}" if self.offset else self.path

    @property
    def seconds(self) -> float:
        """The duration, or 0 if it is not known."""
        return self.duration if math.isfinite(self.duration) else 0.0


def entry(audio_filepath: str | os.PathLike, duration: float, text: str, **known: Any) -> dict[str, Any]:
    """Returns an entry of a manifest. Values of ``known`` (speaker, offset, files) are left out if they are empty or
    0."""
    return {
        "audio_filepath": os.fspath(audio_filepath),
        "duration": duration,
        "text": text,
        **{name: value for name, value in known.items() if value},
    }


def read_manifest(
    path: str | os.PathLike, data_dir: str | os.PathLike | None = None, offline_speeds: bool = False
) -> list[Utterance]:
    """Reads the utterances of a manifest: JSON lines as in NeMo (audio_filepath, duration, text[, offset, speaker], and
    shard_id if packed in tar files) or the JSON array of NVIDIA's Jasper (transcript, files, original_duration).

    ``path`` may be a URL or a pattern (manifest__OP_0..127_CL_.json). Relative paths start at ``data_dir``, by default
    the manifest's folder; for shards ``data_dir`` may be the pattern of their paths. A missing duration is read from
    the file's header. If that fails, it is NaN, which the dataset reports. Of the ``files`` of an entry only the first
    at speed 1 is used (if there is none, the first); with ``offline_speeds`` all become alternatives. Raises
    ManifestError, which names the line or entry.
    """
    utterances = []
    for found in each_utterance(path, data_dir, offline_speeds):
        if isinstance(found, ManifestError):
            raise found
        utterances.append(found[1])
    if not utterances:
        raise ManifestError(f"{path}: the manifest has no utterances")
    return utterances


def each_utterance(
    path: str | os.PathLike, data_dir: str | os.PathLike | None = None, offline_speeds: bool = False
) -> Iterator[tuple[Any, Utterance] | ManifestError]:
    """Yields each entry with its Utterance, or a ManifestError that says why the entry is not valid.

    Raises ManifestError if the file itself cannot be read.
    """
    try:
        names = places.expanded(os.fspath(path))
    except ValueError as error:
        raise ManifestError(str(error)) from error
    for name in names:
        yield from _each_of(name, places.parent(name) if data_dir is None else os.fspath(data_dir), offline_speeds)


def _each_of(path: str, root: str, offline_speeds: bool) -> Iterator[tuple[Any, Utterance] | ManifestError]:
    try:
        content = places.read_text(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ManifestError(f"{path}: cannot read the manifest: {error}") from error
    for where, entry in _entries(path, content):
        if isinstance(entry, ManifestError):
            yield entry
            continue
        try:
            yield entry, replace(_utterance(entry, root, offline_speeds), manifest=path)
        except (KeyError, TypeError, ValueError, OSError, OverflowError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            mistake = ManifestError(f"{path}, {where}: {what}")
            mistake.__cause__ = error
            yield mistake


def _entries(path: str, content: str) -> Iterator[tuple[str, Any]]:
    if content.lstrip().startswith("["):
        try:
            entries = json.loads(content)
        except json.JSONDecodeError as error:
            raise ManifestError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # a number with too many digits, or brackets nested too deep
            raise ManifestError(f"{path}: not valid JSON: {error}") from error
        yield from ((f"entry {i}", entry) for i, entry in enumerate(entries))
        return
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() also splits at U+2028, which JSON allows
        if line.strip():
            where = f"line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                what = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
                yield where, ManifestError(f"{path}, {where}: not valid JSON: {what}")


def _utterance(entry: Any, root: str, offline_speeds: bool) -> Utterance:
    if not isinstance(entry, dict):
        raise TypeError(f"expected an object with 'audio_filepath' or 'files', got {type(entry).__name__}")
    text = next((entry[k] for k in ("text", "transcript") if entry.get(k) is not None), None)
    if text is None:
        if "text_filepath" not in entry:
            raise KeyError("text")
        text = places.read_text(places.joined(root, entry["text_filepath"])).replace("\n", " ")
    if not isinstance(text, str):
        raise TypeError(f"the text must be a string, got {text!r}")
    alternatives, packed = (), None
    if "files" in entry:
        files = entry["files"]
        if not isinstance(files, list) or not all(isinstance(f, dict) for f in files):
            raise TypeError(f"'files' must be a list of objects with 'fname', got {files!r}")
        plain = [f for f in files if f.get("speed", 1.0) == 1.0] or files
        if not plain:
            raise ValueError("'files' is empty")
        file = plain[0]["fname"]
        if offline_speeds:
            alternatives = tuple(places.joined(root, f["fname"]) for f in files)
        duration = entry.get("original_duration", plain[0].get("duration"))
    else:
        file, duration = entry["audio_filepath"], entry.get("duration")
    offset = float(entry.get("offset") or 0.0)
    path = places.joined(root, file)
    if "shard_id" in entry and "files" not in entry:
        path, packed = locate(entry, root)
    speaker = None if entry.get("speaker") is None else str(entry["speaker"])
    found = Utterance(path, math.nan, text, offset, speaker, alternatives, packed=packed)
    if duration is not None:
        return replace(found, duration=float(duration))
    try:
        return replace(found, duration=audio.duration(found.source()) - offset)
    except AudioError:
        return found  # its duration stays NaN, which the dataset reports


class Skipped(NamedTuple):
    """Why the utterance ``name`` was left out, or used with a warning. ``reason`` is a category for counting,
    ``detail`` a sentence."""

    name: str
    reason: str
    detail: str


class SkipReport:
    """The utterances that were left out: ``items`` lists each utterance once per reason, ``counts`` counts by reason.

    ``warned`` lists utterances that were used although something is wrong with them. ``lost`` maps each manifest to
    (the number of its texts that lost symbols in normalisation, the lost symbols).
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Skipped] = {}
        self._warned: dict[tuple[str, str], Skipped] = {}
        self.lost: dict[str, tuple[int, list[str]]] = {}

    def lose(self, manifest: str, symbols: Sequence[str], texts: int = 1) -> None:
        """Counts ``texts`` more texts from which normalisation dropped these symbols."""
        count, known = self.lost.get(manifest, (0, []))
        self.lost[manifest] = count + texts, list(dict.fromkeys([*known, *symbols]))

    @property
    def warned(self) -> list[Skipped]:
        return list(self._warned.values())

    @property
    def losses(self) -> list[str]:
        """The content of ``lost`` as text, one line per manifest."""
        lines = []
        for manifest, (count, symbols) in self.lost.items():
            texts = f"{count} text{'s' * (count > 1)}{manifest and f' of {manifest}'}"
            more = f" and {len(symbols) - _SHOWN} more" if len(symbols) > _SHOWN else ""
            lines.append(f"{texts} lost symbols: {' '.join(symbols[:_SHOWN])}{more}")
        return lines

    def add(self, skipped: Sequence[Skipped], warned: Sequence[Skipped] = ()) -> None:
        for known, new in ((self._found, skipped), (self._warned, warned)):
            for item in new:
                known.setdefault((item.name, item.reason), item)

    def merge(self, other: Self) -> None:
        """Adds the report of another process, which has read other utterances."""
        self.add(other.items, other.warned)
        for manifest, (count, symbols) in other.lost.items():
            self.lose(manifest, symbols, count)

    @property
    def items(self) -> list[Skipped]:
        return list(self._found.values())

    @property
    def counts(self) -> Counter[str]:
        return Counter(reason for _, reason in self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        parts = [f"{len(self)} skipped ({reasons})" if len(self) else "none skipped"]
        warned = Counter(reason for _, reason in self._warned)
        parts += [f"{count} used although {reason}" for reason, count in warned.most_common()]
        return "; ".join(parts + self.losses)
