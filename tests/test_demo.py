"""The demo: its voices, its synthesiser, its page, and a run of a few seconds."""

import json
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest
import torch

from jasper_fast import Jasper, JasperConfig
from jasper_fast.data.manifest import read_manifest
from jasper_fast.demo import __main__ as demo
from jasper_fast.demo import compare, corpus, espeak, learn, report
from jasper_fast.nn.eager import EagerJasper
from jasper_fast.speech import audio

CONFIG = JasperConfig.from_yaml(demo.CONFIG)


@pytest.fixture(scope="module")
def synthesiser():
    pytest.importorskip("espeakng_loader", reason="the demo's synthesiser: pip install espeakng-loader")
    return espeak.Espeak.start()


def test_no_voice_is_in_both_splits_and_both_kinds_are_in_each():
    train, test = corpus.voices("train"), corpus.voices("test")
    assert not {v.name for v in train} & {v.name for v in test}
    for split in (train, test):
        assert {v.kind for v in split} == {"female", "male"}
        assert len({v.name for v in split}) == len(split) >= 8


def test_the_corpus_is_what_its_manifest_says(tmp_path, synthesiser):
    manifest = corpus.synthesise(tmp_path, "test", 3, progress=False)
    utterances = read_manifest(manifest)
    assert len(utterances) == 3
    for u in utterances:
        samples = audio.load(u.path, corpus.SAMPLE_RATE)
        assert len(samples) / corpus.SAMPLE_RATE == pytest.approx(u.duration, abs=1e-3)
        assert 0.3 < u.duration < 6
        assert 0.1 < np.abs(samples).max() < 1
        assert set(u.text) <= set(CONFIG.labels)
        assert u.speaker in {v.name for v in corpus.voices("test")}
    again = read_manifest(corpus.synthesise(tmp_path / "again", "test", 3, progress=False))
    assert [(u.text, u.speaker) for u in again] == [(u.text, u.speaker) for u in utterances]


def test_every_voice_and_accent_exists(synthesiser):
    for split in ("train", "test"):
        for voice in corpus.voices(split):
            assert len(synthesiser.say("one", f"en+{voice.name}")) > 2000
    for accent in corpus.ACCENTS:
        assert len(synthesiser.say("one", f"{accent}+f1")) > 2000


def test_voices_differ_and_an_unknown_one_is_named(synthesiser):
    f1, m1 = (synthesiser.say("seven", f"en-us+{name}") for name in ("f1", "m1"))
    assert f1.dtype == np.float32
    assert not np.array_equal(f1[:4000], m1[:4000])
    with pytest.raises(espeak.SynthError, match="no-such-language"):
        synthesiser.say("seven", "no-such-language")


def test_a_missing_synthesiser_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    monkeypatch.setattr(espeak.Espeak, "_started", None)
    with pytest.raises(espeak.SynthError, match="pip install espeakng-loader"):
        espeak.Espeak.start()
    assert demo.main(["--out", str(tmp_path), "--minutes", "0.01"]) == 1
    assert "pip install espeakng-loader" in capsys.readouterr().out


def test_trim_keeps_a_margin_of_silence():
    samples = np.zeros(3000, np.float32)
    samples[1000:2000] = 0.5
    assert len(corpus.trim(samples, 1000, keep=0.1)) == 1000 + 200 - 1
    assert len(corpus.trim(samples[1000:2000], 1000, keep=0.1)) in (999, 1000)


def test_png_holds_the_levels_with_low_bands_at_the_bottom():
    features = np.zeros((4, 6))
    features[0] = 1.0  # the lowest band is loud
    data = report.spectrogram(features)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (6, 4)
    start = data.index(b"IDAT") + 4
    size = struct.unpack(">I", data[start - 8 : start - 4])[0]
    rows = np.frombuffer(zlib.decompress(data[start : start + size]), np.uint8).reshape(4, 7)
    assert (rows[-1, 1:] == 255).all()
    assert (rows[:-1] == 0).all()


def result(**changes) -> dict:
    speed = {"shape": "4 utterances, 2.0 s", "eager_utterances_per_second": 80.0, "fused_utterances_per_second": 120.0}
    return {
        "wer_unseen": 0.0132,
        "train_step_ratio": 1.5,
        "inference_ratio": 1.5,
        "memory_ratio": 0.4,
        "train": speed,
        "inference": speed,
        "memory": {"shape": "4 utterances, 2.0 s", "eager_bytes": 50e6, "fused_bytes": 20e6},
        "curves": {
            "loss": [{"seconds": 2.0 * i, "step": i, "loss": 60.0 / (1 + i)} for i in range(20)],
            "wer": [{"seconds": 10.0 * i, "step": i, "wer": 1 / (1 + i)} for i in range(5)],
        },
        "corpus": dict.fromkeys(
            ("train_utterances", "train_voices", "train_minutes", "test_utterances", "test_voices"), 10
        ),
        "model": {"name": "demo.yaml", "parameters": 1234567},
        "machine": {"name": "A <CPU> & more", "device": "cpu", "threads": 2},
        "versions": {"torch": "2.13.0"},
        "seconds": {"training": 270.0, "total": 300.0},
        "command": "python -m jasper_fast.demo --out 'a<b'",
        "date": "2026-11-22T12:00+00:00",
        "examples": [
            {"file": "test/0.wav", "speaker": "f4", "reference": "open the door", "transcript": "open the door"},
            {"file": "test/1.wav", "speaker": "m3", "reference": "close the door", "transcript": ""},
        ],
    } | changes


@pytest.mark.parametrize("points", [1, 5])
def test_the_page_is_well_formed_and_needs_nothing_else(points):
    r = result()
    r["curves"] = {k: v[:points] for k, v in r["curves"].items()}
    page = report.render(r, [np.random.default_rng(0).random((64, 100)), None], [b"RIFF", None])
    root = ElementTree.fromstring(page.partition("\n")[2])  # without the doctype it is XML too
    assert "1.3 %" in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    links = [e.get(k) for e in root.iter() for k in ("src", "href") if e.get(k)]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert len(root.findall(".//svg")) == 2
    assert "A &lt;CPU&gt; &amp; more" in page


def test_ticks_cover_the_values_with_round_steps():
    assert report._ticks(100) == [0, 25, 50, 75, 100]
    assert report._ticks(4.5)[-1] >= 4.5
    assert report._ticks(0.0)[0] == 0


def test_the_learning_rate_follows_the_clock():
    rates = [learn.rate(p / 100) for p in range(101)]
    assert max(rates) == pytest.approx(learn.LR, rel=0.05)
    assert rates[0] < 0.1 * learn.LR
    assert rates[-1] == learn.MIN_LR
    assert rates[-1] < rates[50] < rates[10]


def test_the_faster_number_of_threads_stays():
    had = torch.get_num_threads()
    try:
        for times, expected in (
            ({1: 1.0, 2: 0.6}, [1, 1, 1, 2, 2, 2, 2, 2]),
            ({1: 1.0, 2: 1.2}, [1, 1, 1, 2, 2, 2, 1, 1]),
            ({1: 1.0, 2: 9.0}, [1, 1, 1, 2, 2, 1, 1, 1]),  # dropped before its trial is over
        ):
            threads = learn.Threads([1, 2], trial=3)
            used = []
            for _ in expected:
                used.append(torch.get_num_threads())
                threads.took(times[used[-1]])
            assert used == expected
    finally:
        torch.set_num_threads(had)


def test_interleave_calls_both_equally_often():
    calls = []
    times = compare.interleave(lambda: calls.append("e"), lambda: calls.append("f"), torch.device("cpu"), 0.0, least=6)
    assert len(times[0]) == len(times[1]) == 6
    assert calls.count("e") == calls.count("f")
    assert calls[4:8] in (["f", "e", "e", "f"], ["e", "f", "f", "e"])


def test_kept_bytes_of_a_plain_model_are_those_that_can_be_counted():
    """A linear layer keeps its input, ReLU its output: those and the result that is held."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(8, 16)

        def forward(self, x, lengths):
            return torch.relu(self.a(x * 2)) * 3, lengths

    x = torch.randn(4, 8)
    kept = compare.kept_for_backward(Small(), x, torch.tensor([1]))
    rows = 4 * 4
    assert kept == rows * 8 + rows * 16 + rows * 16  # x * 2, relu, the output


def test_fused_keeps_fewer_bytes_than_eager():
    torch.manual_seed(0)
    x, lengths = torch.randn(2, 64, 96), torch.tensor([96, 60])
    eager, fused = (compare.kept_for_backward(kind(CONFIG), x, lengths) for kind in (EagerJasper, Jasper))
    assert 0 < fused < eager


def test_a_short_run_leaves_the_page_the_numbers_and_a_model(tmp_path, synthesiser, capsys):
    from jasper_fast.nn.loading import load_model

    out = tmp_path / "demo"
    command = ["--out", str(out), "--minutes", "0.03", "--train-utterances", "16", "--test-utterances", "6"]
    assert demo.main([*command, "--compare-seconds", "0.1", "--device", "cpu"]) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["wer_unseen"] >= 0
    for key in ("train_step_ratio", "inference_ratio", "memory_ratio"):
        assert found[key] > 0
    assert found["training"]["steps"] >= 1
    assert len(found["examples"]) == 3
    assert found["curves"]["wer"][-1]["wer"] == found["wer_unseen"]
    page = (out / "index.html").read_text()
    ElementTree.fromstring(page.partition("\n")[2])
    assert page.count("data:audio/wav") == 3
    assert sum(p.numel() for p in load_model(out / "model.pt").parameters()) == found["model"]["parameters"]
    assert "index.html" in capsys.readouterr().out
