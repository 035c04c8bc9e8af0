"""Random damaged files: each reader either succeeds or raises its documented error, which names the file."""

import functools
import io
import json
import random
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import nemo_files
import numpy as np
import soundfile
import torch

from jasper_fast.data.manifest import ManifestError, read_manifest
from jasper_fast.inference.convert import ConvertError, convert
from jasper_fast.nn.checkpoint import FORMAT, CheckpointError
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.model import Jasper
from jasper_fast.speech import audio as reader
from jasper_fast.speech.audio import AudioError

HANG = 20  # seconds, far more than a reader needs for these small files


@contextmanager
def time_limit():
    """A context that raises AssertionError after HANG seconds."""

    def stop(*_):
        raise AssertionError(f"not finished after {HANG} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def written(content: bytes, name: str):
    """Yields the path of a file with this content. Applies `time_limit` to the block."""
    with tempfile.TemporaryDirectory() as folder, time_limit():
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def damage(content: bytes, rng: random.Random, first: int | None = None) -> bytes:
    """Returns `content` with a few changes: a bit flipped, a byte replaced, bytes removed, or the end cut off. Flipped,
    replaced and removed bytes are among the `first` bytes (None: anywhere)."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        end = min(len(data), first or len(data))
        if not end:
            break
        at, how = rng.randrange(end), rng.random()
        if how < 0.6:
            data[at] ^= 1 << rng.randrange(8)
        elif how < 0.8:
            data[at] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
        elif how < 0.9:
            del data[at : at + rng.randint(1, 8)]
        else:
            del data[rng.randrange(len(data)) :]
    return bytes(data)


VALUES = [None, True, 0, -1, 1e400, float("nan"), 10**300, 10**400, "", "x", "\0", "a" * 300, [], {}, [1], {"fname": 1}]


def mutate(value, rng: random.Random):
    """Returns a copy of the JSON value in which one part is replaced, left out or put into a list."""
    if rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(VALUES) if rng.random() < 0.7 else [value]
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {k: mutate(v, rng) if k == key else v for k, v in value.items()}
    at = rng.randrange(len(value))
    return [mutate(v, rng) if i == at else v for i, v in enumerate(value)]


LINES = [
    {"audio_filepath": "a.wav", "duration": 1.5, "text": "one", "offset": 0.5, "speaker": "s"},
    {"audio_filepath": "b.wav", "text": "two"},
    {"audio_filepath": "c.wav", "text_filepath": "c.txt", "duration": 2},
]
ARRAY = [
    {"transcript": "one", "files": [{"fname": "a.wav", "speed": 1, "duration": 2.0}], "original_duration": 2.0},
    {"transcript": "two", "files": [{"fname": "b.wav", "speed": 0.9}, {"fname": "c.wav"}]},
]


def manifests(seed: int) -> None:
    rng = random.Random(seed)
    how = rng.choice(["bytes", "damage", "json", "json"])
    if how == "bytes":
        content = rng.randbytes(rng.randint(0, 200))
        if rng.random() < 0.5:
            content = bytes(rng.choice(b'[]{}",:\n 019eE+-.aul\\') for _ in content)
    else:
        lines, array = LINES, ARRAY
        if how == "json":
            lines, array = [mutate(line, rng) for line in lines], mutate(array, rng)
        text = json.dumps(array) if rng.random() < 0.5 else "\n".join(map(json.dumps, lines))
        content = text.encode() if how == "json" else damage(text.encode(), rng)
    with written(content, "manifest.json") as path:
        try:
            read_manifest(path, offline_speeds=rng.random() < 0.5)
        except ManifestError as error:
            assert str(path) in str(error), f"the message does not name the file: {error}"


@functools.cache
def sound(form: str, subtype: str, channels: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(
        file, np.random.default_rng(0).uniform(-0.5, 0.5, (400, channels)), 8000, format=form, subtype=subtype
    )
    return file.getvalue()


SOUNDS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("WAV", "ULAW")]


def audio(seed: int) -> None:
    rng = random.Random(seed)
    form, subtype = rng.choice(SOUNDS)
    content = damage(sound(form, subtype, rng.choice([1, 2])), rng, rng.choice([None, 60, 60]))
    with written(content, f"audio.{form.lower()}") as path:
        for read in (reader.duration, reader.load):
            try:
                read(path)
            except AudioError as error:
                assert str(path) in str(error), f"the message does not name the file: {error}"


@functools.cache
def checkpoint(form: str) -> bytes:
    """Returns a small model as a file of the format `form`."""
    blocks = [{"filters": 2, "kernel_size": [3], "residual": False}]
    jasper = {"encoder": {"in_feats": 2, "blocks": blocks}, "decoder": {"in_feats": 2, "n_classes": 2}}
    config = JasperConfig.from_dict({"labels": ["a"], "jasper": jasper})
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        torch.save({"format": FORMAT, "state_dict": Jasper(config).state_dict(), "config": config.to_dict()}, source)
        convert(source, out, form)
        return out.read_bytes()


def checkpoints(seed: int) -> None:
    rng = random.Random(seed)
    how = rng.random()
    if how < 0.1:
        content = rng.randbytes(rng.randint(0, 2000))
    elif how < 0.3:  # an undamaged file whose entries have wrong types
        tensor = torch.ones(2)
        wrong = [None, 1, "x", [tensor], {"a": 1}, {}, {"a": None}, tensor, {"a": {"b": tensor}}, {1: tensor}]
        keys = rng.sample(["format", "state_dict", "ema_state_dict", "config", "labels", "x"], rng.randint(0, 5))
        state = {key: rng.choice(wrong) for key in keys} if rng.random() < 0.8 else rng.choice(wrong)
        content = nemo_files.saved(state)
    else:  # half of the time only the first bytes are damaged, because damage to tensor data often has no effect
        form = rng.choice(["jasper_fast", "nvidia", "nemo", "safetensors"])
        content = damage(checkpoint(form), rng, rng.choice([None, 1200]))
    with written(content, "model.pt") as path:
        for ema in (False, True):
            try:
                convert(path, path.with_suffix(".out"), rng.choice(["jasper_fast", "nemo", "safetensors"]), ema=ema)
            except (CheckpointError, ConvertError) as error:
                assert str(path) in str(error), f"the message does not name the file: {error}"
                assert "\n" not in str(error) and not path.with_suffix(".out").exists()
            path.with_suffix(".out").unlink(missing_ok=True)
