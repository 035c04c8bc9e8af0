"""Reading files of any rate and shape; every way a file can be bad is told apart."""

import pickle

import numpy as np
import pytest
import soundfile

from jasper_fast.speech import audio
from jasper_fast.speech.audio import AudioError


def tone(seconds=1.0, rate=16000, hz=440.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def write(path, samples, rate=16000, **kwargs):
    soundfile.write(path, samples, rate, **kwargs)
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_reads_pcm(tmp_path, suffix):
    x = tone()
    got = audio.load(write(tmp_path / f"a.{suffix}", x))
    assert got.dtype == np.float32 and got.shape == (16000,) and got.flags.c_contiguous
    assert np.abs(got - x).max() < 1e-4
    assert audio.duration(tmp_path / f"a.{suffix}") == 1.0


def test_mixes_down_and_resamples(tmp_path):
    stereo = np.stack([tone(rate=44100), np.zeros(44100, np.float32)], axis=1)
    got = audio.load(write(tmp_path / "a.wav", stereo, 44100, subtype="FLOAT"))
    assert got.shape == (16000,)
    assert np.abs(got[800:-800] - 0.5 * tone()[800:-800]).max() < 1e-3


def test_resampling_removes_what_the_new_rate_cannot_hold(tmp_path):
    got = audio.load(write(tmp_path / "a.wav", tone(rate=48000, hz=12000), 48000))
    assert np.abs(got[800:-800]).max() < 1e-3


def test_offset_and_duration(tmp_path):
    x = np.arange(16000, dtype=np.float32) / 16000
    path = write(tmp_path / "a.wav", x, subtype="FLOAT")
    assert np.array_equal(audio.load(path, offset=0.25, duration=0.5), x[4000:12000])
    assert np.array_equal(audio.load(path, offset=0.25), x[4000:])
    assert np.array_equal(audio.load(path, offset=0.75, duration=9), x[12000:])
    assert len(audio.load(path, sample_rate=8000, offset=0.5, duration=0.25)) == 2000


def bad_files(tmp_path):
    write(tmp_path / "good.flac", np.random.default_rng(0).uniform(-1, 1, 16000))
    data = (tmp_path / "good.flac").read_bytes()
    (tmp_path / "truncated.flac").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.wav").write_text("this is no audio at all, whatever its name")
    (tmp_path / "zero.wav").write_bytes(b"")
    write(tmp_path / "none.wav", np.zeros(0))
    nan = tone()
    nan[[5, 7]] = np.nan, np.inf
    write(tmp_path / "nan.wav", nan, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing.wav", "no such file"),
        ("folder.wav", "is a folder"),
        ("zero.wav", r"empty file \(0 bytes\)"),
        ("text.wav", "cannot be read as audio"),
        ("truncated.flac", "truncated|damaged"),
        ("none.wav", "holds no samples"),
        ("nan.wav", "2 of 16000 samples are NaN or infinite"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, cause):
    bad_files(tmp_path)
    with pytest.raises(AudioError, match=cause) as caught:
        audio.load(tmp_path / name)
    assert caught.value.path == str(tmp_path / name) and str(tmp_path / name) in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and copy.cause == caught.value.cause


def test_bad_offset(tmp_path):
    path = write(tmp_path / "a.wav", tone())
    with pytest.raises(AudioError, match=r"past the end \(1.000 s\)"):
        audio.load(path, offset=1.0)
    with pytest.raises(AudioError, match="negative"):
        audio.load(path, offset=-1)
    with pytest.raises(AudioError, match="negative"):
        audio.load(path, duration=float("nan"))


@pytest.mark.parametrize("speed", [0.85, 0.9, 1.0, 1.1, 1.0737])
def test_change_speed(speed):
    x = tone(2.0)
    got = audio.change_speed(x, speed)
    assert abs(len(got) - len(x) / speed) <= 1
    t = np.arange(len(got)) / 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * speed * t)
    assert np.abs(got - expected)[1600:-1600].max() < 2e-3
    assert len(audio.change_speed(x[:0], speed)) == 0


def test_trim_silence():
    x = np.concatenate([np.zeros(16000), tone(0.5), np.zeros(8000)]).astype(np.float32)
    got = audio.trim_silence(x)
    assert 8000 <= len(got) <= 8000 + 2 * 2048 and np.abs(got).max() == np.abs(x).max()
    silent = np.zeros(1000, np.float32)
    assert len(audio.trim_silence(silent)) == 1000 and len(audio.trim_silence(silent[:0])) == 0
    assert len(audio.trim_silence(tone(0.01))) == 160
