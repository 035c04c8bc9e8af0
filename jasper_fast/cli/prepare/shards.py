"""`jasper-fast prepare shards`: pack a manifest's utterances in tar files.

Shuffles the utterances of manifests, packs them into DIR/audio_N.tar and writes DIR/tarred_audio_manifest.json.
train.py, evaluate and check read this like any other manifest, and NeMo and WebDataset read the shards. A few large
files suit network drives and object stores better than many small ones. Training takes its batches from a few shards at
a time. The order of the batches depends only on the seed and the epoch, so a run can resume at any step. If the shards
will be read from another place, such as s3://..., name it with --url (fsspec reads URLs).
"""

import argparse
import math
import sys
from pathlib import Path

from jasper_fast.cli import common
from jasper_fast.options import option

END = "example: jasper-fast prepare shards train.jsonl --out shards"
OPTIONS = {
    "": [
        option("manifest", nargs="+", metavar="MANIFEST", help="JSON lines, or the JSON array of NVIDIA's Jasper"),
        option("--out", required=True, metavar="DIR", help="folder for the shards and their manifest"),
        option("--data-dir", metavar="DIR", help="folder where relative paths start (each manifest's own)"),
        option(
            "--shard-mb",
            type=common.positive(float),
            default=256,
            metavar="MB",
            help="a shard has at most this size on average (256)",
        ),
        option("--seed", type=int, default=0, help="seed of the shuffling (0)"),
        option("--url", metavar="URL", help="folder or URL from which the shards will be read (the manifest's folder)"),
        option("--jobs", type=common.positive(int), default=0, metavar="N", help="threads (one per core)"),
        option("-q", "--quiet", action="store_true", help="show no progress bar"),
    ]
}


def run(arguments: argparse.Namespace) -> None:
    from jasper_fast.data.manifest import read_manifest
    from jasper_fast.data.prepare import packing, writing

    utterances = [u for path in arguments.manifest for u in read_manifest(path, arguments.data_dir)]
    out = Path(arguments.out)
    with writing.alone_in(out), common.bars(arguments.quiet) as progress:
        size = math.ceil(min(arguments.shard_mb * 2**20, sys.maxsize))
        path, count = packing.pack(utterances, out, size, arguments.seed, arguments.url, arguments.jobs, progress)
    print(f"{path}: {len(utterances)} utterances in {count} shards", file=sys.stderr)
