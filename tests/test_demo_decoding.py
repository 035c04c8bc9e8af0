"""The demo's comparisons of decoders and of rescoring: joined words, the interval of a gain, and the printed lines."""

import random
import re

import corpora
import numpy as np
import pytest
import soundfile
from language_models import hear, needs_native

from jasper_fast import JasperConfig
from jasper_fast.data.manifest import read_manifest
from jasper_fast.demo import decoding, rescoring
from jasper_fast.lm.neural import scoring
from jasper_fast.lm.saved import Saved
from jasper_fast.speech.text import Vocabulary


def test_strings_are_of_one_speaker(tmp_path):
    manifest = corpora.write_spoken(tmp_path / "m.jsonl", [
        {"audio_filepath": f"{i}.wav", "duration": 0.1, "text": f"word{'abcdefgh'[i]}", "speaker": str(i % 2)}
        for i in range(8)
    ])  # fmt: skip
    made = read_manifest(decoding.strings(manifest, tmp_path / "out", 6, (3, 7), 0))
    assert len(made) == 6
    for i, utterance in enumerate(made):
        words = utterance.text.split()
        assert 3 <= len(words) <= 7 and {"abcdefgh".index(w[-1]) % 2 for w in words} == {i % 2}
        assert soundfile.info(utterance.path).duration == pytest.approx(utterance.duration, abs=1e-3)
    once = read_manifest(decoding.strings(manifest, tmp_path / "once", None, (2, 3), 0))
    parts = [u.text.split() for u in once]
    assert sorted(w for part in parts for w in part) == [f"word{c}" for c in "abcdefgh"]
    assert all(len({"abcdefgh".index(w[-1]) % 2 for w in part}) == 1 and len(part) <= 3 for part in parts)


def test_digits_are_spelt_by_the_letters_they_need(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "0.wav", "duration": 1.0, "text": "two one"}\n')
    config = decoding.spelt(tmp_path / "m.jsonl", tmp_path / "config.yaml")
    assert JasperConfig.from_yaml(config).labels == (" ", "e", "n", "o", "t", "w")


def test_absent_digits_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["decoding", "--out", str(tmp_path / "out"), "--digits", str(tmp_path)])
    decoding.main()
    assert "skipped: " in (told := capsys.readouterr().out) and "digits_fsdd_train.jsonl does not exist" in told
    assert not (tmp_path / "out").exists()


def test_the_interval_of_a_gain():
    before, after = np.array([[2, 10], [1, 5], [0, 4]] * 40), np.array([[1, 10], [1, 5], [0, 4]] * 40)
    middle, low, high = decoding.gain(before, after)
    assert middle == pytest.approx(100 / 3) and low < middle < high and high - low < 25
    assert decoding.gain(before, before) == (0.0, 0.0, 0.0)
    assert decoding.fewer(before, before) == "0.0 % [0.0, 0.0] fewer errors"
    assert decoding.fewer(0 * before, before) == "-"


def spoken(folder, noise: float, sharp: float) -> tuple[Saved, list[str]]:
    """Saves log-probs of twelve random texts of three words, and returns them with the texts. `sharp` is added to the
    score of "d" in the first frame, although no text begins with "d"."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(("one", "two", "three", "four"), k=3)) for _ in range(12)]
    saved = Saved(folder, Vocabulary(), 0.02)
    for i, text in enumerate(texts):
        log_probs = hear(saved.vocabulary, text, 5.0, seed=i, noise=noise)
        log_probs[0, 4] += sharp
        saved.keep(i, log_probs.log_softmax(-1))
    saved.finish([f"{i}.wav" for i in range(12)], texts)
    return Saved.open(folder), texts


@pytest.mark.slow
@needs_native
def test_the_lines_of_a_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "GRID", [(0.0, 0.0), (1.0, 0.0)])
    pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text is not installed")
    saved, texts = spoken(tmp_path, 1.0, 5.0)
    (tmp_path / "texts").write_text("\n".join(texts))
    lines = decoding.compare(saved, tmp_path / "texts", tmp_path, 16)
    assert lines[0].startswith("6 utterances, 18 words; greedy WER ") and len(lines) == 4
    greedy, words = (float(re.search(r"WER ([\d.]+) %", lines[i])[1]) for i in (0, 3))
    assert "3-gram of words" in lines[3] and words < greedy


@needs_native
def test_the_lines_of_a_rescoring(tmp_path):
    saved, texts = spoken(tmp_path, 0.5, 5.5)
    lines = rescoring.compare(
        saved,
        lambda found: [0.0 if text in texts else -2000.0 for text in found],
        [("no language model", None)],
        64,
    )
    first, second = (float(x) for x in re.findall(r"([\d.]+) % \(", lines[0]))
    assert len(lines) == 1 and second == 0.0 < first and "100.0 % [100.0, 100.0] fewer errors" in lines[0]


def test_a_model_of_the_texts(tmp_path):
    (tmp_path / "texts.txt").write_text("a b c\n" * 400)
    rescoring.learn(tmp_path / "texts.txt", tmp_path / "neural", 4)
    lm = scoring.load(tmp_path / "neural", "cpu")
    assert lm.tokens.names[2:] == ["a", "b", "c"] and (tmp_path / "neural" / "dev.txt").read_text() == "a b c\n" * 40
