"""Augmentation that imitates other speakers and rooms: SpeakerWarp on features, tempo and noise on samples."""

import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.data.manifest import Utterance
from jasper_fast.data.perturb import NOISE, Perturb, add_noise
from jasper_fast.data.settings import AudioSettings
from jasper_fast.speech import audio
from jasper_fast.speech.features import _hz_to_mel, _mel_to_hz
from jasper_fast.speech.text import Vocabulary
from jasper_fast.speech.warp import SpeakerWarp

BANDS = 64


def test_a_factor_of_one_changes_nothing_and_rows_are_averages():
    m = SpeakerWarp(1.3).matrices(torch.tensor([1.0, 1.3, 1 / 1.3]), BANDS)
    torch.testing.assert_close(m[0], torch.eye(BANDS), atol=1e-4, rtol=0)
    assert (m >= 0).all()
    torch.testing.assert_close(m.sum(2), torch.ones(3, BANDS))


@pytest.mark.parametrize("factor", [0.8, 1.25])
@pytest.mark.parametrize("f_max", [4000.0, 8000.0])
def test_a_formant_moves_by_the_factor(factor, f_max):
    hz = _mel_to_hz(torch.arange(1, BANDS + 1) * _hz_to_mel(torch.tensor(f_max)) / (BANDS + 1))  # the bands' centres
    formant = 1200.0
    x = torch.exp(-(((hz - formant) / 150) ** 2))
    y = SpeakerWarp(1.3, f_max=f_max).matrices(torch.tensor([factor]), BANDS)[0] @ x
    assert float(hz[y.argmax()]) == pytest.approx(formant * factor, rel=0.06)


def test_the_map_is_monotone_and_ends_at_the_top():
    position = SpeakerWarp(1.3).matrices(torch.tensor([0.8, 1.25]), BANDS) @ torch.arange(BANDS, dtype=torch.float32)
    assert (position.diff(dim=1) > -1e-4).all()
    assert position[:, -1].min() > BANDS - 2.5


def test_shape_memory_order_lengths_and_repeatability():
    x = torch.randn(3, 40, BANDS).transpose(1, 2)
    lengths = torch.tensor([40, 7, 0])
    warp = SpeakerWarp(1.2, equalize=0.3)
    torch.manual_seed(1)
    y = warp(x, lengths)
    assert y.shape == x.shape and y.stride() == x.stride()
    for row, length in zip(y, lengths.tolist(), strict=True):
        assert (row[:, length:] == 0).all()
    assert not torch.equal(y[0], x[0])
    torch.manual_seed(1)
    assert torch.equal(warp(x, lengths), y)
    assert torch.equal(warp.eval()(x, lengths), x)


def test_the_equaliser_adds_the_same_curve_to_every_frame():
    y = SpeakerWarp(1.0, equalize=0.5)(torch.zeros(2000, BANDS, 5), torch.full((2000,), 5))
    torch.testing.assert_close(y[:, :, 0], y[:, :, 4])
    angle = torch.linspace(0, math.pi, BANDS)
    expected = 0.5 * sum(torch.cos(j * angle) ** 2 / j for j in range(1, 5)).sqrt()
    torch.testing.assert_close(y[:, :, 0].std(0), expected, atol=0.08, rtol=0.1)


@pytest.mark.parametrize(
    "bad", [{"max_warp": 0.9}, {"max_warp": 3.0}, {"equalize": -1.0}, {"f_max": 0.0}, {"knee": 1.0}]
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SpeakerWarp(**bad)


@pytest.mark.parametrize("slope", [0.0, -2.0])
def test_noise_has_the_level_and_colour_asked_for(slope):
    speech = np.sin(np.arange(16001) * 0.3).astype(np.float32)
    noisy = add_noise(speech, 20.0, slope, seed=3)
    noise = noisy - speech
    assert noisy.dtype == np.float32 and noisy.shape == speech.shape
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(20.0, abs=0.01)
    power = np.abs(np.fft.rfft(noise)) ** 2
    # the frequencies of the second band are about 8 times those of the first, and 10 * log10(8) = 9
    assert 10 * np.log10(power[500:1000].mean() / power[5000:7500].mean()) == pytest.approx(-slope * 9.0, abs=1.0)
    assert np.array_equal(noisy, add_noise(speech, 20.0, slope, seed=3))
    for begin in (speech[5:6], speech[5:7]):
        noise = add_noise(begin, 20.0, slope, seed=3) - begin
        assert np.mean(noise**2) == pytest.approx(np.mean(begin**2) / 100, rel=1e-3)
    silence = np.zeros(100, np.float32)
    assert np.array_equal(add_noise(silence, 20.0, slope, seed=3), silence)


def test_noise_is_drawn_within_its_bounds_and_as_often_as_said():
    rng = np.random.default_rng(0)
    perturb = Perturb(noise=replace(NOISE, low=5, high=30, p=0.5))
    drawn = [perturb.draw(rng) for _ in range(2000)]
    kept = [d for d in drawn if d.snr_db < math.inf]
    assert 0.45 < len(kept) / 2000 < 0.55
    assert all(5 <= d.snr_db <= 30 and -2 <= d.slope <= 0 for d in kept)


@pytest.mark.parametrize("tempo", [0.6, 0.9, 1.3, 1.7])
def test_tempo_keeps_the_pitch_and_the_level(tempo):
    t = np.arange(8000) / 8000
    x = (0.5 * np.sin(2 * np.pi * 200 * t) + 0.2 * np.sin(2 * np.pi * 700 * t)).astype(np.float32)
    y = audio.change_tempo(x, tempo, 8000)
    assert y.dtype == np.float32 and len(y) == round(8000 / tempo)
    spectrum = np.abs(np.fft.rfft(y * np.hanning(len(y))))
    assert spectrum.argmax() * 8000 / len(y) == pytest.approx(200, abs=2)
    assert y.std() == pytest.approx(x.std(), rel=0.02)
    assert np.abs(np.diff(y)).max() < 1.3 * np.abs(np.diff(x)).max()  # no clicks between windows


@pytest.mark.parametrize("samples", [0, 1, 100, 121, 250])
def test_tempo_of_short_samples(samples):
    x = np.ones(samples, np.float32)
    assert len(audio.change_tempo(x, 2.0, 8000)) == round(samples / 2)
    assert np.array_equal(audio.change_tempo(x, 1.0, 8000), x)


def test_tempo_and_noise_reach_the_items_and_repeat(tmp_path):
    speech = np.sin(np.arange(8000) * 0.2).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", speech, 8000)
    one = [Utterance(str(tmp_path / "a.wav"), 1.0, "a")]
    settings = AudioSettings.from_config({
        "sample_rate": 8000, "tempo_perturbation": {"min_rate": 0.5, "max_rate": 0.6},
        "noise_perturbation": {"max_snr_db": 20},
    })  # fmt: skip
    dataset, plain = (SpeechDataset(one, Vocabulary(["a"]), settings, training=t) for t in (True, False))
    item = dataset[(3, 0)]
    assert 8000 / 0.6 - 1 <= len(item.audio) <= 8000 / 0.5 + 1
    assert dataset.durations(3)[0] == pytest.approx(len(item.audio) / 8000, abs=1e-3)
    assert np.array_equal(item.audio, dataset[(3, 0)].audio)
    assert not np.array_equal(item.audio[:8000], dataset[(4, 0)].audio[:8000])
    assert np.abs(plain[0].audio - speech).max() < 1e-4  # because the file has 16-bit samples
