"""`jasper-fast prepare librispeech`: download, verify and unpack LibriSpeech, and write its manifests.

Downloads the sets of LibriSpeech (or takes archives from a folder), verifies the MD5 of each, unpacks it and writes a
manifest, DIR/SET.jsonl: JSON lines with audio_filepath (relative to DIR), duration, text and speaker. FLAC files are
not changed. --speeds adds copies at other speeds. Training then picks one speed at random for each utterance, if the
configuration's audio_dataset has ignore_offline_speed_perturbation: false. The command first prints what it will
download and write. Repeat the command to continue an interrupted run.
"""

import argparse
import sys
from pathlib import Path

from jasper_fast.cli import common
from jasper_fast.options import option

END = """\
sets of LibriSpeech (61 GB): dev-clean, dev-other, test-clean, test-other, train-clean-100, train-clean-360,
train-other-500. Sets of mini-LibriSpeech (0.5 GB): dev-clean-2, train-clean-5. Without --keep-archives a downloaded
archive is deleted after it is unpacked.

example: jasper-fast prepare librispeech --out corpora/mini --sets dev-clean-2 train-clean-5"""
OPTIONS = {
    "": [
        option("--out", required=True, metavar="DIR", help="folder for audio and manifests"),
        option("--sets", nargs="+", metavar="SET", help="sets to prepare (the seven of LibriSpeech)"),
        option("--source", metavar="URL_OR_FOLDER", help="a mirror, or a folder with SET.tar.gz (openslr.org)"),
        option("--speeds", nargs="+", type=float, default=[], metavar="S", help="add copies at speeds such as 0.9 1.1"),
        option("--wav", action="store_true", help="write copies in WAV: twice the size of FLAC, but faster to read"),
        option("--checksums", metavar="FILE", help="output of md5sum for archives that are not the published ones"),
        option("--keep-archives", action="store_true", help="keep the downloads, in DIR/.prepare"),
        option("--jobs", type=common.positive(int), default=0, metavar="N", help="threads (one per core)"),
        option("-q", "--quiet", action="store_true", help="show no progress bar"),
    ]
}


def run(arguments: argparse.Namespace) -> None:
    from jasper_fast.data.prepare import librispeech

    if wrong := [speed for speed in arguments.speeds if not 0.25 <= speed <= 4]:
        raise common.UsageError(f"--speeds {wrong[0]:g}: a speed must be between 0.25 and 4")
    corpus = librispeech.Corpus(
        Path(arguments.out),
        tuple(dict.fromkeys(arguments.sets or librispeech.SETS)),
        arguments.source,
        arguments.speeds,
        arguments.wav,
        librispeech.read_checksums(Path(arguments.checksums)) if arguments.checksums else None,
        arguments.keep_archives,
    )
    with common.bars(arguments.quiet) as progress:
        librispeech.prepare(corpus, arguments.jobs, lambda line: print(line, file=sys.stderr), progress)
