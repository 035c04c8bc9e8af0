"""`jasper-fast check`: find what is wrong with a manifest's utterances.

Reads the audio and text of every utterance and reports those that are invalid, unreadable, shorter than the file's
header or the manifest says, silent, clipped, without text, too long, too short, too short for CTC, or duplicates, and
those that have symbols outside the alphabet. --clean writes a manifest of the good utterances. Without --strict it also
contains clipped utterances, and those whose text loses symbols in normalisation. With --config, the alphabet, the
bounds and the frame rate are those of a model.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jasper_fast.cli import common
from jasper_fast.options import option

END = """\
exit status: 0 if every utterance is good, 1 if some are not or there are none, 2 for a wrong command or a
manifest that cannot be read.

example: jasper-fast check train.jsonl --clean train_clean.jsonl --html train.html"""
OPTIONS = {
    "": [
        option("manifest", metavar="MANIFEST", help="JSON lines, or the JSON array of NVIDIA's Jasper"),
        option("--clean", metavar="FILE", help="write a manifest of the good utterances"),
        option("--html", metavar="FILE", help="write a page with histograms and the utterances that have faults"),
        option("--out", metavar="FILE", help="write counts and the utterances that have faults as JSON"),
        option("--data-dir", metavar="DIR", help="folder where relative paths start (the manifest's own)"),
        option("--config", metavar="YAML", help="take labels, bounds and frame rate from this model configuration"),
        option("--max-duration", type=common.positive(float), metavar="S",
               help="longest good utterance in seconds (the configuration's, or 16.7)"),
        option("--min-duration", type=float, metavar="S",
               help="shortest good utterance in seconds (the configuration's, or 0.1)"),
        option("--strict", action="store_true",
               help="utterances that clip or have unknown symbols are bad, too; without --strict they get a warning"),
        option("--jobs", type=common.positive(int), default=0, metavar="N", help="threads (one per core)"),
        option("--worst", type=int, default=5, metavar="N", help="utterances to print for each kind of fault (5)"),
        option("-q", "--quiet", action="store_true", help="show no progress bar"),
    ]
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from jasper_fast.data.prepare import check, writing

    common.check_writable(arguments.clean, arguments.html, arguments.out)
    common.any_name()
    rules = check.Rules(**_rules(arguments))
    with common.bars(arguments.quiet) as progress:
        results = check.check(arguments.manifest, rules, arguments.data_dir, arguments.jobs, progress)
    figures = check.figures(results, rules.strict)
    good, entries = figures["good"], figures["entries"]
    print(
        f"{arguments.manifest}: {good} of {entries} utterances are good, {figures['good_hours']:.2f} of "
        f"{figures['hours']:.2f} hours"
    )
    for reason, count in figures["faults"].items():
        print(f"{count:7} {reason}: {check.REASONS[reason]}")
        for name, detail, _ in check.culprits(results, reason)[: max(arguments.worst, 0)]:
            print(f"          {f'{name}: ' if name else ''}{detail}")
    if clean := arguments.clean and Path(arguments.clean):
        kept = check.clean_entries(results, arguments.manifest, clean, arguments.data_dir, rules.strict)
        print(f"{clean}: {writing.write_manifest(clean, kept)} utterances", file=sys.stderr)
    if arguments.html:
        common.write(arguments.html, check.html(arguments.manifest, results, rules))
    if arguments.out:
        common.write(
            arguments.out, json.dumps(check.record(arguments.manifest, results, rules.strict), indent=1) + "\n"
        )
    return int(good < entries or not entries)


def _rules(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `check.Rules` that the options or the configuration set."""
    from jasper_fast.data.settings import AudioSettings
    from jasper_fast.speech.text import Vocabulary

    known: dict[str, Any] = {"strict": arguments.strict}
    if arguments.config:
        from jasper_fast.nn.config import JasperConfig

        config = JasperConfig.from_yaml(arguments.config)
        settings = AudioSettings.from_config(config.input_train.get("audio_dataset"))
        hop = (config.input_train.get("filterbank_features") or {}).get("window_stride", 0.01)
        same = ("sample_rate", "min_duration", "max_duration", "normalize_text")
        known |= {name: getattr(settings, name) for name in same} | {
            "vocabulary": Vocabulary(config.labels),
            "frame_samples": round(hop * settings.sample_rate) * config.encoder.stride,
        }
    bounds = {"min_duration": arguments.min_duration, "max_duration": arguments.max_duration}
    return known | {name: bound for name, bound in bounds.items() if bound is not None}
