"""`jasper-fast lm`: train and describe language models, measure perplexity, and tune weights."""

import argparse
import itertools
import json
import random
import sys
from typing import Any

from jasper_fast.cli import common
from jasper_fast.lm.neural.options import OPTIONS as _TRAIN_NEURAL
from jasper_fast.options import option

HELP = "language models: train n-grams or neural ones, describe them, tune their weights"

_TRAIN = {
    "": [
        option("texts", nargs="+", metavar="TEXT", help="UTF-8 text files, gzipped or not, one sentence per line"),
        option("--order", type=int, required=True, metavar="N", help="words or characters of the longest n-grams, 1-6"),
        option("--out", required=True, metavar="LM.arpa", help="file to write the model to, in ARPA format"),
        option("--characters", action="store_true", help="make n-grams of characters; a space becomes <space>"),
        option("--lower-case", action="store_true", help="lower-case the text first; Jasper's labels are lower-case"),
        option(
            "--prune",
            type=int,
            nargs="+",
            default=[],
            metavar="COUNT",
            help="leave out n-grams that occur at most COUNT times. One count per order, such as `0 0 1`; the first "
            "must be 0, and the last one also applies to all higher orders",
        ),
        option("--memory", type=common.positive(int), default=512, metavar="MB", help="memory for sorting (512)"),
        option("-q", "--quiet", action="store_true", help="show no progress"),
    ]
}
_PERPLEXITY = {
    "": [
        option("lm", metavar="LM", help="language model: ARPA, KenLM binary, or neural"),
        option("text", metavar="TEXT", help="UTF-8 text file, gzipped or not, one sentence per line"),
        option("--lower-case", action="store_true", help="lower-case the text first"),
        option("--json", action="store_true", help="print JSON"),
    ]
}
_INFO = {
    "": [
        option("lm", metavar="LM", help="language model: ARPA, KenLM binary, or neural"),
        option("--json", action="store_true", help="print JSON"),
    ]
}


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


_TUNE = {
    "": [
        option("--log-probs", required=True, metavar="DIR", help="the folder that `evaluate --save-log-probs` wrote"),
        option("--lm", metavar="FILE", help="an n-gram model that `transcribe --lm` reads"),
        option("--lexicon", metavar="FILE", help="the words that can be recognised, one per line"),
        option("--beam", type=common.positive(int), default=128, metavar="N", help="width of the search (128)"),
        option("--alpha", type=numbers, metavar="A,B,..", help="values of --alpha to try (0,0.5,1,1.5,2,2.5,3)"),
        option("--beta", type=numbers, metavar="A,B,..", help="values of --beta to try (-1,-0.5,0,0.5,1)"),
        option("--rescore", metavar="MODEL", help="neural language model that rescores the best texts of the search"),
        option(
            "--rescore-weight",
            type=numbers,
            metavar="A,B,..",
            help="values of --rescore-weight to try (0,0.25,0.5,0.75,1,1.5,2)",
        ),
        option("--device", default="auto", help="device of the neural language model (a GPU if there is one)"),
        option(
            "--random",
            type=common.positive(int),
            metavar="N",
            help="try N random pairs of alpha and beta, between the smallest and the largest values, instead of all "
            "combinations",
        ),
        option("--seed", type=int, default=0, metavar="S", help="seed of --random (0)"),
        option("--out", required=True, metavar="YAML", help="file for the best weights, which `--lm` then reads"),
        option("--report", metavar="HTML", help="write a heat map of the word error rates"),
        option("--processes", type=common.positive(int), metavar="N", help="processes for word search (one per core)"),
        option("-q", "--quiet", action="store_true", help="show no progress"),
    ]
}


def train(arguments: argparse.Namespace) -> None:
    from jasper_fast.lm.train import train

    common.check_writable(arguments.out)
    made = train(
        arguments.texts,
        arguments.out,
        arguments.order,
        characters=arguments.characters,
        lower_case=arguments.lower_case,
        prune=arguments.prune,
        memory=arguments.memory << 20,
        progress=_progress(arguments.quiet),
    )
    kind = "characters" if arguments.characters else "words"
    print(f"{made.sentences} sentences, {made.words} {kind}, vocabulary {made.vocabulary}")
    for n, of in enumerate(made.orders, 1):
        note = " (too few counts to estimate the discounts, so these are fixed values)" if of.fallback else ""
        print(f"{n}-grams {of.ngrams}, discounts {' '.join(f'{d:.3f}' for d in of.discounts)}{note}")


def train_neural(arguments: argparse.Namespace) -> None:
    from jasper_fast.lm.neural.training import train

    common.check_writable(arguments.out, folder=True)
    common.device_of(arguments.device)  # raises if it names no device
    train(arguments)


def _progress(quiet: bool) -> Any:
    if quiet or not sys.stderr.isatty():
        return lambda what, share: None
    return lambda what, share: print(
        f"\r{what} {100 * share:3.0f} % ",
        end="\n" if what == "writing" and share == 1 else "",
        file=sys.stderr,
        flush=True,
    )


def perplexity(arguments: argparse.Namespace) -> None:
    from jasper_fast.lm.queries import perplexity

    found = perplexity(arguments.lm, arguments.text, arguments.lower_case)
    if arguments.json:
        print(json.dumps(vars(found) | {"perplexity": found.value, "perplexity_known": found.known}))
        return
    print(f"perplexity {found.value:.2f}, without unknown words {found.known:.2f}")
    print(
        f"{found.sentences} sentences, {found.words} words, {found.unknown} of them unknown; log10 p {found.log10:.2f}"
    )


def info(arguments: argparse.Namespace) -> None:
    from jasper_fast.lm.queries import describe

    found = describe(arguments.lm)
    if arguments.json:
        print(json.dumps(found))
        return
    order = f", order {found['order']}" if "order" in found else ""
    print(f"{found['file']}: {found['form']}, {found['bytes'] / 2**20:.1f} MiB{order}")
    if "parameters" in found:
        shape = ", ".join(f"{name} {found[name]}" for name in ("layers", "width", "heads", "inner", "memory"))
        print(f"of {found['of']}, vocabulary {found['vocabulary']}; {found['parameters']:,} parameters, {shape}")
        best = f", best perplexity {found['best_perplexity']:.2f}" if found["best_perplexity"] else ""
        print(f"step {found['step']}{best}")
    if "ngrams" in found:
        form = "open (<unk> has a probability)" if found["open"] else "closed (no <unk>)"
        print(f"of {found['of']}, vocabulary {found['vocabulary']}, {form}; least log10 p {found['least_log10']:.2f}")
        print("\n".join(f"{n}-grams {count}" for n, count in enumerate(found["ngrams"], 1)))


def tune(arguments: argparse.Namespace) -> None:
    from jasper_fast.lm import heat_map, tune as tuning, tuned
    from jasper_fast.lm.saved import Saved

    common.check_writable(arguments.out, arguments.report)
    if not tuned.is_settings(arguments.out):
        raise common.UsageError(f"--out {arguments.out}: the name must end in .yaml or .yml for --lm to read it")
    if arguments.lm is None and arguments.rescore is None:
        raise common.UsageError("no language model to tune; name one with --lm, a neural one with --rescore, or both")
    saved, second = Saved.open(arguments.log_probs), None
    if arguments.rescore:
        from jasper_fast.lm.neural import scoring

        second = (
            scoring.load(arguments.rescore, common.device_of(arguments.device)),
            arguments.rescore_weight or [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0],
        )
    alphas = arguments.alpha or ([0.5 * i for i in range(7)] if arguments.lm else [0.0])
    betas = arguments.beta or [-1.0, -0.5, 0.0, 0.5, 1.0]
    grid = list(itertools.product(alphas, betas))
    if arguments.random:
        rng = random.Random(arguments.seed)
        grid = [(rng.uniform(min(alphas), max(alphas)), rng.uniform(min(betas), max(betas)))
                for _ in range(arguments.random)]  # fmt: skip
    lm, lexicon, found = arguments.lm, arguments.lexicon, []
    total = len(grid) * (len(second[1]) if second else 1)
    for trial in tuning.trials(saved, lm, lexicon, grid, arguments.beam, arguments.processes, second):
        found.append(trial)
        common.count(len(found), total, "trials", arguments.quiet)
    without, chosen = tuning.greedy(saved), tuning.best(found)
    settings = {"lm": lm, "lexicon": lexicon, "beam": arguments.beam,
                "alpha": round(chosen.alpha, 6) if lm else None, "beta": round(chosen.beta, 6),
                "rescore": arguments.rescore, "rescore_weight": chosen.rescore if second else None}  # fmt: skip
    again = f", rescoring weight {chosen.rescore:g}" if second else ""
    tuned.write(arguments.out, {name: value for name, value in settings.items() if value is not None})
    if arguments.report:
        of = " and ".join(filter(None, (lm, arguments.rescore)))
        about = f"{of}, beam {arguments.beam}, {len(saved.utterances)} utterances of {arguments.log_probs}"
        common.write(arguments.report, heat_map.page(found, without, about))
    print(f"greedy WER {100 * without.rate:.2f} %; with the language model {100 * chosen.errors.rate:.2f} % at alpha "
          f"{chosen.alpha:g}, beta {chosen.beta:g}{again}; written to {arguments.out}")  # fmt: skip


_COMMANDS = {
    "train": (train, _TRAIN, "train an n-gram of words or characters: interpolated modified Kneser-Ney",
              "jasper-fast lm train corpus.txt --order 4 --out lm.arpa --lower-case"),
    "train-neural": (train_neural, _TRAIN_NEURAL, "train a Transformer-XL of words or characters, for --rescore",
                     "jasper-fast lm train-neural corpus.txt --val dev.txt --lower-case --epochs 10 --out lm"),
    "perplexity": (perplexity, _PERPLEXITY, "measure how well a model predicts a text",
                   "jasper-fast lm perplexity lm.arpa dev.txt"),
    "info": (info, _INFO, "show order, size and vocabulary of a model", "jasper-fast lm info lm.arpa"),
    "tune": (tune, _TUNE, "find the alpha, beta and rescoring weight with the fewest word errors on saved log-probs",
             "jasper-fast lm tune --log-probs dev_log_probs --lm lm.arpa --out lm.yaml --report tune.html"),
}  # fmt: skip


def add(commands: Any) -> None:
    """Adds the command `lm` and its subcommands."""
    inner = commands.add_parser("lm", help=HELP, description=HELP).add_subparsers(
        dest="lm_command", required=True, metavar="COMMAND"
    )
    for name, (run, options, help, example) in _COMMANDS.items():
        common.subcommand(inner, name, run, options, help, f"{help[0].upper()}{help[1:]}.", f"example: {example}")
