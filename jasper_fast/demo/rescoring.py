"""Measures how many errors rescoring saves: a small neural language model rescores the best texts of each search.

    python -m jasper_fast.demo.decoding --out build/decoding --minutes 9
    python -m jasper_fast.demo.rescoring build/decoding

Uses the files of the first command: log-probs, the training texts and their n-gram models. Trains a Transformer-XL of
words on nine tenths of these texts. Chooses alpha, beta and the weight of the neural model on every other test
utterance, and counts errors on the rest. Intervals are 95 % intervals by a paired bootstrap over utterances.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from jasper_fast.demo.decoding import GRID, decoded, errors, fewer, part, rate
from jasper_fast.lm.neural import options, scoring, training
from jasper_fast.lm.rescore import LISTED, Scorer, rescore
from jasper_fast.lm.saved import Saved
from jasper_fast.lm.tune import best, trials

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
OPTIONS = """--layers 2 --width 128 --heads 4 --memory 32 --segment 32 --batch-size 8 --dropout 0.2
    --lr 2e-3 --ema 0.99 --ema-warmup --warmup-steps 50 --device cpu --keep 1"""


def learn(texts: Path, out: Path, steps: int) -> None:
    """Trains the neural model on nine tenths of the texts, and keeps the checkpoint that is best on the rest."""
    lines = texts.read_text().splitlines(keepends=True)
    out.mkdir()
    for name, of in (("train.txt", slice(0, len(lines) * 9 // 10)), ("dev.txt", slice(len(lines) * 9 // 10, None))):
        (out / name).write_text("".join(lines[of]))
    words = [out / "train.txt", "--val", out / "dev.txt", "--out", out, "--steps", steps, *OPTIONS.split()]
    training.train(options.parse(map(str, words)))


def compare(saved: Saved, scorer: Scorer, passes: Sequence[tuple[str, Path | None]], beam: int) -> list[str]:
    """Returns the lines of the result, one per pass. A pass is (name, file of its n-gram model or None)."""
    chosen_on, judged_on, lines = part(saved, slice(0, None, 2)), part(saved, slice(1, None, 2)), []
    for name, lm in passes:
        grid = GRID if lm else [(0.0, 0.0)]
        tried = trials(chosen_on, lm, None, grid, beam, second=(scorer, WEIGHTS))
        found = [*track(tried, f"trying weights, {name}", len(grid) * len(WEIGHTS), transient=True)]
        first, second = best([t for t in found if not t.rescore]), best(found)
        counts, shown = [], []
        for trial in (first, second):
            texts = rescore(decoded(judged_on, lm, trial, beam, LISTED), scorer, trial.rescore)
            counts.append(errors(judged_on, [hypotheses[0].text for hypotheses in texts]))
            weights = f"alpha {trial.alpha:g}, beta {trial.beta:g}, weight {trial.rescore:g}"
            shown.append(f"{rate(counts[-1]):.2f} % ({weights})")
        lines.append(f"beam {beam}, {name}: WER {shown[0]}, rescored {shown[1]}, {fewer(*counts)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that `python -m jasper_fast.demo.decoding --out` wrote")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the neural model (600)")
    parser.add_argument("--beam", type=int, default=128, help="width of the beam search (128)")
    arguments = parser.parse_args()
    folder, out = arguments.folder, arguments.folder / "neural"
    saved = Saved.open(folder / "log_probs")
    learn(folder / "texts.txt", out, arguments.steps)
    lm = scoring.load(out, "cpu")
    found = lm.perplexity(out / "dev.txt")
    passes = (
        ("no language model", None),
        ("6-gram of characters", folder / "symbols.arpa"),
        ("3-gram of words", folder / "words.arpa"),
    )
    lines = [
        f"{len(saved.utterances) // 2} utterances; neural model: perplexity {found.value:.2f} of held-out texts",
        *compare(saved, lm, passes, arguments.beam),
    ]
    (folder / "rescored.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
