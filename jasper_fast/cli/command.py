"""The command line: `jasper-fast transcribe | evaluate | info | selfcheck`, also as `python -m jasper_fast`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jasper_fast.data.manifest import SkipReport
    from jasper_fast.inference.recognizer import Recognition, Recognizer

TRANSCRIBE = """\
Writes one line per file to the standard output: the path, a tab, the text; with --json one JSON object per line, with
the words in time. Files of any rate and number of channels that libsndfile reads (WAV, FLAC, OGG, MP3, ...).
Messages go to the standard error. A file that cannot be read is reported there and left out."""
TRANSCRIBE_END = """\
exit status: 0 if at least one file was transcribed (with --strict: if all were), 1 otherwise, 2 for a wrong command,
checkpoint or configuration.

example: jasper-fast transcribe talk.wav call.flac --checkpoint runs/best.pt"""
EVALUATE = """\
Transcribes every utterance of a manifest (JSON lines with audio_filepath, duration, text, or the array of NVIDIA's
Jasper) and prints word and character error rate over all of them, speed as seconds of audio per second (RTFx), and
the worst utterances. References are normalised as in training. Nothing is left out but files that cannot be read:
they are listed, and not in the error rates."""
EVALUATE_END = """\
exit status: 0, or 1 if no utterance could be read (with --strict: if any could not), 2 for a wrong command, manifest,
checkpoint or configuration.

example: jasper-fast evaluate --manifest dev.jsonl --checkpoint runs/best.pt --out result.json"""

SELFCHECK = """\
Runs every kernel, in every configuration that dispatch can choose on the device (its table's tiles and the defaults),
forward, backward and at inference, on small shapes and those of Jasper 10x5, and holds the results against fp64: an
error may be twice that of plain PyTorch at the same precision, plus roundings. The kernels run in a process of their
own: one that crashes or hangs is a verdict, not the end. backend="auto" uses the kernels of a GPU only where the
verdict, which is kept by dtype, GPU, driver and versions, is good; what a machine lacks for a check (a compiler,
memory) is said, and is no verdict. Ended early, by Ctrl-C for one, it keeps the verdicts that it has reached. Without
a GPU the kernels of the CPU are checked, and with TRITON_INTERPRET=1 Triton's in its interpreter."""
SELFCHECK_END = """\
exit status: 0 if every check passed, 1 otherwise, 2 for a wrong command.

example: jasper-fast selfcheck --device cuda:0 --quick --dtype fp16"""

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class UsageError(Exception):
    """The command line asks for what cannot be done."""


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__
    return parse


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="weights: of this project, of NVIDIA's Jasper for PyTorch, or a .nemo archive",
    )
    group.add_argument("--config", metavar="YAML", help="model configuration, where the checkpoint carries none")
    group.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    group.add_argument(
        "--backend", default="auto", help="auto, reference, cpu, triton or cuda; see `jasper-fast info` (default: auto)"
    )
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="of weights and activations (default: the checkpoint's); fast: fp16 on a GPU, bf16 on a CPU that has it",
    )
    group.add_argument("--batch-size", type=_positive(int), default=16, metavar="N", help="utterances at a time (16)")
    group.add_argument(
        "--max-seconds", type=_positive(float), default=240.0, metavar="S", help="padded audio at a time (240 s)"
    )
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read audio (0: this one)")
    group.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads (default: PyTorch's)")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def parser() -> argparse.ArgumentParser:
    from jasper_fast import __version__

    top = argparse.ArgumentParser(
        prog="jasper-fast",
        description="Jasper speech recognition with fused kernels: transcribe files, measure error rates, look around.",
        epilog="`jasper-fast COMMAND --help` explains a command; training: `python train.py --help`.",
    )
    top.add_argument("--version", action="version", version=f"jasper_fast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    one = commands.add_parser(
        "transcribe", help="audio files to text", description=TRANSCRIBE, epilog=TRANSCRIBE_END, formatter_class=raw
    )
    one.add_argument("files", nargs="*", metavar="FILE", help="audio files")
    one.add_argument("--list", metavar="FILE", help="a text file that names more audio files, one a line ('-': stdin)")
    one.add_argument("--json", action="store_true", help="JSON lines with words, their times and confidences")
    one.add_argument("--out", metavar="FILE", help="write there instead of to the standard output")
    one.add_argument("--strict", action="store_true", help="exit with 1 if any file could not be read")
    _add_model(one)
    one.set_defaults(run=_transcribe)

    one = commands.add_parser(
        "evaluate",
        help="word and character error rate on a manifest",
        description=EVALUATE,
        epilog=EVALUATE_END,
        formatter_class=raw,
    )
    one.add_argument("--manifest", required=True, action="append", metavar="FILE", help="may be given several times")
    one.add_argument("--data-dir", metavar="DIR", help="where the manifest's paths start (default: its own folder)")
    one.add_argument("--worst", type=int, default=10, metavar="N", help="how many of the worst to show (10)")
    one.add_argument("--out", metavar="FILE", help="write figures and every utterance as JSON")
    one.add_argument("--strict", action="store_true", help="exit with 1 if any file could not be read")
    _add_model(one)
    one.set_defaults(run=_evaluate)

    one = commands.add_parser(
        "info",
        help="machine, backends, versions, and how to get what is missing",
        description="Shows the machine, which backends run on it, versions, and how to get what is missing.",
    )
    one.add_argument("--json", action="store_true", help="the same as JSON")
    one.set_defaults(run=_info)

    one = commands.add_parser(
        "selfcheck",
        help="are the kernels right on this machine? every one against fp64",
        description=SELFCHECK,
        epilog=SELFCHECK_END,
        formatter_class=raw,
    )
    one.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    one.add_argument("--quick", action="store_true", help="seconds: default tiles, two shapes, one dtype")
    one.add_argument(
        "--dtype", action="append", choices=tuple(_DTYPES), metavar="D",
        help="fp32, fp16 or bf16, may be repeated; default: all, with --quick one",
    )  # fmt: skip
    one.add_argument("--json", action="store_true", help="every check and the verdicts as JSON")
    one.add_argument("--no-cache", action="store_true", help="do not keep the verdicts")
    one.add_argument(
        "--limit", type=_positive(float), default=180.0, metavar="S", help="for one check, compilation included (180 s)"
    )
    one.set_defaults(run=_selfcheck)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status; what users get wrong is one line, never a traceback."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("jasper-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jasper-fast ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _expected() as error:
        print(f"jasper-fast {arguments.command}: error: {error}", file=sys.stderr)
        return 2


def _expected() -> tuple[type[BaseException], ...]:
    """Errors whose message is meant for users."""
    from jasper_fast.dispatch.backends import BackendMissing
    from jasper_fast.nn.checkpoint import CheckpointError

    return (UsageError, BackendMissing, CheckpointError, ValueError, OSError)


def _recognizer(arguments: argparse.Namespace) -> Recognizer:
    import torch

    from jasper_fast.dispatch import backends
    from jasper_fast.inference import recognizer

    backends.check(arguments.backend)
    if arguments.workers < 0:
        raise UsageError(f"--workers {arguments.workers} is negative")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        torch.device("cpu" if arguments.device == "auto" else arguments.device)
    except RuntimeError as error:
        raise UsageError(f"--device {arguments.device!r} is no device; give cpu, cuda or cuda:1") from error
    dtype = None if arguments.dtype is None else getattr(torch, _DTYPES[arguments.dtype])
    return recognizer.load(
        arguments.checkpoint, arguments.config, arguments.ema, arguments.device, arguments.backend, dtype
    )


@contextmanager
def _bar(arguments: argparse.Namespace, what: str, total: int):
    """A progress bar on the standard error, where that is a terminal; gives a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = arguments.quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _report_skipped(skipped: SkipReport, total: int) -> None:
    for item in skipped.items:
        print(f"skipped ({item.reason}): {item.detail}", file=sys.stderr)
    if len(skipped):
        print(f"{len(skipped)} of {total} could not be used", file=sys.stderr)


def _speed(result: Recognition) -> str:
    return (
        f"{result.audio_seconds:.1f} s of audio in {result.wall_seconds:.2f} s: RTFx "
        f"{result.audio_seconds / max(result.wall_seconds, 1e-9):.1f} with reading, "
        f"{result.audio_seconds / max(result.compute_seconds, 1e-9):.1f} without"
    )


def _write(path: str, text: str) -> None:
    """Writes text so that the file is whole or not there."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


def _check_writable(path: str | None) -> None:
    if path and not Path(path).resolve().parent.is_dir():
        raise UsageError(f"--out {path}: the folder {Path(path).resolve().parent} does not exist")


def _listed(arguments: argparse.Namespace) -> list[str]:
    files = list(arguments.files)
    if arguments.list:
        source = sys.stdin.read() if arguments.list == "-" else Path(arguments.list).read_text(encoding="utf-8")
        files += [line.strip() for line in source.splitlines() if line.strip()]
    if not files:
        raise UsageError("no files; name audio files, or a list of them with --list")
    return files


def _transcribe(arguments: argparse.Namespace) -> int:
    files = _listed(arguments)
    _check_writable(arguments.out)
    recognizer = _recognizer(arguments)
    from jasper_fast.data import manifest
    from jasper_fast.speech import audio

    utterances = []
    for file in files:
        try:
            seconds = audio.duration(file)
        except audio.AudioError:
            seconds = 0.0  # reading it will say why
        utterances.append(manifest.Utterance(file, seconds, ""))
    with _bar(arguments, "transcribing", len(files)) as advance:
        result = recognizer.recognize(
            utterances, arguments.batch_size, arguments.max_seconds, arguments.workers, advance
        )
    lines = []
    for file, transcript, seconds in zip(files, result.transcripts, result.seconds, strict=True):
        if transcript is None:
            continue
        if not arguments.json:
            lines.append(f"{file}\t{transcript.text.strip()}")
            continue
        words = [
            {"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3), "confidence": round(w.confidence, 4)}
            for w in transcript.words
        ]
        record = {"audio_filepath": file, "duration": round(seconds, 3), "pred_text": transcript.text.strip()}
        record |= {"confidence": round(transcript.confidence, 4), "words": words}
        lines.append(json.dumps(record, ensure_ascii=False))
    text = "".join(f"{line}\n" for line in lines)
    if arguments.out:
        _write(arguments.out, text)
    else:
        sys.stdout.write(text)
        sys.stdout.flush()
    _report_skipped(result.skipped, len(files))
    if not arguments.quiet:
        print(_speed(result), file=sys.stderr)
    return int(not lines or (arguments.strict and len(lines) < len(files)))


def _evaluate(arguments: argparse.Namespace) -> int:
    from jasper_fast.data import manifest
    from jasper_fast.speech.metrics import character_errors, word_errors

    _check_writable(arguments.out)
    utterances = [u for path in arguments.manifest for u in manifest.read_manifest(path, arguments.data_dir)]
    recognizer = _recognizer(arguments)
    with _bar(arguments, "evaluating", len(utterances)) as advance:
        result = recognizer.recognize(
            utterances, arguments.batch_size, arguments.max_seconds, arguments.workers, advance
        )
    rows = []
    for utterance, reference, transcript, seconds in zip(
        utterances, result.references, result.transcripts, result.seconds, strict=True
    ):
        if transcript is None:
            continue
        words, characters = word_errors(reference, transcript.text), character_errors(reference, transcript.text)
        row = {"audio_filepath": utterance.path, "offset": utterance.offset, "duration": round(seconds, 3)}
        row |= {"text": reference, "pred_text": transcript.text.strip(), "confidence": round(transcript.confidence, 4)}
        row |= {"word_errors": words.total, "words": words.length}
        rows.append(row | {"character_errors": characters.total, "characters": characters.length})
    _report_skipped(result.skipped, len(utterances))
    if not rows:
        print("no utterance could be read", file=sys.stderr)
        return 1
    report = _figures(arguments, recognizer, result, rows)
    if arguments.out:
        _write(arguments.out, json.dumps(report | {"utterances_list": rows}, indent=1, ensure_ascii=False) + "\n")
    _show(report, rows, arguments.worst)
    print(_speed(result))
    return int(arguments.strict and len(rows) < len(utterances))


def _figures(arguments: argparse.Namespace, recognizer: Recognizer, result: Recognition, rows: list[dict]) -> dict:
    import torch

    from jasper_fast import __version__
    from jasper_fast.speech.metrics import character_errors, word_errors

    references, hypotheses = [r["text"] for r in rows], [r["pred_text"] for r in rows]
    words, characters = word_errors(references, hypotheses), character_errors(references, hypotheses)
    return {
        "wer": words.rate,
        "cer": characters.rate,
        "utterances": len(rows),
        "words": words.length,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "audio_seconds": round(result.audio_seconds, 3),
        "wall_seconds": round(result.wall_seconds, 3),
        "compute_seconds": round(result.compute_seconds, 3),
        "rtfx": result.audio_seconds / max(result.wall_seconds, 1e-9),
        "rtfx_compute": result.audio_seconds / max(result.compute_seconds, 1e-9),
        "skipped": [item._asdict() for item in result.skipped.items],
        "manifests": arguments.manifest,
        "checkpoint": arguments.checkpoint,
        "ema": arguments.ema,
        "device": str(recognizer.device),
        "backend": arguments.backend,
        "threads": torch.get_num_threads(),
        "versions": {"jasper_fast": __version__, "torch": torch.__version__},
    }


def _show(report: dict, rows: list[dict], worst: int) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]WER {100 * report['wer']:.2f} %  CER {100 * report['cer']:.2f} %[/bold]  "
        f"{report['utterances']} utterances, {report['words']} words: {report['substitutions']} substituted, "
        f"{report['deletions']} deleted, {report['insertions']} inserted"
    )
    bad = sorted((r for r in rows if r["word_errors"]), key=lambda r: r["word_errors"] / max(r["words"], 1))
    for row in bad[::-1][: max(worst, 0)]:
        console.print(f"{row['word_errors']}/{row['words']}  {escape(row['audio_filepath'])}")
        console.print(f"      said  {escape(row['text'])}\n      heard {escape(row['pred_text'])}")


def _info(arguments: argparse.Namespace) -> int:
    from jasper_fast.cli import info

    report = info.collect()
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() else 140  # a file or a pipe has no edge to wrap at
        info.render(report, Console(highlight=False, width=width))
    return 0


def _selfcheck(arguments: argparse.Namespace) -> int:
    import torch

    from jasper_fast.dispatch import probe
    from jasper_fast.selfcheck import show

    wanted = arguments.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(f"--device {wanted!r} is no device; give cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = torch.cuda.current_device() if device.index is None and count else device.index or 0
        if index >= count:
            raise UsageError(f"--device {wanted}: PyTorch sees {count} GPUs here; `jasper-fast info` says more")
        device = torch.device("cuda", index)
    try:
        return show.main(
            device,
            quick=arguments.quick,
            as_json=arguments.json,
            cache=not arguments.no_cache,
            dtypes=[_DTYPES[name] for name in arguments.dtype or ()],
            seconds=arguments.limit,
        )
    except probe.CannotCheck as error:
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
