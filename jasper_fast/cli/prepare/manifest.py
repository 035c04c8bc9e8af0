"""`jasper-fast prepare manifest`: write a manifest for a folder, Kaldi, CSV or TSV, NVIDIA's JSON array,
Lhotse cuts or tar shards.

Writes a manifest: JSON lines with audio_filepath, duration, text and, if they are known, speaker and offset. Sources:
  folder   audio with a text beside each file (NAME.txt, .lab, .trn), LibriSpeech's *.trans.txt or a metadata.csv;
           the speaker is the name of the file's folder, if that is a subfolder of the source
  kaldi    a folder with wav.scp and text, and optionally segments and utt2spk
  csv      CSV or TSV with a header like Common Voice's (path, sentence, client_id)
  lines    JSON lines in NeMo's format, or the JSON array of NVIDIA's Jasper
  lhotse   Lhotse cuts as JSON lines; each cut must have one recording and one supervision
  shards   tar files in WebDataset's format (NAME.flac with NAME.txt or NAME.json): a file, a folder, a pattern such
           as audio-{000..127}.tar, or a URL (s3://bucket/audio_{0..127}.tar). For NeMo's shards give their manifest,
           which is of the kind lines
For an utterance in a shard, the manifest has its byte range in the tar file. Paths below the manifest's folder are
written relative to it. Utterances that cannot be used are reported and left out. This command does not check the audio
itself; `jasper-fast check` does.
"""

import argparse
import sys
from pathlib import Path

from jasper_fast.cli import common
from jasper_fast.options import option

END = """\
exit status: 0 for success, 1 if no utterance is left, 2 for a wrong command or a source that cannot be read.

example: jasper-fast prepare manifest corpora/cv/en/train.tsv --out corpora/cv/train.jsonl"""
KINDS = ("auto", "folder", "kaldi", "csv", "lines", "lhotse", "shards")
OPTIONS = {
    "": [
        option("source", metavar="SOURCE", help="a folder, a file, a pattern or a URL"),
        option("--out", required=True, metavar="FILE", help="the manifest to write"),
        option("--kind", choices=KINDS, default="auto", help="kind of the source; auto recognises it (auto)"),
        option("--audio-dir", metavar="DIR", help="folder where relative audio paths start (depends on the kind)"),
        option("-q", "--quiet", action="store_true", help="show no progress, and only count the utterances left out"),
    ]
}
_SHOWN = 20  # of the utterances that are left out, at most this many are listed


def run(arguments: argparse.Namespace) -> int:
    from jasper_fast.data import places
    from jasper_fast.data.prepare import sources, writing

    common.check_writable(arguments.out)
    source, out = arguments.source, Path(arguments.out)
    kind = sources.kind_of(source) if arguments.kind == "auto" else arguments.kind
    left: list[str] = []
    audio_dir = Path(arguments.audio_dir) if arguments.audio_dir else None
    with common.bars(arguments.quiet) as progress:
        found = []
        for number, entry in enumerate(sources.entries(source, kind, audio_dir, left.append), 1):
            what = "tar" if "tar" in entry else "audio_filepath"
            found.append(entry if places.is_url(entry[what]) else entry | {what: places.placed(entry[what], out)})
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
