"""`jasper-fast evaluate` reports by set, length and speaker. `evaluate` and `transcribe` work in several processes."""

import json
from pathlib import Path

import corpora
import pytest
import worlds
from test_cli import tiny_checkpoint  # noqa: F401

from jasper_fast.cli import command, common
from jasper_fast.data.manifest import Skipped, SkipReport
from jasper_fast.inference import evaluation
from jasper_fast.speech.metrics import alignment, word_errors

SAME = ("wer", "cer", "utterances", "words", "substitutions", "deletions", "insertions", "sets", "lengths", "speakers")


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Writes manifests of five and four utterances, of which one is unreadable. Returns the options that name the
    manifests."""
    options = []
    for name, count in (("one", 5), ("two", 4)):
        spoken = [
            {"audio_filepath": f"{name}{i}.flac", "duration": 0.4 + 0.9 * i, "text": f"the words of {'abcde'[i]}",
             "speaker": f"s{i % 2}"} for i in range(count)
        ]  # fmt: skip
        options += ["--manifest", str(corpora.write_spoken(tmp_path / f"{name}.jsonl", spoken, seed=count))]
    (tmp_path / "two1.flac").write_bytes(b"no audio")
    return options


@pytest.mark.slow
def test_the_figures_are_the_same_for_any_number_of_processes_and_size_of_batches(tmp_path, corpus, model) -> None:
    found = []
    for world, size in ((1, 1), (1, 16), (2, 4)):
        out = tmp_path / f"{world}-{size}.json"
        arguments = ["evaluate", *corpus, "--checkpoint", model, "--batch-size", str(size), "--out", str(out)]
        if world == 1:
            assert command.main(arguments) == 0
        else:
            first, second = worlds.command(world, [*arguments, "--html", tmp_path / "page.html"], tmp_path / "w")
            assert "WER" in first.printed and not second.printed
        told = json.loads(out.read_text())
        assert told["processes"] == world and len(told["skipped"]) == 1
        rows = [{k: v for k, v in row.items() if k != "confidence"} for row in told["utterances_list"]]
        found.append({key: told[key] for key in SAME} | {"rows": rows, "seconds": told["audio_seconds"]})
    assert all(one == found[0] for one in found[1:])
    assert found[0]["utterances"] == 8 and len(found[0]["sets"]) == len(found[0]["speakers"]) == 2
    assert (tmp_path / "page.html").is_file()


def test_parts_and_page(tmp_path, corpus, model, capsys) -> None:
    page, out = tmp_path / "page.html", tmp_path / "out.json"
    options = ["--checkpoint", model, "--html", str(page), "--out", str(out), "--worst", "3"]
    assert command.main(["evaluate", *corpus, *options]) == 0
    told, html = json.loads(out.read_text()), page.read_text()
    errors = told["substitutions"] + told["deletions"] + told["insertions"]
    for part in ("sets", "lengths", "speakers"):
        assert sum(of["words"] for of in told[part].values()) == told["words"]
        assert sum(of["word_errors"] for of in told[part].values()) == errors
    assert list(told["lengths"]) == ["0 to 2 s", "2 to 5 s"]
    assert html.count("<audio") == 3 and "data:audio/flac" in html and "sub" in html
    assert "in 0 to 2 s" in capsys.readouterr().out


def test_lengths_of_rows() -> None:
    names = {0.0: "0 to 2 s", 1.99: "0 to 2 s", 2.0: "2 to 5 s", 14.99: "10 to 15 s", 15.0: "15 s and more"}
    assert {seconds: evaluation.length_of({"duration": seconds}) for seconds in names} == names


@pytest.mark.parametrize(
    ("said", "heard"), [("a b c d", "a x c d e"), ("", "a b"), ("a b", ""), ("a", "a"), ("", ""), ("one two", "two")]
)
def test_alignments_count_what_word_errors_counts(said: str, heard: str) -> None:
    rows, errors = alignment(said, heard), word_errors(said, heard)
    kinds = [kind for kind, _, _ in rows]
    assert kinds.count("substitute") == errors.substitutions
    assert kinds.count("delete") == errors.deletions and kinds.count("insert") == errors.insertions
    assert " ".join(w for _, w, _ in rows if w) == said and " ".join(w for _, _, w in rows if w) == heard


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_hold_each_item_once_and_are_alike(world: int) -> None:
    sizes = [float(i * 37 % 11) for i in range(20)]
    shares = [common.share(sizes, rank, world) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(20))
    sums = [sum(sizes[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(sizes)


def test_reports_of_processes_add_up() -> None:
    one, other = SkipReport(), SkipReport()
    one.add([Skipped("a", "unreadable", "")])
    one.lose("m", ["x"])
    other.add([Skipped("b", "unreadable", "")])
    other.lose("m", ["y", "x"])
    one.merge(other)
    assert len(one) == 2 and one.lost == {"m": (2, ["x", "y"])}


def test_transcribe_takes_folders(tmp_path, corpus, model, capsys) -> None:
    assert command.main(["transcribe", str(tmp_path), "--checkpoint", model, "--quiet"]) == 0
    told = [Path(line.split("\t")[0]).name for line in capsys.readouterr().out.splitlines()]
    assert told == sorted(p.name for p in tmp_path.glob("*.flac") if p.name != "two1.flac")
    (tmp_path / "empty").mkdir()
    assert command.main(["transcribe", str(tmp_path / "empty"), "--checkpoint", model]) == 2
    assert "contains no audio file" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_write_what_one_writes(tmp_path, corpus, model) -> None:
    arguments = ["transcribe", str(tmp_path), "--checkpoint", model, "--batch-size", "1", "--quiet", "--json"]
    assert command.main([*arguments, "--out", str(tmp_path / "one.jsonl")]) == 0
    begun = "".join((tmp_path / "one.jsonl").read_text().splitlines(keepends=True)[:3])
    (tmp_path / "two.jsonl").write_text(begun + '{"half')
    worlds.command(2, [*arguments, "--out", tmp_path / "two.jsonl", "--resume"], tmp_path / "w")
    one, two = (corpora.read_lines(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert [(t["audio_filepath"], t["pred_text"]) for t in two] == [(t["audio_filepath"], t["pred_text"]) for t in one]
