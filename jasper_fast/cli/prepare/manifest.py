"""`jasper-fast prepare manifest`: a manifest from a corpus of another form."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from jasper_fast.cli import common
from jasper_fast.options import option

HELP = "a manifest from a folder, Kaldi, CSV or TSV, NVIDIA's array, Lhotse's cuts, tar shards"
DESCRIPTION = """\
Writes a manifest, JSON lines with audio_filepath, duration, text and, where known, speaker and offset, from:
  folder   audio with a text beside each file (NAME.txt, .lab, .trn), LibriSpeech's *.trans.txt or a metadata.csv;
           the speaker is the name of the folder that holds the file
  kaldi    a folder with wav.scp and text, and perhaps segments and utt2spk
  csv      CSV or TSV with a header, as Common Voice has it (path, sentence, client_id)
  lines    JSON lines as of NeMo, or the JSON array of NVIDIA's Jasper
  lhotse   cuts as JSON lines, each of one file with one supervision
  shards   tar files as of WebDataset (NAME.flac with NAME.txt or NAME.json): one, a folder, a pattern such as
           audio-{000..127}.tar, or a URL (s3://bucket/audio_{0..127}.tar). NeMo's shards have a manifest: lines
The manifest says where in a shard an utterance lies, and it is read from there. Paths are written relative to the
manifest's folder where they lie below it. Utterances that cannot be used are told
and left out; `jasper-fast check` looks at the audio itself."""
END = """\
exit status: 0, 1 if no utterance is left, 2 for a source that cannot be read.

example: jasper-fast prepare manifest corpora/cv/en/train.tsv --out corpora/cv/train.jsonl"""
KINDS = ("auto", "folder", "kaldi", "csv", "lines", "lhotse", "shards")
OPTIONS = {
    "": [
        option("source", metavar="SOURCE", help="a folder, a file, a pattern or a URL"),
        option("--out", required=True, metavar="FILE", help="the manifest"),
        option("--kind", choices=KINDS, default="auto", help="(auto)"),
        option("--audio-dir", metavar="DIR", help="where relative paths of audio start (as the form has it)"),
        option("-q", "--quiet", action="store_true", help="do not list what is left out, only count it"),
    ]
}
_SHOWN = 20


def run(arguments: argparse.Namespace) -> int:
    from jasper_fast.data import places
    from jasper_fast.data.prepare import sources, writing

    common.check_writable(arguments.out)
    source, out = arguments.source, Path(arguments.out)
    kind = sources.kind_of(source) if arguments.kind == "auto" else arguments.kind
    left: list[str] = []
    audio_dir = Path(arguments.audio_dir) if arguments.audio_dir else None
    root = out.resolve().parent

    def placed(entry: dict) -> dict:
        what = "tar" if "tar" in entry else "audio_filepath"
        if places.is_url(entry[what]):
            return entry
        path = Path(os.path.abspath(entry[what]))
        return entry | {what: str(path.relative_to(root) if path.is_relative_to(root) else path)}

    with common.bars(arguments.quiet) as progress:
        found = []
        for number, entry in enumerate(sources.entries(source, kind, audio_dir, left.append), 1):
            found.append(placed(entry))
            progress(f"{Path(source).name}: utterances", number, None)
    for line in left[:_SHOWN] if not arguments.quiet else ():
        print(f"left out: {line}", file=sys.stderr)
    if left:
        print(f"{len(left)} left out", file=sys.stderr)
    if not found:
        print(f"{source}: no utterance can be used", file=sys.stderr)
        return 1
    writing.write_manifest(out, found)
    hours = sum(entry["duration"] for entry in found) / 3600
    print(f"{out}: {len(found)} utterances, {hours:.2f} hours, from {kind}", file=sys.stderr)
    return 0
