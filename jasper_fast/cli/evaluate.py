"""`jasper-fast evaluate`: measure word and character error rate on a manifest.

Transcribes every utterance of a manifest (JSON lines with audio_filepath, duration, text, or the JSON array of NVIDIA's
Jasper). Prints the word and character error rate over all of them, the speed in seconds of audio per second (RTFx), and
the worst utterances. References are normalised as in training; texts that lose symbols are counted per manifest. Files
that cannot be used are listed and do not count in the error rates. If a file is shorter than its header or the manifest
says, the available audio is used, with a warning. Several processes share the utterances and report the same texts and
rates as one process.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_fast.cli import common
from jasper_fast.options import option

if TYPE_CHECKING:
    from jasper_fast.inference.recognizer import Recognition, Recognizer
    from jasper_fast.training.runs import Ranks

END = """\
exit status: 0 for success, 1 if no utterance could be used (with --strict: if one or more could not be used), 2 for a
wrong command, manifest, checkpoint or configuration.

examples:
  jasper-fast evaluate --manifest dev.jsonl --checkpoint runs/best.pt --out result.json
  jasper-fast evaluate --manifest dev.jsonl --checkpoint runs/best.pt --lm lm.arpa --alpha 2.0 --beta -0.2
on 8 GPUs: torchrun --nproc-per-node 8 -m jasper_fast evaluate --manifest ... --html result.html"""


_DECODING = (
    "lm", "lexicon", "open_vocabulary", "unknown_score", "hot_word", "hot_words",
    "beam", "alpha", "beta", "n_best", "rescore", "rescore_weight",
)  # fmt: skip
OPTIONS = {
    "": [
        option("--manifest", required=True, action="append", metavar="FILE", help="a manifest; may be repeated"),
        option("--data-dir", metavar="DIR", help="folder where relative paths start (the manifest's own)"),
        option("--worst", type=int, default=10, metavar="N", help="number of worst utterances to show (10)"),
        option("--out", metavar="FILE", help="write the error rates and every utterance as JSON"),
        option(
            "--save-log-probs",
            metavar="DIR",
            help="save the model's log-probabilities for `jasper-fast lm tune`: one .npy file per utterance, and an "
            "index",
        ),
        option(
            "--html",
            metavar="FILE",
            help="write a page with error rates by set, length and speaker, and the worst utterances word by word",
        ),
        option("--strict", action="store_true", help="exit with 1 if any utterance could not be used"),
    ],
    **common.DECODING,
    **common.MODEL,
}


def run(arguments: argparse.Namespace) -> int:
    with common.joined(arguments) as share:
        return _run(arguments, share)


def _run(arguments: argparse.Namespace, share: Ranks) -> int:
    from jasper_fast.data import manifest
    from jasper_fast.inference import evaluation
    from jasper_fast.inference.recognizer import Recognition
    from jasper_fast.lm.saved import Saved
    from jasper_fast.speech.metrics import character_errors, word_errors

    common.check_writable(arguments.out, arguments.html)
    if arguments.save_log_probs:
        if share.world > 1:
            raise common.UsageError("--save-log-probs writes one folder: run it in one process")
        files = {Path(name).resolve() for name in (arguments.out, arguments.html) if name}
        if Saved.check(arguments.save_log_probs).resolve() in files:
            raise common.UsageError(f"--save-log-probs {arguments.save_log_probs}: a file to write has the same name")
    common.any_name()
    utterances = [u for path in arguments.manifest for u in manifest.read_manifest(path, arguments.data_dir)]
    recognizer, total = common.load(arguments), len(utterances)
    places = common.share([u.seconds for u in utterances], share.rank, share.world)
    utterances = [utterances[i] for i in places]
    saved = Saved.begin(arguments.save_log_probs, recognizer) if arguments.save_log_probs else None
    if utterances:
        *_, result = common.recognize(arguments, recognizer, utterances, keep=saved.keep if saved else None)
    else:  # there are fewer utterances than processes
        result = Recognition([], [], [], manifest.SkipReport())
    if saved:
        saved.finish([u.path for u in utterances], result.references)
    rows = {}
    for place, utterance, reference, transcript, seconds in zip(
        places, utterances, result.references, result.transcripts, result.seconds, strict=True
    ):
        if transcript is None:
            continue
        words, characters = word_errors(reference, transcript.text), character_errors(reference, transcript.text)
        rows[place] = {
            "audio_filepath": utterance.path,
            "offset": utterance.offset,
            "duration": round(seconds, 3),
            "manifest": utterance.manifest,
            "speaker": utterance.speaker,
            **dict(zip(("tar", "tar_start", "tar_size"), utterance.packed or ())),
            "text": reference,
            "pred_text": transcript.text.strip(),
            "confidence": round(transcript.confidence, 4),
            "word_errors": words.total,
            "words": words.length,
            "character_errors": characters.total,
            "characters": characters.length,
            **common.hypotheses(transcript),
        }
    rows, result = _together(share, rows, result)
    status = int(arguments.strict and len(rows) < total) if rows else 1
    if share.first and not rows:
        print("no utterance could be used", file=sys.stderr)
    if not (share.first and rows):
        return status
    figures = _figures(arguments, recognizer, result, rows) | evaluation.by_parts(rows) | {
        "utterances_per_s": len(rows) / max(result.wall_seconds, 1e-9), "processes": share.world
    }  # fmt: skip
    if arguments.html:
        common.write(arguments.html, evaluation.html(figures, rows, arguments.worst))
    if arguments.out:
        common.write(
            arguments.out, json.dumps(figures | {"utterances_list": rows}, indent=1, ensure_ascii=False) + "\n"
        )
    print(
        f"WER {100 * figures['wer']:.2f} %  CER {100 * figures['cer']:.2f} %  "
        f"{figures['utterances']} utterances, {figures['words']} words: {figures['substitutions']} substituted, "
        f"{figures['deletions']} deleted, {figures['insertions']} inserted"
    )
    for part in ("sets", "lengths"):
        for name, of in figures[part].items() if len(figures[part]) > 1 else ():
            print(f"  WER {100 * of['wer']:.2f} %  CER {100 * of['cer']:.2f} %  {of['utterances']:6} in {name}")
    for row in evaluation.worst(rows, arguments.worst):
        print(f"{row['word_errors']}/{row['words']}  {row['audio_filepath']}")
        print(f"      said  {row['text']}\n      heard {row['pred_text']}")
    print(common.speed(result))
    return status


def _together(share: Ranks, rows: dict[int, dict], result: Recognition) -> tuple[list[dict], Recognition]:
    """Returns the rows of all processes in the order of the manifests, and ``result`` with the times and skipped files
    of all processes. ``rows``: the rows of this process, by the place of the utterance in the manifests."""
    seconds = (result.audio_seconds, result.compute_seconds, result.wall_seconds)
    parts = share.gather((rows, seconds, result.skipped))
    by_place = {place: row for rows, _, _ in parts for place, row in rows.items()}
    heard, computed, took = zip(*(seconds for _, seconds, _ in parts), strict=True)
    result.audio_seconds, result.compute_seconds, result.wall_seconds = sum(heard), max(computed), max(took)
    for rank, (*_, skipped) in enumerate(parts):
        if rank != share.rank:
            result.skipped.merge(skipped)
    return [by_place[place] for place in sorted(by_place)], result


def _figures(arguments: argparse.Namespace, recognizer: Recognizer, result: Recognition, rows: list[dict]) -> dict:
    import torch

    from jasper_fast import __version__
    from jasper_fast.speech.metrics import character_errors, word_errors

    references, hypotheses = [r["text"] for r in rows], [r["pred_text"] for r in rows]
    words, characters = word_errors(references, hypotheses), character_errors(references, hypotheses)
    return {
        "wer": words.rate,
        "cer": characters.rate,
        "utterances": len(rows),
        "words": words.length,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "audio_seconds": round(result.audio_seconds, 3),
        "wall_seconds": round(result.wall_seconds, 3),
        "compute_seconds": round(result.compute_seconds, 3),
        "rtfx": result.audio_seconds / max(result.wall_seconds, 1e-9),
        "rtfx_compute": result.audio_seconds / max(result.compute_seconds, 1e-9),
        "skipped": [item._asdict() for item in result.skipped.items],
        "warned": [item._asdict() for item in result.skipped.warned],
        "lost_symbols": {m: {"texts": n, "symbols": symbols} for m, (n, symbols) in result.skipped.lost.items()},
        "manifests": arguments.manifest,
        "checkpoint": arguments.checkpoint,
        "ema": arguments.ema,
        "decoding": {name: getattr(arguments, name) for name in _DECODING},
        "device": str(recognizer.device),
        "backend": arguments.backend,
        "threads": torch.get_num_threads(),
        "versions": {"jasper_fast": __version__, "torch": torch.__version__},
    }
