"""Reading audio files of many formats and rates, the errors for bad files, and changes of speed."""

import itertools
import os
import pickle
import socket

import numpy as np
import pytest
import soundfile
from conftest import assert_raises, raising

from jasper_fast.speech import audio, mp3
from jasper_fast.speech.audio import AudioError, ShortAudio


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
    stereo = np.stack([tone(rate=44100), np.zeros(44100)], axis=1)
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
    data = write(tmp_path / "good.flac", np.random.default_rng(0).uniform(-1, 1, 16000)).read_bytes()
    contents = {"truncated.flac": data[: len(data) // 2], "text.wav": b"this is no audio at all, whatever its name"}
    for name, content in (contents | {"zero.wav": b"", "headerless.raw": bytes(1000)}).items():
        (tmp_path / name).write_bytes(content)
    write(tmp_path / "none.wav", np.zeros(0))
    write(tmp_path / "nan.wav", [0.0, np.nan, 0.1, np.inf], subtype="FLOAT")
    write(tmp_path / "opposite.wav", [[0.0, 0.1], [np.inf, -np.inf]], subtype="FLOAT")
    write(tmp_path / "loud.wav", [0.1, -1e19], subtype="FLOAT")
    write(tmp_path / "slow.wav", tone(), 8)
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing.wav", "no such file"),
        ("folder.wav", "is a folder"),
        ("zero.wav", r"empty file \(0 bytes\)"),
        ("text.wav", "cannot be read as audio"),
        ("truncated.flac", "truncated|damaged"),
        ("none.wav", "has no samples"),
        ("loud.wav", r"a sample has the value 1e\+19; full scale is 1"),
        ("headerless.raw", "cannot be read as audio"),
        ("slow.wav", "8 Hz is too low"),
        ("pipe.wav", "this pipe delivered no data"),
        ("loop.wav", "symbolic links"),
        ("good.flac/a.wav", "Not a directory"),
        (f"{'n' * 256}.wav", "File name too long"),
        ("nul\0.wav", "null"),
        ("half\ud800.wav", "not valid text"),
        ("nan.wav", "2 of 4 samples are NaN or infinite"),
        ("opposite.wav", "1 of 2 samples are NaN or infinite"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_files_say_what_is_wrong(tmp_path, name, cause):
    bad_files(tmp_path)
    with pytest.raises(AudioError, match=cause) as caught:
        audio.load(tmp_path / name)
    assert caught.value.path == str(tmp_path / name) and str(tmp_path / name) in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and copy.cause == caught.value.cause


def test_a_socket_and_a_locked_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # because a socket's path must be short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.wav")
        with pytest.raises(AudioError, match=r"s\.wav: is neither a regular file nor a pipe"):
            audio.load("s.wav")
    # in place of a folder without permissions, because root may read any folder
    monkeypatch.setattr(os, "stat", raising(PermissionError(13, "Permission denied", "a.wav")))
    with pytest.raises(AudioError, match=r"a\.wav: cannot be read as audio: Permission denied"):
        audio.load("a.wav")


def test_names_of_any_bytes_and_raw_ones_with_a_header(tmp_path):
    data = write(tmp_path / "a.wav", tone()).read_bytes()
    for name in (b"\xff\xe9.wav", "é\u2028.wav".encode(), b"wav.raw"):
        path = tmp_path / os.fsdecode(name)
        path.write_bytes(data)
        assert len(audio.load(path)) == 16000 and audio.duration(path) == 1.0


def test_reads_a_pipe(tmp_path):
    data = write(tmp_path / "a.wav", tone()).read_bytes()
    out, into = os.pipe()
    assert os.write(into, data) == len(data)  # this fits, because a pipe has room for 64 KiB
    os.close(into)
    path = f"/dev/fd/{out}"
    with pytest.raises(AudioError, match="is a pipe"):
        audio.duration(path)
    assert np.array_equal(audio.load(path), audio.load(tmp_path / "a.wav"))
    os.close(out)


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        *itertools.product(("WAV", "AIFF", "W64"), ["GSM610"]),
        *itertools.product(["WAV"], ("G721_32", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32")),
        *itertools.product(["AU"], ("G721_32", "G723_24", "G723_40")),
        *itertools.product(["XI"], ("DPCM_8", "DPCM_16")),
        *itertools.product(["WAV"], ("IMA_ADPCM", "MS_ADPCM", "ULAW")),  # these can seek
    ],
)
def test_codecs_that_cannot_seek(tmp_path, container, codec):
    x = tone(2.0, 8000)
    path = write(tmp_path / "a", x, 8000, format=container, subtype=codec)
    rate = soundfile.info(path).samplerate  # soundfile writes XI files at a fixed rate
    whole = audio.load(path, rate)
    assert 16000 <= len(whole) < 16400 and np.corrcoef(whole[:16000], x)[0, 1] > 0.8
    assert np.array_equal(audio.load(path, rate, 8000 / rate, 4000 / rate), whole[8000:12000])


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_mp3_without_a_table_of_contents(tmp_path, rate, mode):
    loud = np.random.default_rng(0).standard_normal(int(4.84 * rate)) * 0.3
    loud[: len(loud) // 2] *= 0.001
    path = write(tmp_path / "a.mp3", loud, rate, format="MP3", bitrate_mode=mode, compression_level=0.5)
    assert len(audio.load(path, rate)) == len(loud)
    data = path.read_bytes()
    first = mp3._size(data)
    assert b"Xing" in data[:first] or b"Info" in data[:first]
    for before, after in ((b"", b""), (b"ID3\3\0\0\0\0\0\x14" + bytes(20), b"TAG" + bytes(125))):
        path.write_bytes(before + data[first:] + after)
        got = audio.load(path, rate)
        assert len(loud) <= len(got) < len(loud) + 2 * 1152 and audio.duration(path) == len(got) / rate


@pytest.mark.parametrize(
    ("container", "codec"),
    [("WAV", "PCM_16"), ("WAV", "GSM610"), ("AIFF", "PCM_16"), ("AU", "ULAW"), ("W64", "PCM_16"), ("RF64", "FLOAT")],
)
def test_a_file_cut_in_half_gives_what_is_there_and_both_lengths(tmp_path, container, codec):
    path = write(tmp_path / "a", tone(2.0), format=container, subtype=codec)
    whole, data = audio.load(path), path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ShortAudio, match=r"truncated: the header promises [12]\.\d+ s, but the file has [01]\.\d+ s"
    ) as caught:
        audio.load(path)
    short = caught.value
    assert short.reason == "truncated" and 15000 < len(short.samples) < 16500
    assert np.array_equal(short.samples[:15000], whole[:15000])
    assert float(short.cause.split()[4]) == pytest.approx(2.0, abs=0.02)
    assert str(pickle.loads(pickle.dumps(short))) == str(short)
    assert audio.duration(path) == pytest.approx(2.0, abs=0.02)
    assert len(audio.load(path, duration=0.5)) == 8000  # this part is complete
    with pytest.raises(ShortAudio):
        audio.load(path, offset=0.5, duration=1.0)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_header_written_before_the_length_was_known_promises_nothing(tmp_path, size):
    data = bytearray(write(tmp_path / "a.wav", tone()).read_bytes())
    data[4:8] = data[40:44] = size.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert len(audio.load(tmp_path / "a.wav")) == 16000


def test_bad_offset(tmp_path):
    path = write(tmp_path / "a.wav", tone())
    assert_raises(
        [
            (lambda: audio.load(path, offset=1.0), r"past the end \(1.000 s\)"),
            (lambda: audio.load(path, offset=-1), "negative"),
            (lambda: audio.load(path, duration=float("nan")), "negative"),
        ],
        AudioError,
    )


@pytest.mark.parametrize("speed", [0.85, 0.9, 1.0, 1.1, 1.0737])
def test_change_speed(speed):
    x = tone(2.0)
    got = audio.change_speed(x, speed)
    assert abs(len(got) - len(x) / speed) <= 1
    assert np.abs(got - tone(3.0, hz=440 * speed)[: len(got)])[1600:-1600].max() < 2e-3
    assert len(audio.change_speed(x[:0], speed)) == 0


def test_silence_bounds():
    first, end = audio.silence_bounds(np.concatenate([np.zeros(16000), tone(0.5), np.zeros(8000)]))
    assert 16000 - 2048 <= first <= 16000 and 24000 <= end <= 24000 + 2048
    for samples in (np.zeros(1000), np.zeros(0), tone(0.01)):
        assert audio.silence_bounds(samples) == (0, len(samples))
