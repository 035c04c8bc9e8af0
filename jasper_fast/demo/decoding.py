"""Measures what a language model gains: greedy decoding against beam searches, on voices that were not in training.

    python -m jasper_fast.demo.decoding --out build/decoding
    python -m jasper_fast.demo.decoding --out build/digits --digits FOLDER

Trains a small Jasper on synthetic commands, or on strings joined from recordings of single digits. Trains an n-gram of
the words and one of the characters of the training texts. Chooses alpha and beta on every other test utterance and
counts errors on the rest. Intervals are 95 % intervals by a paired bootstrap over utterances.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

from jasper_fast.data.manifest import Utterance, read_manifest
from jasper_fast.demo import corpus, learn
from jasper_fast.inference.recognizer import Recognizer
from jasper_fast.lm.decoders import decoder, load_lm
from jasper_fast.lm.saved import Saved
from jasper_fast.lm.search import beam_search
from jasper_fast.lm.train import train
from jasper_fast.lm.tune import best, trials
from jasper_fast.speech import audio
from jasper_fast.speech.decoding import greedy_decode
from jasper_fast.speech.metrics import word_errors

RATE = 8000  # sample rate of the digits
DIGITS = ("digits_fsdd_train.jsonl", "digits_fsdd_dev.jsonl")  # to train on, and to test on
GRID = list(itertools.product((0.0, 0.5, 1.0, 1.5, 2.0, 3.0), (-1.0, 0.0, 1.0)))


def strings(manifest: Path, out: Path, count: int | None, words: tuple[int, int], seed: int) -> Path:
    """Joins recordings of single words into strings, each by one speaker, and returns the path of their manifest.

    ``count`` strings are drawn with repetition. With None, each recording is used in exactly one string. ``words``: the
    least and the most words of a string. A little noise is added everywhere, because recordings are never quite silent.
    """
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    clips: dict[str, list[Utterance]] = {}
    rng, out_lines = np.random.default_rng(seed), []
    for line, utterance in zip(lines, read_manifest(manifest), strict=True):
        clips.setdefault(line.get("speaker", ""), []).append(utterance)
    out.mkdir(parents=True, exist_ok=True)
    for i, chosen in enumerate(_drawn(clips, count, words, rng)):
        pieces = [pause(rng)]
        for utterance in chosen:
            pieces += [audio.load(utterance.path, RATE), pause(rng)]
        joined = np.concatenate(pieces)
        joined *= rng.uniform(0.2, 0.6) / np.abs(joined).max()
        joined += rng.standard_normal(len(joined), dtype=np.float32) * 10 ** rng.uniform(-4, -2.5)
        soundfile.write(out / f"{i:05}.wav", joined, RATE, subtype="PCM_16")
        text = " ".join(u.text for u in chosen)
        out_lines.append({"audio_filepath": f"{i:05}.wav", "duration": len(joined) / RATE, "text": text})
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in out_lines))
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
    """Writes a variant of configs/digits.yaml whose labels are the letters of the training texts, not whole words."""
    config = yaml.safe_load((files("jasper_fast.configs") / "digits.yaml").read_text())
    config["labels"] = sorted({" "}.union(*(u.text for u in read_manifest(heard))))
    config["input_train"]["audio_dataset"]["tempo_perturbation"] = {"min_rate": 0.75, "max_rate": 1.3}
    out.write_text(yaml.safe_dump(config, sort_keys=False))
    return out


def say(model: torch.nn.Module, utterances: list[Utterance], folder: Path) -> Saved:
    """Saves the model's log-probs of the utterances in a folder."""
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


def gain(before: np.ndarray, after: np.ndarray, rounds: int = 4000) -> tuple[float, float, float]:
    """Returns by how many per cent the errors fall, and the two ends of the interval by a paired bootstrap."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(before), (rounds, len(before)))
    ratios = 1 - after[picks, 0].sum(1) / np.maximum(before[picks, 0].sum(1), 1)
    return 100 * (1 - after[:, 0].sum() / before[:, 0].sum()), *(100 * np.percentile(ratios, (2.5, 97.5)))


def decoded(saved: Saved, lm: Path | None, weights: tuple[float, float], beam: int) -> list[str]:
    arrays = [torch.from_numpy(saved.log_probs(i)) for i in range(len(saved.utterances))]
    if lm is None:
        return [beam_search(a[None], torch.tensor([len(a)]), saved.vocabulary, beam=beam)[0][0].text for a in arrays]
    search = decoder(saved.vocabulary, load_lm(lm, saved.vocabulary), beam=beam, alpha=weights[0], beta=weights[1])
    texts = [search.begin(a[None], torch.tensor([len(a)]), 0.02)()[0].text for a in arrays]
    search.close()
    return texts


def compare(saved: Saved, texts: Path, out: Path, beam: int) -> list[str]:
    """Returns the lines of the result."""
    words, symbols = out / "words.arpa", out / "symbols.arpa"
    train([texts], words, 3)
    train([texts], symbols, 6, characters=True)
    chosen_on, judged_on = part(saved, slice(0, None, 2)), part(saved, slice(1, None, 2))
    arrays = [torch.from_numpy(judged_on.log_probs(i)) for i in range(len(judged_on.utterances))]
    greedy = [greedy_decode(a[None], torch.tensor([len(a)]), saved.vocabulary)[0] for a in arrays]
    base = errors(judged_on, greedy)
    rate = 100 * base[:, 0].sum() / base[:, 1].sum()
    lines = [f"{len(base)} utterances, {base[:, 1].sum()} words; greedy WER {rate:.2f} %"]
    for name, lm in (("no language model", None), ("6-gram of characters", symbols), ("3-gram of words", words)):
        weights = (0.0, 0.0)
        if lm is not None:
            trial = best([*trials(chosen_on, lm, None, GRID, beam)])
            weights = trial.alpha, trial.beta
        found = errors(judged_on, decoded(judged_on, lm, weights, beam))
        better, low, high = gain(base, found)
        rate = 100 * found[:, 0].sum() / found[:, 1].sum()
        lines.append(f"beam {beam}, {name}: WER {rate:.2f} %, {better:.1f} % [{low:.1f}, {high:.1f}] fewer errors, "
                     f"alpha {weights[0]:g}, beta {weights[1]:g}")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all files; it must not exist yet")
    parser.add_argument("--digits", type=Path, metavar="FOLDER", help=f"spoken digits: has {' and '.join(DIGITS)}")
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
        config, steps, batch_size = Path(str(files("jasper_fast.configs") / "demo.yaml")), 1500, learn.BATCH_SIZE
    budget = arguments.steps or steps, arguments.minutes
    made = learn.learn(config, (heard, test), out / "run", *budget, "cpu", batch_size=batch_size)
    texts = out / "texts.txt"
    texts.write_text("".join(u.text + "\n" for u in read_manifest(heard)))
    saved = say(made.model.eval(), read_manifest(test), out / "log_probs")
    lines = compare(saved, texts, out, arguments.beam)
    (out / "result.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
