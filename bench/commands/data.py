"""How many seconds of audio can one core prepare (decode, change the speed of, pad into batches) per second?

`python -m bench data` reads the files of --manifest, or FLAC files that it makes. First it measures one thread in CPU
time, on which other work on the machine has little effect. Then it measures worker processes, in CPU time and by the
clock.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch

from jasper_fast.bench.harness import options, result_file
from jasper_fast.bench.harness.console import say
from jasper_fast.data import perturb
from jasper_fast.data.batches import BatchSampler, load_batches
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.data.manifest import ManifestError, Utterance, read_manifest
from jasper_fast.data.settings import AudioSettings
from jasper_fast.kernels import tables
from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError
from jasper_fast.speech.text import Vocabulary

GOAL = 1200.0  # seconds of audio that a core should prepare per second
SECONDS = 16.7  # length of the longest generated utterance
BATCH_SECONDS = 16 * SECONDS


def main(args: argparse.Namespace) -> int:
    """Measures each stage, prints how many cores a GPU needs, and returns the exit status."""
    options.writable(args.out)
    torch.set_num_threads(1)
    workers = args.workers or os.cpu_count() or 1
    try:
        with corpus(args.manifest) as utterances:
            found = {name: rates(stage, args.seconds) for name, stage in stages(utterances).items()}
            shared, through = through_workers(utterances, workers, args.seconds)
    except AudioError as error:
        raise SystemExit(f"--manifest {args.manifest}: {error}; `jasper-fast check` lists all such files") from None
    wanted = args.rate * args.length
    cores = math.ceil(wanted / shared)
    for name, values in found.items():
        say(
            f"{name}: {statistics.median(values):,.0f} seconds of audio per CPU second ({len(values)} rounds: "
            f"{min(values):,.0f} to {max(values):,.0f})"
        )
    say(
        f"through {workers} worker processes: {shared:,.0f} seconds of audio per CPU second of all processes, which "
        f"includes their start; {through:,.0f} per second by the clock"
    )
    say(
        f"a GPU that trains on {args.rate:g} utterances of {args.length:g} s per second needs {wanted:,.0f} seconds of "
        f"audio per second, so {cores} such cores; the goal of {GOAL:,.0f} per core is "
        f"{'met' if shared >= GOAL else 'missed'}"
    )
    header = result_file.header(torch.device("cpu"), vars(args)) | {"command": "data"}
    result = {"schema": result_file.SCHEMA, **header, "rows": [], "data": {
        "stages": found, "workers": workers, "workers_cpu": shared, "workers_clock": through, "wanted": wanted,
        "goal": GOAL, "cores": cores, "utterances": len(utterances),
    }}  # fmt: skip
    path = args.out / f"data_{tables.slug(header['machine']['name'])}_{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {path}")
    return 0


@contextmanager
def corpus(manifest: str | None, count: int = 32) -> Iterator[list[Utterance]]:
    """Yields the utterances of a manifest, or of `count` generated FLAC files, which are deleted at the end."""
    if manifest is not None:
        try:
            yield read_manifest(manifest)
        except ManifestError as error:
            raise SystemExit(f"--manifest: {error}") from None
        return
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        made = []
        for i in range(count):
            seconds = float(rng.uniform(10, SECONDS))
            path = Path(folder, f"{i}.flac")
            soundfile.write(path, speech_like(seconds, rng), 16000, subtype="PCM_16")
            made.append(Utterance(str(path), seconds, "a made utterance"))
        yield made


def speech_like(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Returns (samples,) at 16 kHz: harmonics of varying loudness, and noise. FLAC compresses them about as well as
    speech."""
    t = np.arange(round(seconds * 16000)) / 16000
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / 16000
    voice = sum(np.sin(k * pitch) / k**1.5 for k in range(1, 25))
    loud = np.clip(np.sin(2 * np.pi * 1.6 * t + rng.uniform(0, 6)), 0, 1) ** 0.5
    return (0.12 * loud * voice + 0.002 * rng.standard_normal(len(t))).astype(np.float32)


def data_of(utterances: list[Utterance]) -> SpeechDataset:
    """Returns a dataset of the utterances at random speeds. Each text is replaced by "a", because texts do not matter
    here."""
    return SpeechDataset(
        [dataclasses.replace(u, text="a", alternatives=()) for u in utterances],
        Vocabulary(),
        AudioSettings(perturb=perturb.Perturb(speed=perturb.SPEED)),
    )


def stages(utterances: list[Utterance]) -> dict[str, Callable[[], float]]:
    """Returns the stages to time, by name. Each is a function that returns the seconds of audio that it prepared,
    counted before the change of speed."""
    data = data_of(utterances)
    sampler = BatchSampler(data.durations, max_seconds=BATCH_SECONDS)
    heard = sum(u.seconds for u in data.utterances)

    def decoded() -> float:
        return sum(len(audio.load(u.source(), 16000, u.offset, u.seconds)) for u in data.utterances) / 16000

    def items() -> float:
        return heard if all(data[0, i].audio is not None for i in range(len(data))) else math.nan

    def padded() -> float:
        return heard if sum(len(batch) for batch in load_batches(data, sampler)) == len(data) else math.nan

    return {"decoded": decoded, "decoded, speed changed": items, "padded batches": padded}


def rates(stage: Callable[[], float], seconds: float) -> list[float]:
    """Returns the seconds of audio per second of CPU time, for each round of a stage.

    There are at least three rounds, and together they take at least `seconds`.
    """
    stage()
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < 3 or time.monotonic() < end:
        started = time.process_time()
        found.append(stage() / (time.process_time() - started))
    if not all(map(math.isfinite, found)):
        raise SystemExit("some utterances cannot be read; `jasper-fast check MANIFEST` lists them")
    return found


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def through_workers(utterances: list[Utterance], workers: int, seconds: float) -> tuple[float, float]:
    """Returns two rates of preparing batches in worker processes, in seconds of audio.

    The first rate is per second of CPU time of all processes, which includes their start. The second is per second by
    the clock, counted from the first batch.
    """
    data = data_of(utterances * max(1, math.ceil(workers * 8 * BATCH_SECONDS / sum(u.seconds for u in utterances))))
    sampler = BatchSampler(data.durations, max_seconds=BATCH_SECONDS)
    spent, started, heard, late, epoch = cpu_seconds(), 0.0, 0.0, 0.0, 0
    while not started or time.monotonic() < started + seconds:
        for batch in load_batches(data, sampler, epoch, workers=workers):
            made = sum(data.utterances[i].seconds for i in batch.indices)
            heard, late = heard + made, late + (made if started else 0.0)
            started = started or time.monotonic()  # leaves out the first start of the worker processes
        epoch += 1
    return heard / (cpu_seconds() - spent), late / (time.monotonic() - started)
