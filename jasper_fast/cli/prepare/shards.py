"""`jasper-fast prepare shards`: a manifest's utterances packed in tar files."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from jasper_fast.cli import common
from jasper_fast.options import option

HELP = "a manifest's utterances packed in tar files"
DESCRIPTION = """\
Packs the utterances of manifests, shuffled, into DIR/audio_N.tar and writes DIR/tarred_audio_manifest.json, which
train.py, evaluate and check read like any other manifest; NeMo and WebDataset read the shards too. Few large files suit
network drives and object stores. Training takes its batches from a few shards at a time, in an order that follows from
the seed, so that a run goes on from any step. --url says where the shards will be read from (s3://..., by fsspec)."""
END = "example: jasper-fast prepare shards train.jsonl --out shards"
OPTIONS = {
    "": [
        option("manifest", nargs="+", metavar="MANIFEST", help="JSON lines, or the array of NVIDIA's Jasper"),
        option("--out", required=True, metavar="DIR", help="folder for the shards and their manifest"),
        option("--data-dir", metavar="DIR", help="where the manifests' paths start (their own folders)"),
        option("--shard-mb", type=common.positive(float), default=256, metavar="MB", help="size of a shard (256)"),
        option("--seed", type=int, default=0, help="of the order (0)"),
        option("--url", metavar="URL", help="where the shards will lie, if not beside their manifest"),
        option("--jobs", type=common.positive(int), default=0, metavar="N", help="threads (one a core)"),
        option("-q", "--quiet", action="store_true", help="no progress bar"),
    ]
}


def run(arguments: argparse.Namespace) -> int:
    from jasper_fast.data.manifest import read_manifest
    from jasper_fast.data.prepare import packing, writing

    utterances = [u for path in arguments.manifest for u in read_manifest(path, arguments.data_dir)]
    out, jobs = Path(arguments.out), arguments.jobs or os.cpu_count() or 1
    with writing.alone_in(out), common.bars(arguments.quiet) as progress:
        size = int(arguments.shard_mb * 2**20)
        path, count = packing.pack(utterances, out, size, arguments.seed, arguments.url, jobs, progress)
    print(f"{path}: {len(utterances)} utterances in {count} shards", file=sys.stderr)
    return 0
