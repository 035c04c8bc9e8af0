"""The options of `jasper-fast lm train-neural`."""

import argparse
from collections.abc import Sequence

from jasper_fast.options import add, option
from jasper_fast.training import options as shared

OPTIONS = {
    "": [
        option("texts", nargs="+", metavar="TEXT", help="UTF-8 text, gzipped or not, with one sentence per line"),
        option("--out", required=True, metavar="DIR", help="output folder, which later commands take as MODEL"),
        option("--val", metavar="TEXT", help="validation text; best.pt is the checkpoint that predicts it best"),
        option("--characters", action="store_true", help="predict characters instead of words"),
        option("--lower-case", action="store_true", help="lower-case these texts and all that the model scores"),
        option("--join-lines", action="store_true", help="let a line attend to the lines before it"),
        option("--vocabulary", type=int, default=200_000, metavar="N", help="keep the N most frequent words (200000)"),
    ],
    "model": [
        option("--layers", type=int, default=4, help="number of layers (4)"),
        option("--width", type=int, default=256, help="size of each token's hidden state (256)"),
        option("--heads", type=int, default=4, help="number of attention heads (4)"),
        option("--inner", type=int, help="width of the feed-forward parts (4 times --width)"),
        option("--dropout", type=float, default=0.1, help="dropout probability (0.1)"),
        option("--memory", type=int, default=128, metavar="TOKENS", help="earlier tokens that a segment can see (128)"),
        option("--plain-softmax", action="store_true", help="use a plain softmax even for a large vocabulary"),
    ],
    "length of the run; the first limit reached ends it": shared.length(epochs=10),
    "batches": [
        option("--batch-size", type=int, default=32, metavar="ROWS", help="parts of the text read side by side (32)"),
        option("--segment", type=int, default=64, metavar="TOKENS", help="tokens per row and step (64)"),
    ],
    "optimisation": shared.optimisation(
        optimizer="adamw", lr=1e-3, weight_decay=0.01, policy="cosine", warmup_steps=200, clip_norm=1.0
    ),
    "machine": [
        option("--device", default="auto", help="device to train on: auto, cpu, cuda or cuda:1 (auto)"),
        shared.AMP,
        option("--fp32-precision", choices=("ieee", "tf32"), help="precision of fp32 matrix products on a GPU (ieee)"),
        option("--threads", type=int, metavar="N", help="CPU threads (default: as PyTorch chooses)"),
        shared.SEED,
    ],
    "output": [*shared.OUTPUT, option("-q", "--quiet", action="store_true", help="print no progress")],
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the words of a command line into the options of a training run."""
    parser = argparse.ArgumentParser()
    add(parser, OPTIONS)
    return parser.parse_args(list(argv))
