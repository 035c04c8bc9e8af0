"""The commands, with a tiny model of random weights: output, exit status and one-line errors."""

import json
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import raising
from engines import block
from language_models import assert_refused, printed
from standins import spied, wrap
from test_checkpoint import own_document

from jasper_fast import Jasper, JasperConfig
from jasper_fast.cli import command, common
from jasper_fast.data.manifest import Utterance
from jasper_fast.inference import recognizer
from jasper_fast.nn import checkpoint
from jasper_fast.nn.loading import load_model
from jasper_fast.speech.decoding import NotFinite
from jasper_fast.speech.metrics import wer
from jasper_fast.speech.text import LABELS, Vocabulary


def tiny(labels=LABELS, **top):
    blocks = [block(32, k=11, s=2), block(32, 2, 5, residual=True, dense=True), block(48, k=1)]
    return JasperConfig.from_dict(
        {
            "labels": labels,
            "jasper": {
                "encoder": {"in_feats": 64, "activation": "relu", "use_conv_masks": True, "blocks": blocks},
                "decoder": {"in_feats": 48},
            },
            **top,
        }
    )


def write_checkpoint(path, config=None):
    torch.manual_seed(5)
    config = config or tiny()
    model = Jasper(config, backend="reference")
    with torch.no_grad():
        model.decoder.layers[0].weight.mul_(8)  # so that transcripts are not empty
    checkpoint.save(path, own_document(model, labels=None if config.labels is None else list(config.labels)))
    return str(path)


@pytest.fixture(name="model")
def tiny_checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model.pt")


def sweep(seconds, rate, rng):
    """Returns the samples of a tone whose frequency rises, with a little noise."""
    t = np.arange(int(rate * seconds)) / rate
    return 0.3 * np.sin(2 * np.pi * (200 + 900 * t * rng.random()) * t) + 0.01 * rng.standard_normal(len(t))


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i, (rate, seconds) in enumerate([(16000, 1.0), (8000, 2.3), (44100, 0.7)]):
        paths.append(str(tmp_path / f"a{i}.{'flac' if i else 'wav'}"))
        soundfile.write(paths[-1], sweep(seconds, rate, rng), rate)
    return paths


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "bad.wav").write_text("no audio")
    return str(tmp_path / "bad.wav")


def run(name, *argv):
    """Runs a command, and returns its exit status. The options in `argv` override those set here."""
    return command.main([name, *(["--backend", "reference", "--quiet"] if name != "info" else []), *map(str, argv)])


def evaluate(model, entries, tmp_path, *options):
    """Evaluates a manifest of `entries`, and returns the manifest's path and the JSON report."""
    manifest, out = tmp_path / "m.jsonl", tmp_path / "result.json"
    manifest.write_text("\n".join(map(json.dumps, entries)))
    assert run("evaluate", "--manifest", manifest, "--checkpoint", model, "--out", out, *options) == 0
    return manifest, json.loads(out.read_text())


def test_transcribe(model, files, capsys):
    assert run("transcribe", *files, "--checkpoint", model) == 0
    out = capsys.readouterr()
    rows = [line.split("\t") for line in out.out.splitlines()]
    assert [r[0] for r in rows] == files and all(r[1].strip() for r in rows) and not out.err
    run("transcribe", *files, "--checkpoint", model, "--workers", 2, "--batch-size", 1)
    assert capsys.readouterr().out == out.out  # batches of one file, read by other processes, give the same texts


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_transcribe_in_low_precision(model, files, dtype, monkeypatch, capsys):
    """Shows that the engine gets the low precision, and that its transcripts have a WER under 50 % against fp32's."""
    used, heard = spied(monkeypatch, recognizer, "InferenceEngine", lambda model, **how: how["dtype"]), []
    for options in ((), ("--dtype", dtype)):
        assert run("transcribe", *files, "--checkpoint", model, *options) == 0
        heard.append([line.split("\t")[1] for line in capsys.readouterr().out.splitlines()])
    assert used == [None, {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]]
    assert wer(heard[0], heard[1]) < 0.5


def test_transcribe_reports_bad_files_and_goes_on(model, files, bad, capsys):
    assert run("transcribe", files[0], bad, "gone.wav", files[1], "--checkpoint", model) == 0
    out = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.out.splitlines()] == files[:2]
    assert "bad.wav: cannot be read as audio" in out.err and "gone.wav: no such file" in out.err
    assert "2 of 4 utterances could not be used" in out.err and "Traceback" not in out.err
    assert run("transcribe", files[0], bad, "--checkpoint", model, "--strict") == 1
    assert run("transcribe", bad, "--checkpoint", model) == 1
    assert capsys.readouterr().out.count("\n") == 1


def test_transcribe_json_list_and_out(model, files, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("\n".join(files[1:]) + "\n\n")
    out = tmp_path / "out.jsonl"
    arguments = ("--list", tmp_path / "list.txt", "--json", "--out", out, "--checkpoint", model)
    assert run("transcribe", files[0], *arguments) == 0
    assert not capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["audio_filepath"] for r in records] == files
    assert [r["duration"] for r in records] == pytest.approx([1.0, 2.3, 0.7], abs=1e-3)
    for r in records:
        assert " ".join(w["word"] for w in r["words"]) == " ".join(r["pred_text"].split())
        assert all(0 <= w["start"] < w["end"] <= r["duration"] + 0.02 and 0 < w["confidence"] <= 1 for w in r["words"])


def test_times_count_trimmed_silence(tmp_path):
    config = tiny(input_val={"audio_dataset": {"trim_silence": True}})
    trimming = recognizer.load(write_checkpoint(tmp_path / "trim.pt", config), device="cpu", backend="reference")
    t = np.arange(16000) / 16000
    sound = (0.3 * np.sin(2 * np.pi * 300 * t * (1 + t))).astype(np.float32)
    soundfile.write(tmp_path / "late.wav", np.concatenate([np.zeros(32768), sound]), 16000)
    result = trimming.recognize([Utterance(str(tmp_path / "late.wav"), 3.048, "")])
    words = result.transcripts[0].words
    assert words and words[0].start >= 32768 / 16000 - 0.13 and result.seconds[0] < 1.2


def test_evaluate(model, files, bad, tmp_path, capsys):
    texts = ["hello Dr. World", "Nine", ""]
    entries = [{"audio_filepath": f, "duration": 1.0 + i, "text": t} for i, (f, t) in enumerate(zip(files, texts))]
    entries.append({"audio_filepath": bad, "duration": 1.0, "text": "lost"})
    manifest, report = evaluate(model, entries, tmp_path, "--worst", 2)
    printed, rows = capsys.readouterr(), report["utterances_list"]
    assert [r["text"] for r in rows] == ["hello doctor world", "nine", ""]
    assert report["wer"] == pytest.approx(wer([r["text"] for r in rows], [r["pred_text"] for r in rows]))
    assert report["utterances"] == 3 and report["words"] == 4 and report["rtfx"] > 0
    assert [s["reason"] for s in report["skipped"]] == ["unreadable"]
    assert f"WER {100 * report['wer']:.2f} %" in printed.out and "RTFx" in printed.out
    assert printed.out.count("heard") == 2 and "bad.wav: cannot be read" in printed.err
    assert run("evaluate", "--manifest", manifest, "--checkpoint", model, "--strict") == 1
    manifest.write_text(json.dumps(entries[-1]))
    assert run("evaluate", "--manifest", manifest, "--checkpoint", model) == 1


def test_errors_are_one_line(model, files, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1, "text": "x"}\n{"audio')
    (tmp_path / "garbage.pt").write_bytes(b"x" * 100)
    other = write_checkpoint(
        tmp_path / "other.pt", JasperConfig.from_dict(tiny(LABELS[:9]).to_dict() | {"labels": None})
    )
    cases = [
        (("transcribe", files[0], "--checkpoint", "nowhere.pt"), "nowhere.pt: no such file"),
        (("transcribe", files[0], "--checkpoint", tmp_path / "garbage.pt"), "is not a complete PyTorch checkpoint"),
        (("transcribe", files[0], "--checkpoint", other), "has the labels of the 10 classes"),
        (("transcribe", "--checkpoint", model), "no files"),
        (("transcribe", "--list", "nolist", "--checkpoint", model), "nolist"),
        (("transcribe", files[0], "--checkpoint", model, "--device", "toaster"), "'toaster' is not a device"),
        (("transcribe", files[0], "--checkpoint", model, "--config", "no.yaml"), "no.yaml: no such configuration"),
        (("transcribe", files[0], "--checkpoint", model, "--out", tmp_path / "no" / "x"), "does not exist"),
        (("transcribe", files[0], "--checkpoint", model, "--workers", -1), "--workers -1"),
        (("transcribe", files[0], "--checkpoint", model, "--backend", "metal"), "backend 'metal' is not one of"),
        (("transcribe", "/dev/stdin", "--checkpoint", model, "--workers", 1), "other processes cannot read /dev/stdin"),
        (("evaluate", "--manifest", tmp_path / "broken.jsonl", "--checkpoint", model), "line 2: not valid JSON"),
        (("evaluate", "--manifest", "no.jsonl", "--checkpoint", model), "no.jsonl: cannot read the manifest"),
    ]
    if not torch.cuda.is_available():
        cases.append((("transcribe", files[0], "--checkpoint", model, "--device", "cuda"), "no CUDA GPU"))
    for name in ("transcribe", "evaluate"):
        assert_refused(run, capsys, name, [case for case in cases if case[0][0] == name])


def test_a_recognizer_takes_labels_and_counts_what_is_finished(model, files, bad):
    network = load_model(model, backend="reference")
    upper = recognizer.Recognizer(network, Vocabulary([label.upper() for label in LABELS]))
    utterances, finished = [Utterance(path, 0.7, "") for path in (*files, bad)], []
    heard = upper.recognize(utterances, batch_size=1, progress=finished.append)
    assert finished == [1] * 4 and heard.transcripts.pop() is None  # the last file is no audio
    lower = recognizer.Recognizer(network).recognize(utterances, batch_size=1)
    assert [t.text for t in heard.transcripts] == [t.text.upper() for t in lower.transcripts[:3]]
    with pytest.raises(ValueError, match="the model has 29 classes, but there are 9 labels"):
        recognizer.Recognizer(network, Vocabulary(LABELS[:9]))


def test_too_little_memory_for_a_checkpoint_is_one_line(model, files, monkeypatch, capsys):
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**50))
    case = ("transcribe", files[0], "--checkpoint", model), f"error: {model} does not fit into memory"
    assert_refused(run, capsys, "transcribe", [case])


def test_two_outputs_with_one_name_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    one, same = tmp_path / "one.yaml", Path("folder/../one.yaml")
    checked = ("check", tmp_path / "no.jsonl")
    evaluated = ("evaluate", "--manifest", tmp_path / "no.jsonl", "--checkpoint", tmp_path / "no.pt")
    tuned = ("lm", "tune", "--log-probs", tmp_path / "no")
    for argv in (
        (*checked, "--clean", one, "--html", same),
        (*checked, "--clean", one, "--out", same),
        (*checked, "--html", one, "--out", same),
        (*evaluated, "--out", one, "--html", same),
        (*tuned, "--out", one, "--report", same),
    ):
        assert command.main([*map(str, argv)]) == 2
        assert "each file to write needs its own name" in capsys.readouterr().err
    assert command.main([*map(str, checked), "--html", "/dev/null", "--out", "/dev/null"]) == 2
    assert "no.jsonl: cannot read the manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command_", "module", "function"),
    [("train", "train", "command"), ("bench", "bench.cli", "shell"), ("demo", "demo.__main__", "main")],
)
def test_commands_with_options_of_their_own(command_, module, function, monkeypatch):
    given = []
    made = types.SimpleNamespace(**{function: lambda argv: given.append(argv) or 7})
    monkeypatch.setitem(sys.modules, f"jasper_fast.{module}", made)
    assert command.main([command_, "--help", "--steps", "3"]) == 7
    assert given == [["--help", "--steps", "3"]]


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["transcribe", "--help"], 0),
        ([], 2),
        (["sing"], 2),
        (["transcribe", "a.wav"], 2),
        (["evaluate", "--manifest", "m", "--checkpoint", "c", "--threads", "0"], 2),
    ],
)
def test_usage(argv, status, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert end.value.code == status and "usage: jasper-fast" in capsys.readouterr()[status > 0]


def test_info(capsys):
    report = json.loads(printed(run, capsys, "info", "--json"))
    assert report["packages"]["torch"]["version"] == metadata.version("torch")
    assert set(report["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert report["backends"]["reference"]["available"]
    for name, backend in report["backends"].items():
        assert backend["available"] != bool(backend["missing"]), name
    for package in report["packages"].values():
        assert package["version"] or package["get"]
    assert "backend" in printed(run, capsys, "info")


@pytest.mark.slow
def test_module_runs_and_imports_little():
    code = "import sys; from jasper_fast.cli.command import parser; parser(); print('torch' in sys.modules)"
    for argv, start in ((("-c", code), "False"), (("-m", "jasper_fast", "--version"), "jasper_fast ")):
        printed = subprocess.check_output([sys.executable, *argv], text=True, cwd=Path(__file__).parents[1])
        assert printed.startswith(start)


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (raising(NotFinite("log_probs hold NaN")), "skipped (not_finite): {}: the output of the model is NaN"),
        (lambda: torch.empty(2**50), "skipped (out_of_memory): {}: out of memory: "),
    ],
    ids=["NaN", "memory"],
)
def test_a_file_on_which_the_model_fails_is_skipped(model, files, tmp_path, capsys, monkeypatch, fail, said):
    soundfile.write(tmp_path / "odd.wav", np.full(16000, 0.9), 16000)

    def broken(right, self, audio, *more):
        if bool((audio > 0.8).any()):
            fail()
        return right(self, audio, *more)

    assert run("transcribe", *files, "--checkpoint", model) == 0
    wanted = capsys.readouterr().out
    wrap(monkeypatch, recognizer.Recognizer, "begin", broken)
    assert run("transcribe", files[0], tmp_path / "odd.wav", *files[1:], "--checkpoint", model) == 0
    printed = capsys.readouterr()
    assert printed.out == wanted
    assert said.format(tmp_path / "odd.wav") in printed.err


def test_evaluate_warns_and_counts_lost_symbols(files, tmp_path, capsys):
    model = write_checkpoint(tmp_path / "few.pt", tiny([x for x in LABELS if x not in "qz"]))
    data = Path(files[0]).read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    entries = [
        {"audio_filepath": "cut.wav", "duration": 1.0, "text": "a"},
        {"audio_filepath": files[1], "duration": 9.9, "text": "quiz\u200b: Q"},
        {"audio_filepath": "nothing.wav", "duration": 1.0, "text": "a \ud800"},
    ]
    manifest, report = evaluate(model, entries, tmp_path)
    error = capsys.readouterr().err
    assert [w["reason"] for w in report["warned"]] == ["truncated", "wrong_duration"] and report["utterances"] == 2
    assert "warning (truncated): " in error and "the header promises 1.000 s, but the file has 0.499 s" in error
    assert "the manifest says 9.900 s, but the file has 2.300 s" in error
    assert f"1 text of {manifest} lost symbols: q z" in error
    assert report["lost_symbols"] == {str(manifest): {"texts": 1, "symbols": ["q", "z"]}}


def test_a_word_outside_a_vocabulary_of_words_is_named_and_the_rest_is_evaluated(files, tmp_path, capsys):
    model = write_checkpoint(tmp_path / "words.pt", tiny(["one", "two"]))
    texts = ["one two", "ten", "two"]
    entries = [{"audio_filepath": f, "duration": 0.6, "text": t} for f, t in zip(files, texts, strict=True)]
    rows = evaluate(model, entries, tmp_path)[1]["utterances_list"]
    assert [(r["audio_filepath"], r["text"]) for r in rows] == [(files[0], "one two"), (files[2], "two")]
    assert "skipped (unknown_symbols)" in capsys.readouterr().err


def test_out_may_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    common.write(str(tmp_path / "pipe"), "figures")
    assert os.read(reader, 100) == b"figures" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_transcribe_reads_its_standard_input(model, files, kind, capsys):
    run("transcribe", files[0], "--checkpoint", model)
    want = capsys.readouterr().out.removeprefix(files[0])
    source, before = os.open(files[0], os.O_RDONLY), os.dup(0)
    if kind == "pipe":
        source, end = os.pipe()
        os.write(end, Path(files[0]).read_bytes())  # less than a pipe's buffer
        os.close(end)
    os.dup2(source, 0)
    try:
        assert run("transcribe", "/dev/stdin", "--checkpoint", model) == 0
    finally:
        os.dup2(before, 0)
    assert capsys.readouterr().out == f"/dev/stdin{want}"
