"""Synthesise a corpus, train a fused Jasper on it, transcribe new voices, and compare its speed with plain PyTorch.

python -m jasper_fast.demo [--out build/demo] [--steps 2500] [--minutes 5.5]
"""

import argparse
import datetime
import json
import math
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from jasper_fast import Jasper, LogMelFeatures, __version__, options
from jasper_fast.data.manifest import Utterance, read_manifest
from jasper_fast.demo import compare, corpus, learn, report
from jasper_fast.demo.espeak import SynthError
from jasper_fast.dispatch import choose
from jasper_fast.inference.recognizer import Recognizer
from jasper_fast.kernels import native
from jasper_fast.nn import checkpoint
from jasper_fast.options import option
from jasper_fast.speech import audio

OPTIONS = [
    option("--out", type=Path, default=Path("build/demo"), help="folder for the corpus and the results"),
    option("--steps", type=int, default=2500, help="maximum number of updates of the weights"),
    option("--minutes", type=float, default=5.5, help="maximum time for training, in minutes"),
    option("--config", type=Path, default=learn.CONFIG, help="configuration of the model"),
    option("--device", default="auto", help="device to run on: auto, cpu, cuda or cuda:N"),
    option("--train-utterances", type=int, default=1120, help="spoken commands to train on"),
    option("--test-utterances", type=int, default=200, help="spoken commands to test on, by other voices"),
    option("--compare-seconds", type=float, default=20.0, help="seconds for comparing the speed with eager PyTorch"),
    option("--seed", type=int, default=0, help="seed of the corpus, the weights and the order of the data"),
]


def picture(path: Path) -> np.ndarray:
    """Returns the log-mel features (bands, frames) of a file, without normalisation."""
    samples = torch.from_numpy(audio.load(path, corpus.SAMPLE_RATE))[None]
    features = LogMelFeatures(normalize=None, dither=0.0, pad_to_multiple=1)
    return features(samples, torch.tensor([samples.shape[1]]))[0][0].clamp(min=-16.0).numpy()


def table(result: dict) -> Table:
    grid = Table(title="fused compared with eager, measured in turns", title_justify="left")
    for name in ("", "eager", "fused", "comparison"):
        grid.add_column(name, justify="right" if name else "left")
    for what, eager, fused, number, meaning in report.comparison_rows(result):
        grid.add_row(what, eager, fused, f"{number} {meaning}")
    return grid


def listen(model: Jasper, unheard: list[Utterance], device: torch.device, seed: int) -> tuple[list[Path], list[dict]]:
    """Transcribes one utterance of each of three voices that were not in training. Returns the files and their
    examples for the page."""
    rng = random.Random(seed)
    chosen = [
        rng.choice([u for u in unheard if u.speaker == voice] or unheard)
        for voice in rng.sample(corpus.VOICES["test"], 3)
    ]
    transcripts = Recognizer(model, device=device).recognize(chosen).transcripts
    examples = [
        {"speaker": u.speaker, "reference": u.text, "transcript": heard.text}
        for u, heard in zip(chosen, transcripts, strict=True)
    ]
    return [Path(u.path) for u in chosen], examples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jasper_fast.demo",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add(parser, {"": OPTIONS})
    args = parser.parse_args(argv)
    console, out = Console(highlight=False, soft_wrap=True), args.out
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    machine = {
        "name": native.cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "backend": choose.resolve("auto", device.type),
    }
    console.print(f"[bold]jasper_fast {__version__} demo[/] on {machine['name']}, {machine['device']}")
    console.print(f"at most {args.minutes + 1:.0f} minutes")

    ends = [time.perf_counter()]
    try:
        train = corpus.synthesise(out / "corpus", "train", args.train_utterances, args.seed)
        test = corpus.synthesise(out / "corpus", "test", args.test_utterances, args.seed)
    except SynthError as error:
        console.print(f"[red]error:[/] {error}")
        return 1
    heard, unheard = read_manifest(train), read_manifest(test)

    ends.append(time.perf_counter())
    model, losses, wers = learn.learn(
        args.config, (train, test), out / "training", args.steps, args.minutes, str(device), args.seed
    )
    last, voices = wers[-1], {split: len(names) for split, names in corpus.VOICES.items()}
    console.print(
        f"{last['step']} steps: [bold]WER {last['wer']:.1%} on {voices['test']} voices that were not in training[/]"
    )
    checkpoint.save(out / "model.pt", {
        "format": checkpoint.FORMAT, "config": model.config.to_dict(), "labels": list(model.config.labels),
        "state_dict": model.state_dict(),
    })  # fmt: skip
    paths, examples = listen(model, unheard, device, args.seed)
    for path, example in zip(paths, examples, strict=True):
        example["file"] = str(path.relative_to(out))
        console.print(f"  {path}: [bold]{example['transcript']}[/] (spoken: {example['reference']})")

    ends.append(time.perf_counter())
    console.print("measuring fused against eager ...")
    batch = learn.BATCH_SIZE, 16 * math.ceil(100 * statistics.median(u.duration for u in heard) / 16)
    measured = compare.compare(args.config, out / "bench", batch, device, args.compare_seconds / 2)
    ends.append(time.perf_counter())
    result = {
        "wer_unseen": last["wer"],
        "cer_unseen": last["cer"],
        **measured,
        "seconds": {
            **{part: b - a for part, a, b in zip(("corpus", "training", "measuring"), ends, ends[1:])},
            "total": ends[-1] - ends[0],
        },
        "training": {"steps": last["step"]},
        "corpus": {
            "train_utterances": len(heard),
            "train_voices": voices["train"],
            "train_minutes": sum(u.duration for u in heard) / 60,
            "test_utterances": len(unheard),
            "test_voices": voices["test"],
        },
        "model": {"name": args.config.name, "parameters": sum(p.numel() for p in model.parameters())},
        "examples": examples,
        "curves": {"loss": losses, "wer": wers},
        "versions": {"jasper_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine,
        "command": " ".join(["python -m jasper_fast.demo", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    page = report.render(result, [picture(path) for path in paths], [path.read_bytes() for path in paths])
    (out / "index.html").write_text(page, encoding="utf-8")
    console.print(table(result))
    console.print(f"page: {out / 'index.html'}; numbers: {out / 'result.json'}; model: {out / 'model.pt'}")
    console.print(f"jasper-fast transcribe --checkpoint {out / 'model.pt'} {paths[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
