"""The demo: voices, synthesiser, page, and a run of a few seconds."""

import json
import struct
import sys
import types
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from jasper_fast import JasperConfig
from jasper_fast.data.manifest import read_manifest
from jasper_fast.demo import __main__ as demo, compare, corpus, espeak, learn, report
from jasper_fast.nn.loading import load_model
from jasper_fast.speech import audio

CONFIG = JasperConfig.from_yaml(learn.CONFIG)


@pytest.fixture(scope="module")
def synthesiser():
    pytest.importorskip("espeakng_loader", reason="the demo's synthesiser: pip install espeakng-loader")
    return espeak.start()


def test_no_voice_is_in_both_splits():
    both = [*corpus.VOICES["train"], *corpus.VOICES["test"]]
    assert len(set(both)) == len(both) and min(map(len, corpus.VOICES.values())) >= 8


def test_the_corpus_is_what_its_manifest_says(tmp_path, synthesiser):
    utterances = read_manifest(corpus.synthesise(tmp_path, "test", 3, progress=False))
    assert len(utterances) == 3
    for u in utterances:
        samples = audio.load(u.path, corpus.SAMPLE_RATE)
        assert len(samples) / corpus.SAMPLE_RATE == pytest.approx(u.duration, abs=1e-3) and 0.3 < u.duration < 6
        assert 0.1 < np.abs(samples).max() < 1
        assert set(u.text) <= set(CONFIG.labels) and u.speaker in corpus.VOICES["test"]
    again = read_manifest(corpus.synthesise(tmp_path / "again", "test", 3, progress=False))
    assert [(u.text, u.speaker) for u in again] == [(u.text, u.speaker) for u in utterances]


def test_every_voice_and_accent_exists(synthesiser):
    voices = [f"en+{voice}" for split in corpus.VOICES.values() for voice in split]
    for voice in (*voices, *(f"{accent}+f1" for accent in corpus.ACCENTS)):
        assert len(synthesiser.say("one", voice)) > 2000


def test_voices_differ_and_an_unknown_one_is_named(synthesiser):
    f1, m1 = (synthesiser.say("seven", f"en-us+{name}") for name in ("f1", "m1"))
    assert f1.dtype == np.float32 and not np.array_equal(f1[:4000], m1[:4000])
    with pytest.raises(espeak.SynthError, match="no-such-language"):
        synthesiser.say("seven", "no-such-language")


def test_a_missing_synthesiser_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(espeak, "start", espeak.Espeak)
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
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">II", data[16:24]) == (6, 4)
    content = data[data.index(b"IDAT") + 4 :]
    rows = np.frombuffer(zlib.decompressobj().decompress(content), np.uint8).reshape(4, 7)
    assert (rows[-1, 1:] == 255).all() and (rows[:-1] == 0).all()


SPEED = {"shape": "4 utterances, 2.0 s", "eager_utterances_per_second": 80.0, "fused_utterances_per_second": 120.0}
RESULT = {
    "wer_unseen": 0.0132,
    "train": SPEED | {"ratio": 1.5},
    "inference": SPEED | {"ratio": 1.25},
    "memory": {"shape": "4 utterances, 2.0 s", "eager_bytes": 50e6, "fused_bytes": 23e6, "ratio": 0.46},
    "curves": {
        "loss": [{"minutes": i / 30, "step": i, "loss": 60.0 / (1 + i)} for i in range(20)],
        "wer": [{"minutes": i / 6, "step": i, "wer": 1 / (1 + i)} for i in range(5)],
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
}


@pytest.mark.parametrize("points", [0, 1, 5])
def test_the_page_is_well_formed_and_needs_nothing_else(points):
    curves = {kind: curve[:points] for kind, curve in RESULT["curves"].items()}
    page = report.render(RESULT | {"curves": curves}, np.random.default_rng(0).random((2, 64, 100)), [b"RIFF"] * 2)
    root = ElementTree.fromstring(page.partition("\n")[2])  # without its doctype the page is valid XML
    for said in ("1.3 %", "prefers-color-scheme: dark", "width=device-width", "A &lt;CPU&gt; &amp; more", "a&lt;b"):
        assert said in page
    links = [e.get(k) for e in root.iter() for k in ("src", "href") if e.get(k)]
    assert len(links) == 4 and all(link.startswith("data:") for link in links)
    assert len(root.findall(".//svg")) == 2
    assert len(root.findall(".//circle")) == points


def test_fewer_bytes_are_a_share_of_eagers_and_no_gain():
    assert [row[1:] for row in report.comparison_rows(RESULT)] == [
        ("80.0", "120.0", "1.50", "times eager's speed, training step"),
        ("80.0", "120.0", "1.25", "times eager's speed, inference"),
        ("50.0", "23.0", "0.46", "of eager's bytes, kept for backward"),
    ]


@pytest.mark.parametrize(
    ("top", "expected"), [(100, [0, 25, 50, 75, 100]), (4.5, [0, 2, 4, 6]), (4.002, [0, 2, 4, 6]), (0.0, [0])]
)
def test_ticks_cover_the_values_with_round_steps(top, expected):
    assert report.ticks(top) == expected


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1: 1.0, 2: 0.6}, [1, 1, 1, 2, 2, 2, 2, 2]),
        ({1: 1.0, 2: 1.2}, [1, 1, 1, 2, 2, 2, 1, 1]),
        ({1: 1.0, 2: 9.0}, [1, 1, 1, 2, 2, 1, 1, 1]),  # two threads are dropped after two steps of three
    ],
)
def test_the_faster_number_of_threads_stays(times, expected, monkeypatch):
    threads, used = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    trial = learn.Threads([1, 2], trial=3)
    for _ in expected:
        used.append(threads[-1])
        trial.took(times[used[-1]])
    assert used == expected


@pytest.fixture
def bench(monkeypatch):
    """Replaces the benchmark by fixed numbers: fused takes half of eager's time and keeps 0.4 of its bytes."""

    def main(argv):
        command, options = argv[0], iter(argv[1:])
        given = {name: True if name == "--quick" else next(options) for name in options}
        key = {"train": {"mode": given.get("--mode")}, "latency": {"N": 1, "seconds": 2.0}, "memory": {}}[command]
        rows = [
            {"ours": ours, "key": key, "time_s": {"median": seconds}, "memory": {"kept_bytes": kept}}
            for ours, seconds, kept in ((True, 0.1, 40), (False, 0.2, 100))
        ]
        out = Path(given["--out"])
        out.mkdir(parents=True)
        (out / "result.json").write_text(json.dumps({"rows": rows, "given": given}))

    monkeypatch.setitem(sys.modules, "jasper_fast.bench.cli", types.SimpleNamespace(main=main))


def test_the_comparison_is_the_benchs(bench, tmp_path):
    found = compare.compare(learn.CONFIG, tmp_path, (8, 208), torch.device("cpu"), 3.0)
    assert found["train"] == {
        "eager_utterances_per_second": 40.0,
        "fused_utterances_per_second": 80.0,
        "ratio": 2.0,
        "shape": "8 utterances, 2.1 s, a step of train.py",
    }
    assert (found["inference"]["ratio"], found["inference"]["shape"]) == (2.0, "1 utterance, 2.0 s")
    assert found["memory"] == {"fused_bytes": 40, "eager_bytes": 100, "ratio": 0.4, "shape": "8 utterances, 2.1 s"}
    assert json.loads((tmp_path / "train" / "result.json").read_text())["given"]["--mode"] == "step"
    given = json.loads((tmp_path / "memory" / "result.json").read_text())["given"]
    assert given["--model"] == f"{learn.CONFIG}:8,208" and given["--device"] == "cpu" and given["--quick"]


def test_a_benchmark_that_ends_early_ends_the_comparison(bench, tmp_path, monkeypatch):
    """After Ctrl-C the benchmark returns 130. The results of an earlier run must not be taken for those of this one."""
    compare.compare(learn.CONFIG, tmp_path, (8, 208), torch.device("cpu"), 3.0)
    monkeypatch.setattr(sys.modules["jasper_fast.bench.cli"], "main", lambda argv: 130)
    with pytest.raises(SystemExit, match="130"):
        compare.compare(learn.CONFIG, tmp_path, (8, 208), torch.device("cpu"), 3.0)


def test_a_short_run_leaves_the_page_the_numbers_and_a_model(bench, tmp_path, synthesiser, capsys):
    out = tmp_path / "demo"
    command = ["--out", str(out), "--steps", "3", "--train-utterances", "16", "--test-utterances", "6"]
    assert demo.main([*command, "--device", "cpu"]) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["wer_unseen"] >= 0 and found["training"]["steps"] == 3
    assert [r["step"] for r in found["curves"]["loss"]] == [1, 2, 3] == [r["step"] for r in found["curves"]["wer"]]
    assert found["curves"]["wer"][-1]["wer"] == found["wer_unseen"]
    page = (out / "index.html").read_text()
    ElementTree.fromstring(page.partition("\n")[2])
    assert len(found["examples"]) == page.count("data:audio/wav") == 3
    assert sum(p.numel() for p in load_model(out / "model.pt").parameters()) == found["model"]["parameters"]
    assert "index.html" in capsys.readouterr().out
