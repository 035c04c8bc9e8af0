"""Measures how many errors a language model saves, compared with greedy decoding, on speech not used in training.

    python -m jasper_fast.demo.decoding --out build/decoding
    python -m jasper_fast.demo.decoding --out build/digits --digits FOLDER

Trains a small Jasper on synthetic commands, or on strings joined from recordings of single digits. From the training
texts, trains an n-gram model of words and one of characters. Chooses alpha and beta on every other test utterance, and
counts errors on the rest. Intervals are 95 % intervals by a paired bootstrap over utterances.
"""

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import yaml

from jasper_fast.data.manifest import Utterance, read_manifest
from jasper_fast.data.prepare.writing import write_manifest
from jasper_fast.demo import corpus, learn
from jasper_fast.inference.recognizer import Recognizer
from jasper_fast.lm.decoders import decoder, load_lm
from jasper_fast.lm.saved import Saved
from jasper_fast.lm.train import train
from jasper_fast.lm.tune import Trial, best, trials
from jasper_fast.speech import audio
from jasper_fast.speech.decoding import Hypothesis, greedy_decode
from jasper_fast.speech.metrics import word_errors

RATE = 8000  # sample rate of the digits
DIGITS = ("digits_fsdd_train.jsonl", "digits_fsdd_dev.jsonl")  # manifests for training and for testing
GRID = list(itertools.product((0.0, 0.5, 1.0, 1.5, 2.0, 3.0), (-1.0, 0.0, 1.0)))


def strings(manifest: Path, out: Path, count: int | None, words: tuple[int, int], seed: int) -> Path:
    """Joins recordings of single words into strings, each by one speaker, and returns the path of their manifest.

    ``count`` strings are made, of recordings drawn with repetition. With None, each recording is used in exactly one
    string. ``words``: the smallest and the largest number of words in a string. With None the last string of a speaker
    may have fewer.
    """
    clips: dict[str, list[Utterance]] = {}
    rng, made = np.random.default_rng(seed), []
    for utterance in read_manifest(manifest):
        clips.setdefault(utterance.speaker or "", []).append(utterance)
    out.mkdir(parents=True, exist_ok=True)
    for i, chosen in enumerate(_drawn(clips, count, words, rng)):
        pieces = [pause(rng)]
        for utterance in chosen:
            pieces += [audio.load(utterance.path, RATE), pause(rng)]
        joined, text = np.concatenate(pieces), " ".join(u.text for u in chosen)
        corpus.record(out / f"{i:05}.wav", joined, RATE, rng.uniform, rng)
        made.append({"audio_filepath": f"{i:05}.wav", "duration": len(joined) / RATE, "text": text})
    write_manifest(out / "manifest.jsonl", made)
    return out / "manifest.jsonl"


def pause(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(int(RATE * rng.uniform(0.05, 0.25)), np.float32)


def _drawn(
    clips: dict[str, list[Utterance]], count: int | None, words: tuple[int, int], rng: np.random.Generator
) -> Iterator[list[Utterance]]:
    of = lambda: int(rng.integers(words[0], words[1] + 1))  # noqa: E731
    for i in range(count or 0):
        pool = clips[sorted(clips)[i % len(clips)]]
        yield [pool[j] for j in rng.integers(0, len(pool), of())]
    for speaker in sorted(clips) if count is None else ():
        left = rng.permutation(len(clips[speaker])).tolist()
        while left:
            size = of()
            yield [clips[speaker][j] for j in left[:size]]
            del left[:size]


def spelt(heard: Path, out: Path) -> Path:
    """Writes a variant of configs/digits.yaml. Its labels are letters (those of the training texts), not words, and its
    tempo perturbation is weaker."""
    config = yaml.safe_load((files("jasper_fast.configs") / "digits.yaml").read_text())
    config["labels"] = sorted({" "}.union(*(u.text for u in read_manifest(heard))))
    config["input_train"]["audio_dataset"]["tempo_perturbation"] = {"min_rate": 0.75, "max_rate": 1.3}
    out.write_text(yaml.safe_dump(config, sort_keys=False))
    return out


def say(model: torch.nn.Module, utterances: list[Utterance], folder: Path) -> Saved:
    """Saves the model's log-probs of the utterances in `folder`."""
    recognizer = Recognizer(model)
    saved = Saved.begin(folder, recognizer)
    *_, result = recognizer.stream(utterances, keep=saved.keep)
    saved.finish([u.path for u in utterances], result.references)
    return saved


def part(saved: Saved, of: slice) -> Saved:
    """Returns the utterances in the slice ``of``."""
    made = Saved(saved.folder, saved.vocabulary, saved.frame_seconds)
    made.utterances = saved.utterances[of]
    return made


def errors(saved: Saved, texts: list[str]) -> np.ndarray:
    """Returns the word errors and the reference words of each utterance, (utterances, 2)."""
    counted = [word_errors(u["text"], text) for u, text in zip(saved.utterances, texts, strict=True)]
    return np.array([(e.total, e.length) for e in counted])


def gain(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Returns by how many per cent the errors fall, and the ends of the 95 % interval from a paired bootstrap."""
    picks = np.random.default_rng(0).integers(0, len(before), (4000, len(before)))
    ratios = 1 - after[picks, 0].sum(1) / np.maximum(before[picks, 0].sum(1), 1)
    return 100 * (1 - after[:, 0].sum() / before[:, 0].sum()), *(100 * np.percentile(ratios, (2.5, 97.5)))


def fewer(before: np.ndarray, after: np.ndarray) -> str:
    """Returns `gain` in words, or "-" if there was no error before."""
    return "{:.1f} % [{:.1f}, {:.1f}] fewer errors".format(*gain(before, after)) if before[:, 0].any() else "-"


def rate(counted: np.ndarray) -> float:
    """Returns the word error rate, in per cent. `counted` is a result of `errors`."""
    return 100 * counted[:, 0].sum() / counted[:, 1].sum()


def decoded(saved: Saved, lm: Path | None, trial: Trial, beam: int, n_best: int = 1) -> list[Sequence[Hypothesis]]:
    """Returns the ``n_best`` texts of each utterance with alpha and beta of ``trial``."""
    loaded = load_lm(lm, saved.vocabulary) if lm else None
    search = decoder(saved.vocabulary, loaded, beam=beam, alpha=trial.alpha, beta=trial.beta, n_best=n_best)
    with contextlib.closing(search):
        begun = [search.begin(*one, saved.frame_seconds) for one in saved.batches()]
        return [transcript.hypotheses for heard in begun for transcript in heard()]


def compare(saved: Saved, texts: Path, out: Path, beam: int) -> list[str]:
    """Trains both n-gram models in `out`, and returns the lines of the result: greedy decoding, then each search."""
    words, symbols = out / "words.arpa", out / "symbols.arpa"
    train([texts], words, 3)
    train([texts], symbols, 6, characters=True)
    chosen_on, judged_on = part(saved, slice(0, None, 2)), part(saved, slice(1, None, 2))
    base = errors(judged_on, [greedy_decode(*one, saved.vocabulary)[0] for one in judged_on.batches()])
    lines = [f"{len(base)} utterances, {base[:, 1].sum()} words; greedy WER {rate(base):.2f} %"]
    for name, lm in (("no language model", None), ("6-gram of characters", symbols), ("3-gram of words", words)):
        trial = best([*trials(chosen_on, lm, None, GRID if lm else [(0.0, 0.0)], beam)])
        found = errors(judged_on, [texts[0].text for texts in decoded(judged_on, lm, trial, beam)])
        weights = f"alpha {trial.alpha:g}, beta {trial.beta:g}"
        lines.append(f"beam {beam}, {name}: WER {rate(found):.2f} %, {fewer(base, found)}, {weights}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all files; it must not exist yet")
    parser.add_argument("--digits", type=Path, metavar="FOLDER", help=f"folder with {' and '.join(DIGITS)}")
    parser.add_argument("--steps", type=int, help="training steps (1500, or 3000 for digits)")
    parser.add_argument("--minutes", type=float, default=40.0, help="most minutes of training (40)")
    parser.add_argument("--beam", type=int, default=128, help="width of the beam search (128)")
    arguments = parser.parse_args()
    out, digits = arguments.out, arguments.digits
    for name in DIGITS if digits else ():
        if not (digits / name).is_file():
            print(f"skipped: {digits / name} does not exist")
            return
    out.mkdir(parents=True)
    if digits:
        heard = strings(digits / DIGITS[0], out / "train", 3000, (1, 4), 0)
        test = strings(digits / DIGITS[1], out / "test", None, (3, 7), 1)
        config, steps, batch_size = spelt(heard, out / "config.yaml"), 3000, 16
    else:
        heard = corpus.synthesise(out / "corpus", "train", 1500)
        test = corpus.synthesise(out / "corpus", "test", 400)
        config, steps, batch_size = learn.CONFIG, 1500, learn.BATCH_SIZE
    model, *_ = learn.learn(
        config, (heard, test), out / "run", arguments.steps or steps, arguments.minutes, "cpu", batch_size=batch_size
    )
    texts = out / "texts.txt"
    texts.write_text("".join(u.text + "\n" for u in read_manifest(heard)))
    lines = compare(say(model.eval(), read_manifest(test), out / "log_probs"), texts, out, arguments.beam)
    (out / "result.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
