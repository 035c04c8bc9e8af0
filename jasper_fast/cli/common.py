"""Shared by several subcommands: the options for a model and its decoding, recognition, and output."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jasper_fast.extras import need
from jasper_fast.kernels import files
from jasper_fast.options import add, option

if TYPE_CHECKING:
    import torch

    from jasper_fast.data.manifest import Utterance
    from jasper_fast.inference.recognizer import Recognition, Recognizer
    from jasper_fast.training.runs import Ranks

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class UsageError(Exception):
    """Raised if a command line cannot be carried out. The message says what to change."""


def subcommand(commands: Any, name: str, run: Callable, options: dict, help: str, description: str, end: str) -> None:
    """Adds a subcommand that calls `run`."""
    parser = commands.add_parser(
        name, help=help, description=description, epilog=f"Defaults are in parentheses.\n\n{end}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add(parser, options)
    parser.set_defaults(run=run)


def add_modules(commands: Any, *modules: ModuleType) -> None:
    """Adds a subcommand for each module. In the list of commands its help is the title of the module's docstring, from
    the colon on. The rest of the docstring is the description, and the module's END follows the options."""
    for module in modules:
        title, _, description = (module.__doc__ or "").partition("\n\n")
        help = " ".join(title.partition(": ")[2].removesuffix(".").split())
        name = module.__name__.rpartition(".")[2]
        subcommand(commands, name, module.run, module.OPTIONS, help, description, module.END)


@contextmanager
def bars(quiet: bool = False) -> Iterator[Callable[[str, int, int | None], None]]:
    """A context that shows progress bars on the standard error. Yields the function ``progress(what, done, total)``,
    which updates the bar called ``what``."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    rich = need("rich.progress", "train")
    with rich.Progress(transient=True, console=need("rich.console", "train").Console(stderr=True)) as shown:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total, visible=done != total)

        yield progress


def positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__
    return parse


DEVICE = option(
    "--device", default="auto", help="device to run on: cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
)
MODEL = {  # the options that `load` and `recognize` read
    "model": [
        option(
            "--checkpoint",
            required=True,
            metavar="FILE",
            help="weights of this project, of NVIDIA's Jasper for PyTorch, or a .nemo archive",
        ),
        option("--config", metavar="YAML", help="model configuration, if the checkpoint has none"),
        option("--ema", action="store_true", help="use the moving average of the weights"),
        DEVICE,
        option(
            "--backend",
            default="auto",
            help="kernels to use: auto, reference, cpu, triton or cuda; see `jasper-fast info` (auto)",
        ),
    ],
    "speed": [
        option(
            "--fp32-precision",
            choices=("ieee", "tf32"),
            help="precision of the model's fp32 products on a GPU (tf32 in convs, ieee elsewhere)",
        ),
        option(
            "--dtype",
            choices=tuple(DTYPES),
            help="dtype of weights and activations (the checkpoint's); fp16 is faster on a GPU, and bf16 on a CPU with "
            "AVX512-BF16",
        ),
        option("--batch-size", type=positive(int), default=16, metavar="N", help="most utterances in a batch (16)"),
        option(
            "--max-seconds",
            type=positive(float),
            default=240.0,
            metavar="S",
            help="most seconds of audio in a batch, padding included (240)",
        ),
        option("--workers", type=int, default=0, metavar="N", help="processes that read audio; 0: this process (0)"),
        option("--threads", type=positive(int), metavar="N", help="CPU threads (PyTorch's default)"),
        option("-q", "--quiet", action="store_true", help="show no progress"),
    ],
}

DECODING = {  # the options of `decoder`
    "decoding": [
        option(
            "--lm",
            metavar="FILE",
            help="language model: ARPA or KenLM binary of words, ARPA of the model's symbols, or the YAML file of "
            "`lm tune`. Without any option of this group decoding is greedy",
        ),
        option(
            "--lexicon", metavar="FILE", help="the words that can be recognised, one per line (those of the ARPA file)"
        ),
        option(
            "--open-vocabulary", action="store_true", help="also recognise words that the language model does not list"
        ),
        option(
            "--unknown-score",
            type=float,
            metavar="S",
            help="score added for each unlisted word, in natural logarithms, on top of the language model's score of "
            "<unk> (-10)",
        ),
        option(
            "--hot-word",
            action="append",
            default=[],
            metavar="WORD[:BOOST]",
            help="a word to prefer, with or without a language model; may be given several times. BOOST is the score "
            "added for each occurrence, in natural logarithms (5)",
        ),
        option("--hot-words", metavar="FILE", help="hot words, one per line, each with or without a boost after it"),
        option("--beam", type=positive(int), metavar="N", help="width of the beam search (128)"),
        option(
            "--alpha",
            type=float,
            metavar="A",
            help="weight of the language model's log10 p (2.0 for words, as in the Jasper paper; 1.0 for symbols)",
        ),
        option(
            "--beta",
            type=float,
            metavar="B",
            help="score added for each word with a model of words (-0.2), otherwise for each symbol (0.0)",
        ),
        option("--n-best", type=positive(int), metavar="K", help="keep the K best texts of each utterance"),
        option(
            "--rescore",
            metavar="MODEL",
            help="neural language model (`lm train-neural`) that rescores the best texts of the search: 64, or "
            "--n-best if that is more",
        ),
        option("--rescore-weight", type=float, metavar="W", help="weight of the neural model's natural log p (1.0)"),
        option(
            "--decode-processes",
            type=positive(int),
            metavar="N",
            help="processes that run the word search while the model computes the next batch (one per core)",
        ),
    ],
}


def decoder(arguments: argparse.Namespace, vocabulary: Any) -> Any:
    """Returns the beam search that the options of DECODING ask for, or None for greedy decoding."""
    from jasper_fast.lm import decoders, spelt, tuned

    asked = {name: getattr(arguments, name) for name in ("beam", "alpha", "beta", "n_best")} | {
        "hot_words": _hot_words(arguments) or None
    }
    file, lexicon, model, weight = (getattr(arguments, n) for n in ("lm", "lexicon", "rescore", "rescore_weight"))
    unknown = arguments.unknown_score
    if arguments.open_vocabulary and unknown is None:
        unknown = spelt.UNKNOWN
    if file is not None and tuned.is_settings(file):
        settings = tuned.read(file)
        file, lexicon = settings.get("lm"), lexicon or settings.get("lexicon")
        asked |= {name: settings.get(name) for name in ("beam", "alpha", "beta") if asked[name] is None}
        if model is None and weight != 0:
            model = settings.get("rescore")
            weight = settings.get("rescore_weight") if weight is None else weight
    for name, value, given, needed in (
        ("--lexicon", arguments.lexicon, file, "--lm"),
        ("--alpha", arguments.alpha, file, "--lm"),
        ("--open-vocabulary", arguments.open_vocabulary or None, file, "--lm"),
        ("--unknown-score", arguments.unknown_score, file, "--lm"),
        ("--rescore-weight", weight or None, model, "--rescore"),
    ):
        if value is not None and given is None:
            raise UsageError(f"{name} needs a language model; name one with {needed}")
    if arguments.lm is None and model is None and all(value is None for value in asked.values()):
        return None
    lm = decoders.load_lm(file, vocabulary, lexicon, unknown) if file is not None else None
    if left_out := getattr(lm, "left_out", ()):
        print(f"{len(left_out)} words of {lexicon or file} cannot be spelt with the labels, such as {left_out[0]!r}; "
              "they are left out", file=sys.stderr)  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    given["processes"] = arguments.decode_processes
    if model is None:
        return decoders.decoder(vocabulary, lm, **given)
    from jasper_fast.lm.neural import scoring
    from jasper_fast.lm.rescore import LISTED, Rescoring

    scorer, kept = scoring.load(model, device_of(arguments.device)), given.get("n_best", 1)
    first = decoders.decoder(vocabulary, lm, **given | {"n_best": max(kept, LISTED)})
    return Rescoring(first, scorer, vocabulary, 1.0 if weight is None else weight, kept)


def _hot_words(arguments: argparse.Namespace) -> dict[str, float]:
    from jasper_fast.lm.spelt import BOOST

    found = {}
    for text in arguments.hot_word:
        word, colon, boost = text.rpartition(":")
        found[word if colon else text] = _boost(f"--hot-word {text}", boost) if colon else BOOST
    if arguments.hot_words:
        try:
            lines = Path(arguments.hot_words).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--hot-words {arguments.hot_words}: cannot be read ({error})") from None
        for number, line in enumerate(lines, 1):
            where = f"{arguments.hot_words}, line {number}"
            if len(parts := line.split()) > 2:
                raise UsageError(f"{where}: needs a word, or a word and its boost, not {line[:60]!r}")
            if parts:
                found[parts[0]] = _boost(where, parts[1]) if parts[1:] else BOOST
    return found


def _boost(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{where}: the boost {text!r} is not a number") from None


def device_of(text: str) -> torch.device:
    """Returns the device that `--device` names. Raises UsageError if it names none."""
    import torch

    try:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text)
    except RuntimeError as error:
        raise UsageError(f"--device {text!r} is not a device; give cpu, cuda or cuda:1") from error


def load(arguments: argparse.Namespace) -> Recognizer:
    """Loads the model and decoder that the options of MODEL and DECODING ask for."""
    import torch

    from jasper_fast.dispatch import backends
    from jasper_fast.inference import recognizer

    backends.check(arguments.backend)
    if arguments.workers < 0:
        raise UsageError(f"--workers {arguments.workers} is negative")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    made = recognizer.load(
        arguments.checkpoint,
        arguments.config,
        arguments.ema,
        device_of(arguments.device),
        arguments.backend,
        None if arguments.dtype is None else getattr(torch, DTYPES[arguments.dtype]),
        arguments.fp32_precision,
    )
    made.decoder = decoder(arguments, made.vocabulary)
    return made


def recognize(
    arguments: argparse.Namespace,
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    window: int | None = None,
    keep: Callable[[int, torch.Tensor], None] | None = None,
) -> Iterator[Recognition]:
    """Yields the results after each batch, like ``Recognizer.stream``. Prints on the standard error which utterances
    were skipped or incomplete and, on a terminal, the progress."""
    total, told, warned = len(utterances), 0, 0
    for result in recognizer.stream(
        utterances, arguments.batch_size, arguments.max_seconds, arguments.workers, window, keep
    ):
        for item in result.skipped.items[told:]:
            print(f"skipped ({item.reason}): {item.detail}", file=sys.stderr)
        for item in result.skipped.warned[warned:]:
            print(f"warning ({item.reason}): {item.detail}; the available audio was used", file=sys.stderr)
        told, warned = len(result.skipped), len(result.skipped.warned)
        count(result.finished, total, "utterances", arguments.quiet)
        yield result
    for line in result.skipped.losses:
        print(line, file=sys.stderr)
    if told:
        print(f"{told} of {total} utterances could not be used", file=sys.stderr)


def hypotheses(transcript: Any) -> dict[str, list[dict[str, Any]]]:
    """Returns the hypotheses of a beam search as an entry of a JSON record, or an empty dict after greedy decoding."""
    found = [
        {"text": h.text.strip(), "score": round(h.score, 4), "log_prob": round(h.log_prob, 4)}
        for h in transcript.hypotheses
        if math.isfinite(h.score)
    ]
    return {"hypotheses": found} if transcript.hypotheses else {}


def share(sizes: Sequence[float], rank: int, world: int) -> list[int]:
    """Returns the sorted indices of the items of process ``rank``. Every process gets a similar mix of sizes."""
    by_size = sorted(range(len(sizes)), key=lambda i: sizes[i])
    return sorted(by_size[rank::world])


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Ranks]:
    """A context in which this process belongs to the group that torchrun made, if any. Yields its place in the group.

    In the group, a device "auto" or "cuda" in ``arguments`` becomes this process's GPU, if there are GPUs, and
    ``quiet`` is set in all processes except the first.
    """
    import torch

    from jasper_fast.training import runs

    rank, world, local = runs.launched()
    if world == 1:
        yield runs.Ranks(0, 1, torch.device("cpu"))
        return
    if arguments.device in ("auto", "cuda") and torch.cuda.is_available():
        arguments.device = f"cuda:{local}"
    arguments.quiet = arguments.quiet or rank > 0
    torch.distributed.init_process_group("gloo")  # only texts and numbers are exchanged, on the CPU
    try:
        yield runs.Ranks(rank, world, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()


def count(done: int, total: int, what: str, quiet: bool) -> None:
    """Shows on a terminal how much is done. Each call overwrites the line of the previous call."""
    if sys.stderr.isatty() and not quiet:
        print(f"\r{done} of {total} {what}", end="\r" if done < total else "\n", file=sys.stderr, flush=True)


def any_name() -> None:
    """Lets the standard output print any file name. Text is written in UTF-8, and bytes that are not UTF-8 are written
    unchanged."""
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


def speed(result: Recognition) -> str:
    return (
        f"{result.audio_seconds:.1f} s of audio in {result.wall_seconds:.2f} s: RTFx "
        f"{result.audio_seconds / max(result.wall_seconds, 1e-9):.1f} with reading, "
        f"{result.audio_seconds / max(result.compute_seconds, 1e-9):.1f} without"
    )


def write(path: str, text: str) -> None:
    """Writes text to a file, which is replaced atomically. To a device or a pipe the text is written directly."""
    target, content = Path(path), text.encode("utf-8", "backslashreplace")  # bytes that are not UTF-8 become \udcXX
    if target.exists() and not target.is_file():
        target.write_bytes(content)
    else:
        files.write(target, content)


def check_writable(*paths: str | None, folder: bool = False) -> None:
    """Raises UsageError for an output that cannot be made, because the folder that would contain it does not exist or
    because it is a folder itself, and for two outputs with one name. With ``folder`` the outputs are folders: an
    existing folder is accepted, and an existing file is not."""
    named = [Path(path) for path in paths if path]
    # Devices are left out, because several outputs may go to one.
    places = [path.resolve() for path in named if path.is_file() or not path.exists()]
    if len(set(places)) < len(places):
        raise UsageError(f"each file to write needs its own name, got {', '.join(map(str, named))}")
    for path in named:
        if path.exists() and path.is_dir() != folder:
            raise UsageError(f"{path}: {'is no folder' if folder else 'is a folder'}; choose another name")
        if not path.resolve().parent.is_dir():
            raise UsageError(f"{path}: the folder {path.resolve().parent} does not exist")
