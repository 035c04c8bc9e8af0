"""configs/RECIPES.md: its commands parse, and its steps from archives to a word error rate work."""

import json
import re
import shlex
from pathlib import Path

import corpora
import pytest
import yaml
from speech import CONFIG, run_train, train_arguments

import train
from jasper_fast.cli import command
from jasper_fast.speech.text import LABELS

PAGE = (corpora.ROOT / "configs" / "RECIPES.md").read_text()
COMMANDS = [
    line.strip() for line in PAGE.splitlines() if re.match(r"    .*(train\.py|jasper-fast|-m jasper_fast) ", line)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_page_are_understood(line: str) -> None:
    words = shlex.split(line)
    if "train.py" in words:
        args = train.arguments(words[words.index("train.py") + 1 :])
        assert not args.config.startswith("configs/") or (corpora.ROOT / args.config).is_file()
    else:
        place = words.index("jasper_fast" if "jasper_fast" in words else "jasper-fast")
        assert callable(command.parser().parse_args(words[place + 1 :]).run)


def test_the_page_has_its_commands() -> None:
    assert len(COMMANDS) >= 10


def run_chain(folder: Path, spoken: dict[str, tuple[bytes, str]], config: dict, **training) -> dict:
    """Makes manifests from two archives, checks the training manifest, trains and evaluates. Returns the figures of the
    evaluation. Both archives hold the utterances in `spoken`."""

    def run(*words: object) -> None:
        assert command.main(list(map(str, words))) == 0

    archives = {f"{name}.tar.gz": corpora.archive(name, spoken) for name in ("train-clean-5", "dev-clean-2")}
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    out, clean = folder / "out", folder / "out" / "clean.jsonl"
    run(*corpora.prepare_arguments(folder, str(folder), archives))
    run("check", out / "train-clean-5.jsonl", "--config", folder / "c.yaml", "--clean", clean, "-q")
    run_train(train_arguments({"config": folder / "c.yaml", "train": clean, "val": None}, folder / "run", **training))
    files = ["--manifest", out / "dev-clean-2.jsonl", "--out", folder / "wer.json", "--html", folder / "wer.html"]
    run("evaluate", "--checkpoint", max((folder / "run").glob("step_*.pt")), *files)
    return json.loads((folder / "wer.json").read_text())


def test_from_archives_to_a_word_error_rate(tmp_path: Path) -> None:
    texts = zip(corpora.utterances(6), ["AB", "BA", "CD", "DC", "AC", "BD"], strict=True)
    spoken = {name: (corpora.tone(i, 1.0), text) for i, (name, text) in enumerate(texts)}
    found = run_chain(tmp_path, spoken, CONFIG, steps=2, global_batch=4, batch_size=2)
    assert found["utterances"] == 6 and found["words"] == 6 and (tmp_path / "wer.html").is_file()


@pytest.mark.slow
def test_real_speech_goes_from_archives_to_a_word_error_rate(tmp_path: Path) -> None:
    found = run_chain(tmp_path, corpora.real_utterances(6), CONFIG | {"labels": LABELS}, steps=2, batch_size=2)
    assert found["utterances"] == 6 and found["words"] > 20
