"""Writes shards and their manifest. Shards are tar files of some hundred MB, which NeMo and WebDataset also read."""

import io
import itertools
import math
import random
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile

from jasper_fast.data import places
from jasper_fast.data.manifest import Utterance, entry
from jasper_fast.data.prepare.copies import in_parallel
from jasper_fast.data.prepare.writing import PrepareError, Progress, whole, write_manifest
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError

MANIFEST = "tarred_audio_manifest.json"  # the name that NeMo uses


def pack(
    utterances: Sequence[Utterance],
    out: Path,
    shard_bytes: int,
    seed: int,
    url: str | None,
    jobs: int,
    progress: Progress,
) -> tuple[Path, int]:
    """Packs utterances, in random order, in shards ``audio_N.tar`` of similar size, and writes a manifest. Returns the
    path of the manifest and the number of shards.

    A file that is one utterance is packed unchanged. If an utterance is part of a longer file, that part is packed as
    FLAC in mono at 16 kHz. ``url``: the folder from which the shards will be read (None: the manifest's). Equal
    arguments produce equal bytes. Raises PrepareError, which names a file that cannot be read.
    """
    order = list(utterances)
    random.Random(seed).shuffle(order)
    taken: set[str] = set()
    named = [(u, _stem(u, taken)) for u in order]
    count = max(1, min(len(named), math.ceil(sum(_size(u) for u in order) / shard_bytes)))
    shares = [named[i * len(named) // count : (i + 1) * len(named) // count] for i in range(count)]

    def write(number: int) -> list[dict[str, Any]]:
        return _write(out / f"audio_{number}.tar", number, shares[number], url)

    lines = list(in_parallel(write, range(count), jobs, "shards", progress))
    for old in out.glob("audio_*.tar"):  # left by an earlier run with more shards
        if re.fullmatch(r"audio_\d+\.tar", old.name) and int(old.stem[6:]) >= count:
            old.unlink()
    write_manifest(out / MANIFEST, (line for shard in lines for line in shard))
    return out / MANIFEST, count


def _size(utterance: Utterance) -> int:
    if utterance.packed is not None:
        return utterance.packed.size
    if utterance.offset or places.is_url(utterance.path):  # an estimate
        return int(20_000 * utterance.seconds)
    try:
        return Path(utterance.path).stat().st_size
    except (OSError, ValueError) as error:
        raise PrepareError(
            f"{utterance.path}: cannot be read: {error}; `jasper-fast check` lists such files"
        ) from error


def _stem(utterance: Utterance, taken: set[str]) -> str:
    """Returns a file name without suffix that is not in ``taken``, and adds it to ``taken``. The name has no dot,
    because WebDataset splits names at the first dot."""
    first = re.sub(r"[^A-Za-z0-9_-]", "_", Path(utterance.path).stem)[:80] or "utterance"
    more = (f"{first}_{number}" for number in itertools.count(1))
    stem = next(name for name in itertools.chain([first], more) if name not in taken)
    taken.add(stem)
    return stem


def _content(utterance: Utterance) -> tuple[bytes, str, float]:
    """Returns the file to be packed for an utterance: its bytes, its suffix, and its length in seconds."""
    source = utterance.source()
    if not utterance.offset:
        whole_seconds = audio.duration(source)
        if not utterance.seconds or utterance.seconds >= whole_seconds - 0.05:
            data = source.data if isinstance(source, audio.Memory) else Path(source).read_bytes()
            return data, Path(utterance.path).suffix.lower() or ".wav", whole_seconds
    samples = audio.load(source, 16000, utterance.offset, utterance.seconds)
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="FLAC", subtype="PCM_16")
    return file.getvalue(), ".flac", len(samples) / 16000


def _write(path: Path, number: int, share: Sequence[tuple[Utterance, str]], url: str | None) -> list[dict[str, Any]]:
    """Writes one shard of (utterance, file name without suffix) pairs, and returns its manifest entries."""
    lines = []
    with whole(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for utterance, stem in share:
            try:
                data, suffix, seconds = _content(utterance)
            except AudioError as error:
                raise PrepareError(f"{error}; `jasper-fast check --clean` leaves such files out") from error
            name = stem + suffix
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
            start = tar.offset - math.ceil(len(data) / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            tar_name = f"{url.rstrip('/')}/{path.name}" if url else path.name
            lines.append(
                entry(name, round(seconds, 6), utterance.text, speaker=utterance.speaker)
                | {"shard_id": number, "tar": tar_name, "tar_start": start, "tar_size": len(data)}
            )
    return lines
