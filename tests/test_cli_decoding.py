"""Tests `transcribe` and `evaluate` with beam searches: their output, saved log-probs, and errors."""

import functools
import json
import random

import corpora
import pytest
import torch
from language_models import assert_refused, random_arpa, random_neural
from test_cli import write_checkpoint

from jasper_fast import beam_search
from jasper_fast.cli import command
from jasper_fast.lm.neural import scoring
from jasper_fast.lm.saved import Saved
from jasper_fast.lm.symbols import SymbolLM, tokens
from jasper_fast.speech.text import Vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a model of random weights, three sounds, their manifest and three language models."""
    folder = tmp_path_factory.mktemp("decoding")
    write_checkpoint(folder / "model.pt")
    spoken = [{"audio_filepath": f"{i}.wav", "duration": s, "text": "a cat"} for i, s in enumerate((1.0, 2.1, 0.6))]
    corpora.write_spoken(folder / "m.jsonl", spoken)
    random_arpa(folder / "symbols.arpa", tokens(Vocabulary()), 3, random.Random(0))
    random_arpa(folder / "words.arpa", ["a", "cat", "sat", "i", "o"], 2, random.Random(0))
    random_neural(folder / "neural.pt", [*map(str, Vocabulary().labels)], characters=True)
    return folder


def run(folder, name, *argv):
    files = ["--manifest", folder / "m.jsonl"] if name == "evaluate" else [folder / f"{i}.wav" for i in range(3)]
    return command.main([name, *map(str, [*files, "--checkpoint", folder / "model.pt", *argv])])


def evaluate(folder, tmp_path, *argv):
    assert run(folder, "evaluate", "--out", tmp_path / "out.json", *argv) == 0
    return json.loads((tmp_path / "out.json").read_text())


def test_saved_log_probs_give_what_evaluate_gave(folder, tmp_path, capsys):
    options = ("--lm", folder / "symbols.arpa", "--beam", 20, "--alpha", 0.7, "--beta", 0.2, "--n-best", 4)
    report = evaluate(folder, tmp_path, *options, "--save-log-probs", tmp_path / "saved")
    saved, lm = Saved.open(tmp_path / "saved"), SymbolLM(folder / "symbols.arpa", Vocabulary())
    assert [u["text"] for u in saved.utterances] == ["a cat"] * 3 and saved.frame_seconds == 0.02
    for row, (log_probs, lengths) in zip(report["utterances_list"], saved.batches(), strict=True):
        (found,) = beam_search(log_probs, lengths, saved.vocabulary, beam=20, lm=lm, alpha=0.7, beta=0.2, n_best=4)
        assert [h["text"] for h in row["hypotheses"]] == [h.text.strip() for h in found]
        assert [h["score"] for h in row["hypotheses"]] == pytest.approx([h.score for h in found], abs=1e-3)
        assert row["pred_text"] == found[0].text.strip() and 0 < row["confidence"] <= 1
    greedy = evaluate(folder, tmp_path)
    assert report["decoding"]["beam"] == 20 and greedy["decoding"]["beam"] is None
    assert [r["pred_text"] for r in greedy["utterances_list"]] != [r["pred_text"] for r in report["utterances_list"]]
    for at, said in ((tmp_path / "saved", "not an empty folder"), (tmp_path / "new", "has the same name")):
        options = ("--save-log-probs", at, "--html", tmp_path / "new", "--manifest", folder / "absent.jsonl")
        assert run(folder, "evaluate", *options) == 2, "refused before the manifest is read"
        assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_lists_are_rescored(folder, tmp_path):
    options = ("--lm", folder / "symbols.arpa", "--beam", 20, "--alpha", 0.7)
    first = evaluate(folder, tmp_path, *options, "--n-best", 20)
    again = evaluate(folder, tmp_path, *options, "--n-best", 3, "--rescore", folder / "neural.pt",
                     "--rescore-weight", 0.5)  # fmt: skip
    assert again["decoding"]["rescore_weight"] == 0.5 and again["decoding"]["rescore"] == str(folder / "neural.pt")
    lm, moved = scoring.load(folder / "neural.pt", "cpu"), 0
    for before, after in zip(first["utterances_list"], again["utterances_list"], strict=True):
        texts = [h["text"] for h in before["hypotheses"]]
        scores = [h["score"] + 0.5 * p for h, p in zip(before["hypotheses"], lm(texts), strict=True)]
        order = sorted(range(len(texts)), key=lambda i: -scores[i])[:3]
        assert [h["text"] for h in after["hypotheses"]] == [texts[i] for i in order]
        assert [h["score"] for h in after["hypotheses"]] == pytest.approx([scores[i] for i in order], abs=2e-3)
        assert after["pred_text"] == texts[order[0]]
        moved += order[0] != 0
    assert moved, "the second pass changes no text"
    (folder / "both.yaml").write_text(
        '{"lm": "symbols.arpa", "beam": 20, "alpha": 0.7, "rescore": "neural.pt", "rescore_weight": 0.5}'
    )
    by_file = evaluate(folder, tmp_path, "--lm", folder / "both.yaml", "--n-best", 3)
    assert by_file["utterances_list"] == again["utterances_list"]
    unscored = evaluate(folder, tmp_path, "--lm", folder / "both.yaml", "--rescore-weight", 0, "--n-best", 20)
    assert unscored["utterances_list"] == first["utterances_list"]


def test_words_in_processes_one_by_one_or_together(folder, tmp_path):
    pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text is not installed")
    options = ("--lm", folder / "words.arpa", "--beam", 16, "--n-best", 3)
    together = evaluate(folder, tmp_path, *options, "--decode-processes", 2)
    alone = evaluate(folder, tmp_path, *options, "--decode-processes", 1, "--batch-size", 1)
    assert [r["hypotheses"] for r in together["utterances_list"]] == [r["hypotheses"] for r in alone["utterances_list"]]
    found = {word for r in together["utterances_list"] for h in r["hypotheses"] for word in h["text"].split()}
    assert found and found <= {"a", "cat", "sat", "i", "o"}


def test_transcribe_writes_hypotheses(folder, capsys):
    assert run(folder, "transcribe", "--beam", 8, "--n-best", 3, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for record in records:
        scores = [h["score"] for h in record["hypotheses"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        assert record["hypotheses"][0]["text"] == record["pred_text"]
        assert " ".join(w["word"] for w in record["words"]) == " ".join(record["pred_text"].split())
    assert run(folder, "transcribe", "--beam", 8) == 0
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()] == [r["pred_text"] for r in records]


def test_errors_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty.arpa").write_text("")
    (tmp_path / "bad.yaml").write_text("alpha: 1\n")
    (tmp_path / "second.yaml").write_text(f"rescore: {folder / 'neural.pt'}\n")
    second = ("--lm", tmp_path / "second.yaml")
    (tmp_path / "kind.yaml").write_text("lm: x\nbeam: yes\n")
    assert_refused(functools.partial(run, folder, "transcribe"), capsys, "transcribe", (
        (("--lm", "gone.arpa"), "gone.arpa: no such language model"),
        (("--lm", tmp_path / "empty.arpa"), "empty.arpa: the language model is empty"),
        (("--lm", tmp_path / "bad.yaml"), "has neither `lm` nor `rescore`"),
        (("--lm", tmp_path / "kind.yaml"), "beam: True has the wrong type"),
        (("--lexicon", "words.txt"), "--lexicon needs a language model"),
        (("--alpha", "1"), "--alpha needs a language model"),
        (("--beam", "3000000"), "beam 3000000"),
        (("--beam", "8", "--beta", "nan"), "beta nan"),
        (("--lm", folder / "symbols.arpa", "--alpha", "-1"), "alpha -1"),
        (("--n-best", "2"), "give --json too"),
        (("--rescore-weight", "1"), "--rescore-weight needs a language model; name one with --rescore"),
        (("--beam", "8", "--rescore-weight", "1"), "--rescore-weight needs a language model; name one with --rescore"),
        ((*second, "--lexicon", "x"), "--lexicon needs a language model; name one with --lm"),
        ((*second, "--alpha", "1"), "--alpha needs a language model; name one with --lm"),
        ((*second, "--unknown-score", "1"), "--unknown-score needs a language model; name one with --lm"),
        (("--lm", folder / "neural.pt"), "neural.pt: a neural language model only rescores"),
        (("--rescore", "gone"), "gone: no such language model"),
        (("--rescore", folder / "symbols.arpa"), "symbols.arpa is not a complete PyTorch checkpoint"),
        (("--rescore", folder / "model.pt"), "model.pt: holds no neural language model"),
        (("--rescore", folder / "neural.pt", "--rescore-weight", "nan"), "weight nan must be finite"),
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: (saved.folder / "index.json").write_text('{"format": 3}'), "index.json: not an index"),
        (lambda saved: (saved.folder / "000000.npy").unlink(), "000000.npy: cannot be read as log-probs"),
        (lambda saved: (saved.folder / "000000.npy").write_bytes(b"x"), "000000.npy: cannot be read as log-probs"),
        (lambda saved: saved.keep(0, torch.zeros(4, 5)), "000000.npy: expected float32"),
    ],
)
def test_a_folder_of_log_probs_that_is_not_whole(change, message, tmp_path):
    saved = Saved(tmp_path, Vocabulary("ab"), 0.02)
    saved.keep(0, torch.zeros(4, 3))
    saved.finish(["a.wav"], ["ab"])
    assert Saved.open(tmp_path).log_probs(0).shape == (4, 3)
    change(saved)
    with pytest.raises(ValueError, match=message):
        Saved.open(tmp_path).log_probs(0)


def test_hot_words_and_an_open_vocabulary(folder, tmp_path, capsys):
    def recognised(*argv):
        return {w for r in evaluate(folder, tmp_path, *argv)["utterances_list"] for w in r["pred_text"].split()}

    words = ("--lm", folder / "words.arpa", "--beam", 16)
    (tmp_path / "hot.txt").write_text("sat 30\n\nio\n", encoding="utf-8-sig")
    assert recognised(*words, "--open-vocabulary", "--unknown-score", 20) - {"a", "cat", "sat", "i", "o"}
    hot = recognised(*words, "--hot-words", tmp_path / "hot.txt", "--hot-word", "I:-3")
    assert "sat" in hot and hot <= {"a", "cat", "sat", "i", "o", "io"}
    assert "zebra" in recognised("--hot-word", "zebra:400", "--beam", 16)
    (tmp_path / "bad.txt").write_text("sat 3 4\n")
    capsys.readouterr()
    assert_refused(functools.partial(run, folder, "evaluate"), capsys, "evaluate", (
        (("--hot-word", "two words"), "is not one word"),
        (("--hot-word", "sat:much"), "the boost 'much' is not a number"),
        (("--hot-words", tmp_path / "bad.txt"), "bad.txt, line 1: needs a word"),
        (("--hot-words", tmp_path / "gone.txt"), "cannot be read"),
        (("--open-vocabulary",), "--open-vocabulary needs a language model"),
        (("--lm", folder / "symbols.arpa", "--open-vocabulary"), "is a model of symbols, which is always open"),
    ))  # fmt: skip
