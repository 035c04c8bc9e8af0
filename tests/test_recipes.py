"""configs/RECIPES.md: its commands parse, and the chain from archives to a word error rate works."""

import json
import re
import shlex
from pathlib import Path

import corpora
import pytest
import yaml
from speech import CONFIG, run_train

import train
from jasper_fast.cli import command

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


def run_chain(folder: Path, sets: dict[str, dict], config: dict, **training) -> dict:
    """Runs the commands that make manifests of archives, check them, train and evaluate. Returns the figures of the
    evaluation."""
    archives = {f"{name}.tar.gz": corpora.archive(name, spoken) for name, spoken in sets.items()}
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    (folder / "md5sum.txt").write_text("".join(f"{corpora.md5(c)} {n}\n" for n, c in archives.items()))
    out, (train_set, test_set) = folder / "out", list(sets)
    options = ["--out", out, "--sets", *sets, "--source", folder, "--checksums", folder / "md5sum.txt", "-q"]
    assert command.main(list(map(str, ["prepare", "librispeech", *options]))) == 0
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    clean = folder / "out" / "clean.jsonl"
    checked = ["check", out / f"{train_set}.jsonl", "--config", folder / "c.yaml", "--clean", clean, "-q"]
    assert command.main(list(map(str, checked))) == 0
    given = {"config": folder / "c.yaml", "train_manifests": clean, "output_dir": folder / "run", "device": "cpu"}
    words = [w for name, v in (given | training).items() for w in (f"--{name.replace('_', '-')}", str(v))]
    run_train(words)
    newest = max((folder / "run").glob("step_*.pt"))
    told = ["--checkpoint", newest, "--manifest", out / f"{test_set}.jsonl", "--out", folder / "wer.json"]
    assert command.main(list(map(str, ["evaluate", *told, "--html", folder / "wer.html"]))) == 0
    return json.loads((folder / "wer.json").read_text())


def test_from_archives_to_a_word_error_rate(tmp_path: Path) -> None:
    texts = ["ab", "ba", "cd", "dc", "ac", "bd"]
    spoken = {n: (corpora.tone(i, 1.0), texts[i % 6].upper()) for i, n in enumerate(corpora.utterances(6))}
    told = run_chain(
        tmp_path, {"train-clean-5": spoken, "dev-clean-2": spoken}, CONFIG, steps=2, global_batch=4, batch_size=2
    )
    assert told["utterances"] == 6 and told["words"] == 6 and (tmp_path / "wer.html").is_file()


@pytest.mark.slow
def test_real_speech_goes_from_archives_to_a_word_error_rate(tmp_path: Path) -> None:
    spoken = corpora.real_utterances(6)
    config = CONFIG | {"labels": [" ", *"abcdefghijklmnopqrstuvwxyz'"]}
    told = run_chain(tmp_path, {"train-clean-5": spoken, "dev-clean-2": spoken}, config, steps=2, batch_size=2)
    assert told["utterances"] == 6 and told["words"] > 20
