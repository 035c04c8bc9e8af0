"""A corpus of beeps for tests of training, one tone for each letter. A tiny Jasper learns it in seconds."""

from pathlib import Path

import corpora
import numpy as np
import pytest
import soundfile
import torch
import yaml

TONES = {"a": 300, "b": 700, "c": 1500, "d": 3000}
BLOCK = {"stride": [1], "dilation": [1], "dropout": 0.1, "residual": False}
CONFIG = {
    "labels": list(TONES),
    "input_train": {
        "audio_dataset": {"sample_rate": 16000, "speed_perturbation": {"min_rate": 0.9, "max_rate": 1.1}},
        "filterbank_features": {"n_filt": 32, "n_fft": 512, "pad_align": 16, "dither": 1e-5},
        "spec_augment": {"freq_masks": 1, "max_freq": 4, "time_masks": 1, "max_time": 4},
    },
    "input_val": {
        "audio_dataset": {"sample_rate": 16000},
        "filterbank_features": {"n_filt": 32, "n_fft": 512, "pad_align": 16, "dither": 1e-5},
    },
    "jasper": {
        "encoder": {
            "in_feats": 32,
            "blocks": [
                BLOCK | {"filters": 16, "repeat": 1, "kernel_size": [5], "stride": [2]},
                BLOCK | {"filters": 16, "repeat": 2, "kernel_size": [5], "residual": True, "residual_dense": True},
                BLOCK | {"filters": 24, "repeat": 2, "kernel_size": [5], "residual": True, "residual_dense": True},
                BLOCK | {"filters": 32, "repeat": 1, "kernel_size": [3], "dilation": [2]},
            ],
        },
        "decoder": {"in_feats": 32},
    },
}


def beep(text: str, rng: np.random.Generator) -> np.ndarray:
    """Returns (samples,) at 16 kHz: 0.15 s of tone and 0.05 s of silence per letter, with a little noise."""
    t = np.arange(2400) / 16000
    tones = [np.concatenate([0.3 * np.sin(2 * np.pi * TONES[c] * t), np.zeros(800)]) for c in text]
    return (np.concatenate(tones) + 0.01 * rng.standard_normal(3200 * len(text))).astype(np.float32)


def write_corpus(folder: Path, train: int = 16) -> dict[str, Path]:
    """Writes WAV files, two manifests and a configuration; returns their paths as "train", "val" and "config"."""
    rng = np.random.default_rng(0)
    paths = {}
    for split, count in (("train", train), ("val", 4)):
        lines = []
        for i in range(count):
            text = "".join(rng.choice(list(TONES), rng.integers(2, 6)))
            samples = beep(text, rng)
            soundfile.write(folder / f"{split}{i}.wav", samples, 16000)
            lines.append({"audio_filepath": f"{split}{i}.wav", "duration": len(samples) / 16000, "text": text})
        paths[split] = corpora.write_lines(folder / f"{split}.jsonl", lines)
    paths["config"] = folder / "tiny.yaml"
    paths["config"].write_text(yaml.safe_dump(CONFIG))
    return paths


def train_arguments(paths: dict[str, Path], output: Path, **more) -> list[str]:
    """Returns arguments of train.py for the corpus at `paths`. `more` are further options by name; a value of True
    makes a flag, and None leaves the option out."""
    options = {
        "config": paths["config"],
        "train_manifests": paths["train"],
        "val_manifests": paths["val"],
        "output_dir": output,
        "device": "cpu",
        "batch_size": 4,
        "log_every": 1,
        "warmup_steps": 2,
    }
    return [
        part
        for name, value in (options | more).items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]


def run_train(arguments: list[str]) -> None:
    """Runs train.py in this process, and restores the signal handlers afterwards."""
    from jasper_fast import train
    from jasper_fast.training.runs import StopRequest

    stop = StopRequest()
    try:
        train.main(train.arguments(arguments), stop)
    finally:
        stop.restore()


@pytest.fixture(name="train_here")
def training_in_this_process(capsys):
    """Returns a function that runs train.py in this process, with the arguments that `train_arguments` makes, and
    returns its standard error."""

    def run(*arguments, **more) -> str:
        run_train(train_arguments(*arguments, **more))
        return capsys.readouterr().err

    return run


def records(folder: Path, *kinds: str) -> list[dict]:
    """Returns the records of the log in `folder` whose kind is one of `kinds`."""
    from jasper_fast.training.runs import read_log

    return [r for r in read_log(folder / "log.jsonl") if r["kind"] in kinds]


@pytest.fixture(name="paths", scope="module")
def corpus_of_beeps(tmp_path_factory) -> dict[str, Path]:
    """Makes a corpus for all tests of a file, and returns its paths."""
    return write_corpus(tmp_path_factory.mktemp("beeps"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Uses one thread, because tiny models are no faster with more, and much slower when other tests use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
