"""Speak a corpus, train a fused Jasper on it, transcribe voices it never heard, and compare it with the plain model.

python -m jasper_fast.demo [--out build/demo] [--steps 2500] [--minutes 5.5]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import sys
import time
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from jasper_fast import JasperConfig, LogMelFeatures, __version__
from jasper_fast.data.manifest import read_manifest
from jasper_fast.demo import compare, corpus, learn, report
from jasper_fast.demo.espeak import SynthError
from jasper_fast.dispatch import choose
from jasper_fast.inference.recognizer import Recognizer
from jasper_fast.nn import checkpoint
from jasper_fast.speech import audio

CONFIG = Path(str(files("jasper_fast.configs") / "demo.yaml"))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jasper_fast.demo",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the corpus and the results")
    parser.add_argument("--steps", type=int, default=2500, help="updates of the weights")
    parser.add_argument("--minutes", type=float, default=5.5, help="end the training by then, on a slow machine")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--train-utterances", type=int, default=1120, help="commands to learn from")
    parser.add_argument("--test-utterances", type=int, default=200, help="commands by other voices")
    parser.add_argument("--compare-seconds", type=float, default=20.0, help="time to measure fused against eager")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus, the weights and the order")
    return parser.parse_args(argv)


def cpu_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def picture(path: str):
    """Log-mel features (bands, frames) of a file as they are before normalisation, for the eye."""
    samples = torch.from_numpy(audio.load(path, corpus.SAMPLE_RATE))[None]
    features = LogMelFeatures(normalize=None, dither=0.0, pad_to_multiple=1)
    mel = features(samples, torch.tensor([samples.shape[1]]))[0][0]
    return mel.clamp(min=-16.0).numpy()


def table(result: dict) -> Table:
    grid = Table(title="fused beside eager, measured in turn", title_justify="left")
    for name in ("", "eager", "fused", "gain"):
        grid.add_column(name, justify="right" if name else "left")
    for row in report.comparison_rows(result):
        grid.add_row(*row)
    return grid


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    console = Console(highlight=False)
    start = time.perf_counter()
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    config = JasperConfig.from_yaml(args.config)
    out = args.out
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    console.print(
        f"[bold]jasper_fast {__version__} demo[/] on {cpu_name()}, {place}: at most {args.minutes + 1:.0f} minutes"
    )

    try:
        train = corpus.synthesise(out / "corpus", "train", args.train_utterances, args.seed)
        test = corpus.synthesise(out / "corpus", "test", args.test_utterances, args.seed)
    except SynthError as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        return 1
    spoken = time.perf_counter()
    heard, unheard = read_manifest(train), read_manifest(test)

    learned = learn.learn(config, train, test, args.steps, args.minutes, device, args.seed)
    model = learned.model
    console.print(
        f"{learned.steps} steps, {learned.utterances} utterances in {learned.seconds:.0f} s;"
        f" [bold]WER {learned.last.wer:.1%} on {len(corpus.voices('test'))} voices that were not in training[/]"
    )
    saved = out / "model.pt"
    checkpoint.save(
        saved,
        {
            "format": checkpoint.FORMAT,
            "config": config.to_dict(),
            "labels": list(learned.vocabulary.labels),
            "state_dict": model.state_dict(),
        },
    )

    rng = random.Random(args.seed)
    chosen = []
    for voice in rng.sample(corpus.voices("test"), 3):
        chosen.append(rng.choice([u for u in unheard if u.speaker == voice.name] or unheard))
    heard_texts = Recognizer(model, learned.vocabulary, device).recognize(chosen).transcripts
    examples = [
        {
            "file": str(Path(u.path).relative_to(out)),
            "speaker": u.speaker,
            "reference": u.text,
            "transcript": transcript.text,
        }
        for u, transcript in zip(chosen, heard_texts, strict=True)
    ]
    for u, e in zip(chosen, examples, strict=True):
        console.print(f"  {u.path}: [bold]{e['transcript']}[/] (spoken: {u.text})", soft_wrap=True)

    measuring = time.perf_counter()
    console.print("measuring fused against eager ...")
    measured = measure(config, learned, train, device, args.compare_seconds, args.seed)
    end = time.perf_counter()
    memory = measured["memory"]
    minutes_spoken = sum(u.duration for u in heard) / 60
    result = {
        "wer_unseen": learned.last.wer,
        "cer_unseen": learned.last.cer,
        "train_step_ratio": measured["train"]["ratio"],
        "inference_ratio": measured["inference"]["ratio"],
        "memory_ratio": memory["fused_bytes"] / memory["eager_bytes"],
        **measured,
        "seconds": {
            "corpus": spoken - start,
            "training": learned.seconds,
            "measuring": end - measuring,
            "total": end - start,
        },
        "training": {"steps": learned.steps, "utterances": learned.utterances},
        "corpus": {
            "train_utterances": len(heard),
            "train_voices": len(corpus.voices("train")),
            "train_minutes": minutes_spoken,
            "test_utterances": len(unheard),
            "test_voices": len(corpus.voices("test")),
        },
        "model": {"name": args.config.name, "parameters": sum(p.numel() for p in model.parameters())},
        "examples": examples,
        "curves": {"loss": learned.loss, "wer": learned.wer},
        "versions": {"jasper_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "name": cpu_name(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "backend": choose.resolve("auto", device.type),
        },
        "command": " ".join(["python -m jasper_fast.demo", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    paths = [out / e["file"] for e in examples]
    page = report.render(result, [picture(str(p)) for p in paths], [p.read_bytes() for p in paths])
    (out / "index.html").write_text(page, encoding="utf-8")
    console.print(table(result))
    made = f"{out / 'index.html'}: the page; {out / 'result.json'}: the numbers; {saved}: the model"
    console.print(made, soft_wrap=True)
    console.print(f"jasper-fast transcribe --checkpoint {saved} {paths[0]}", soft_wrap=True)
    return 0


def measure(
    config: JasperConfig, learned: learn.Learned, train: Path, device: torch.device, seconds: float, seed: int
) -> dict[str, dict]:
    """`compare.compare` on a batch of the corpus, as training sees it, and on one utterance of average length."""
    from jasper_fast.data import batches

    features = learned.frontend.features
    train_set, _, _ = learn.datasets(config, train, train, 2 * features.hop_length, seed)
    plan = batches.BatchSampler(train_set.durations, learn.BATCH_SIZE, bucketing=False, seed=seed)
    batch = next(batches.load_batches(train_set, plan))
    x, lengths, _ = learned.frontend(batch.audio.to(device), batch.audio_lengths)
    middle = int(lengths.argsort()[len(lengths) // 2])
    length = lengths[middle : middle + 1]
    frames = -(-int(length) // 16) * 16
    one = (x[middle : middle + 1, :, :frames].clone(memory_format=torch.preserve_format), length)
    targets = batch.targets.to(device)
    state = learned.model.state_dict()
    return compare.compare(config, state, (x, lengths, targets, batch.target_lengths), one, device, seconds)


if __name__ == "__main__":
    sys.exit(main())
