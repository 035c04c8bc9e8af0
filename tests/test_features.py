"""LogMelFeatures against the features of NVIDIA's Jasper and of NeMo; SpecAugment and SpecCutout."""

import inspect
import math
import textwrap
from functools import partial

import pytest
import torch
from conftest import GOLDEN, assert_raises
from torch.nn import functional as F

from jasper_fast.speech import augment
from jasper_fast.speech.augment import SpecAugment, SpecCutout
from jasper_fast.speech.features import LogMelFeatures, mel_filterbank

WINDOW = torch.hann_window(320, periodic=False, dtype=torch.float64)


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("samples", [161, 255, 257, 321, 801, 12345, 16000, 16001])
def test_the_lines_in_the_docstring_give_the_features(samples):
    audio = noise(1, samples)
    code = inspect.cleandoc(LogMelFeatures.__doc__).split("Equivalent, ")[1].split("::\n\n")[1]
    names = {"x": audio[0], "torch": torch, "F": F, "math": math, "mel_filterbank": mel_filterbank}
    exec(textwrap.dedent(code), names)
    features, (frames,) = LogMelFeatures(dither=0)(audio, torch.tensor([samples]))
    torch.testing.assert_close(features[0, :, :frames], names["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_gives_the_features_of_nvidias_jasper(batch_invariant):
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "features.safetensors")
    module = LogMelFeatures(dither=0, batch_invariant=batch_invariant)
    features, lengths = module(golden["audio"], golden["audio_lengths"])
    assert lengths.tolist() == golden["feature_lengths"].tolist()
    torch.testing.assert_close(features, golden["features"], atol=1e-3, rtol=0)
    torch.testing.assert_close(module.mel, golden["mel_filterbank"][0], atol=1e-6, rtol=0)
    assert torch.equal(module.window, golden["window"])


def test_layout_padding_and_dtype():
    features, lengths = LogMelFeatures()(noise(2, 32000).half(), torch.tensor([32000, 161]))
    assert features.shape == (2, 64, 208) and features.dtype == torch.float32
    assert features.transpose(1, 2).is_contiguous()
    assert lengths.tolist() == [200, 2]
    assert (features[0, :, 200:] == 0).all() and (features[1, :, 2:] == 0).all()
    assert LogMelFeatures(pad_to_multiple=0)(noise(1, 32000), torch.tensor([32000]))[0].shape[2] == 201
    to_max = LogMelFeatures(pad_to_max_duration=True, max_duration=16.7)
    assert to_max(noise(1, 320), torch.tensor([320]))[0].shape[2] == 1680


@pytest.mark.parametrize(("training", "window_size"), [(True, 0.02), (False, 0.02), (False, 0.03)])
def test_alone_as_in_a_batch_with_garbage(training, window_size):
    module = LogMelFeatures(dither=0 if training else 1e-5, window_size=window_size).train(training)
    samples = [12345, 20011, 500]
    audio = noise(3, 20011)
    garbage = audio.masked_fill(torch.arange(20011) >= torch.tensor(samples)[:, None], float("nan"))
    batch, lengths = module(garbage, torch.tensor(samples))
    for i, count in enumerate(samples):
        alone, [frames] = module(audio[i : i + 1, :count], torch.tensor([count]))
        assert frames == lengths[i]
        torch.testing.assert_close(batch[i, :, :frames], alone[0, :, :frames], atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [0, 1, 100, 160, 161, 256, 257])
def test_very_short(samples):
    features, lengths = LogMelFeatures()(noise(2, samples), torch.tensor([samples, min(samples, 1)]))
    assert torch.isfinite(features).all()
    assert lengths.tolist() == [-(-samples // 160), min(samples, 1)]


def test_silence_is_finite_and_nan_is_kept():
    silent, _ = LogMelFeatures(dither=0)(torch.zeros(1, 8000), torch.tensor([8000]))
    assert torch.isfinite(silent).all()
    audio = noise(2, 8000)
    audio[0, 4000] = float("nan")
    features, _ = LogMelFeatures()(audio, torch.tensor([8000, 8000]))
    assert features[0, :, 25].isnan().all() and torch.isfinite(features[1]).all()


def test_dither():
    audio, lengths = torch.zeros(1, 4000), torch.tensor([4000])
    module = LogMelFeatures()
    assert not torch.equal(module(audio, lengths)[0], module(audio, lengths)[0])
    module.eval()
    assert torch.equal(module(audio, lengths)[0], module(audio, lengths)[0])
    assert module(audio, lengths)[0].abs().max() > 0.1  # dither adds noise
    assert not audio.any()  # the module left its argument alone


def test_fp32_under_autocast_and_half():
    audio, lengths = noise(1, 16000), torch.tensor([16000])
    expected, _ = LogMelFeatures(dither=0)(audio, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LogMelFeatures(dither=0)(audio, lengths)[0], expected)
    assert torch.equal(LogMelFeatures(dither=0).half()(audio, lengths)[0], expected)
    assert not LogMelFeatures().state_dict()


def test_from_config():
    config = {"normalize": "per_feature", "sample_rate": 8000, "n_filt": 40, "pad_align": 8, "dither": 0.0}
    config |= {"window": "hann", "frame_splicing": 1, "spec_augment": {"freq_masks": 2}}
    module = LogMelFeatures.from_config(config, dither=1.0)
    assert (module.n_mels, module.pad_to_multiple, module.hop_length, module.dither) == (40, 8, 80, 1.0)


FIXED = {"fixed_mean": [-0.1 * i for i in range(64)], "fixed_std": [1.0 + 0.1 * i for i in range(64)]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (partial(LogMelFeatures, window="round"), "window"),
        (partial(LogMelFeatures, normalize="x"), "normalize"),
        (partial(LogMelFeatures, normalize={"fixed_mean": 0.0, "fixed_std": 1.0}), "fixed_mean"),
        (partial(LogMelFeatures, dither=-1), "dither"),
        (partial(LogMelFeatures, n_mels=0), "n_mels=0"),
        (partial(LogMelFeatures, window_size=0.0), "a window of 0 samples"),
        (partial(LogMelFeatures, window_stride=0.0), r"window_stride=0\.0"),
        (partial(LogMelFeatures, f_max=9000.0), "9000"),
        (partial(LogMelFeatures, convention="kaldi"), "kaldi"),
        (partial(LogMelFeatures, log_guard_type="max"), "log_guard_type"),
        (partial(LogMelFeatures, log_guard=-1e-9), "log_guard=-1e-09 must be"),
        (partial(LogMelFeatures.from_config, {"log_zero_guard_value": "tiny"}), "log_guard='tiny' must be"),
        (partial(LogMelFeatures.from_config, {"pad_align": -16}), "pad_to_multiple=-16"),
        (partial(LogMelFeatures, normalize=FIXED | {"fixed_std": [1.0] * 63 + [0.0]}), "fixed_std positive"),
        (partial(LogMelFeatures, normalize=FIXED | {"fixed_std": [1.0] * 63 + [None]}), "fixed_std positive"),
        (partial(LogMelFeatures, normalize=FIXED, n_mels=80), "fixed_mean"),
        (partial(LogMelFeatures, normalize={"mean": 1.0}), "fixed_mean"),
        (partial(LogMelFeatures.from_config, {"n_filters": 64}), "n_filters is unknown"),
        (partial(LogMelFeatures.from_config, {"frame_splicing": 3}), "frame_splicing=3"),
        (partial(LogMelFeatures(), noise(160), torch.tensor([160])), r"\(N, samples\)"),
        (partial(SpecAugment, min_time=5, max_time=4), "min 5 and max 4"),
        (partial(SpecAugment, time_masks=-1), "got -1 masks"),
        (partial(augment.from_config, {"cutout_augment": {"masks": "2"}}), "cutout_augment: .*str"),
        (partial(augment.from_config, {"spec_augment": {"freq_mask": 2}}), "spec_augment.*freq_mask"),
        (partial(augment.from_config, {"speaker_warp": {"max_wrap": 2}}), "speaker_warp.*max_wrap"),
    ],
)
def test_bad_arguments(wrong, message):
    assert_raises([(wrong, message)])


def ones(n=200, t=100):
    return torch.ones(n, t, 64).transpose(1, 2)


def test_spec_augment_masks_within_the_length():
    out = SpecAugment(freq_masks=1, max_freq=20, time_masks=1, max_time=30)(ones(), torch.full((200,), 60))
    assert out.stride() == ones().stride()
    bands, frames = (out == 0).all(2), (out == 0).all(1)
    assert bands.sum(1).max() == 20 and frames.sum(1).max() == 30
    assert not frames[:, 60:].any()
    assert frames.any(0)[:58].all() and bands.any(0)[:62].all()  # masks reach nearly every frame and band
    assert bands.sum(1).float().mean().sub(10).abs() < 5 * 6 / 200**0.5  # widths are uniform over 0..20, with mean 10
    for mask in (bands, frames):  # one span per utterance, so at most one step from unmasked to masked
        assert (F.pad(mask.int(), (1, 0)).diff(dim=1) == 1).sum(1).max() == 1


def test_spec_augment_ratio_and_short_utterances():
    lengths = torch.tensor([8, 3, 0] * 100)
    out = SpecAugment(time_masks=1, max_time=75, max_time_ratio=0.25)(ones(300), lengths)
    masked = (out == 0).all(1).sum(1)
    assert masked[0::3].max() == 2 and masked[1::3].max() == 0 and masked[2::3].max() == 0
    SpecAugment(time_masks=2, max_time=75)(ones(300), lengths)  # no error for spans longer than utterances


def test_cutout_is_a_rectangle():
    out = SpecCutout(masks=1, min_freq=5, max_freq=9, min_time=3, max_time=7)(ones(), torch.full((200,), 50))
    hole = out == 0
    height, width = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), height * width)
    assert height.min() == 5 and height.max() == 9 and width.min() == 3 and width.max() == 7
    assert not hole[:, :, 50:].any()


def test_evaluation_changes_nothing_and_seed_repeats():
    module, x, lengths = SpecAugment(2, 20, 2, 75), ones(), torch.full((200,), 100)
    torch.manual_seed(1)
    first = module(x, lengths)
    torch.manual_seed(1)
    assert torch.equal(first, module(x, lengths)) and not torch.equal(first, module(x, lengths))
    assert module.eval()(x, lengths) is x


def test_augment_from_config():
    nested = augment.from_config({"filterbank_features": {"spec_augment": {"freq_masks": 2, "max_freq": 20}}})
    assert nested.spec_augment.freq_masks == 2 and nested.cutout is None and nested.speaker_warp is None
    flat = augment.from_config({"cutout_augment": {"masks": 5, "max_freq": 50}, "speaker_warp": {"max_warp": 1.1}})
    assert flat.cutout.masks == 5 and flat.speaker_warp.max_warp == 1.1
    bank = {"speaker_warp": {"max_warp": 1.1}, "n_filt": 40}
    assert augment.from_config({"filterbank_features": bank}).speaker_warp.max_warp == 1.1
    assert LogMelFeatures.from_config(bank).n_mels == 40
    assert (flat(ones(), torch.full((200,), 100)) == 0).any()


# --- NeMo's convention -------------------------------------------------------------------------------------------


def nemo(audio, lengths, *, guard=2**-24, guard_type="add", power=2.0, normalize="per_feature", preemphasis=0.97):
    """Computes the features of NeMo's FilterbankFeatures in evaluation mode, in fp64, with NeMo's padding."""
    x, frames = audio.double(), lengths // 160
    if preemphasis is not None:
        x = torch.cat((x[:, :1], x[:, 1:] - preemphasis * x[:, :-1]), dim=1)
        x = x.masked_fill(torch.arange(x.shape[1]) >= lengths[:, None], 0.0)
    spectrum = torch.stft(x, 512, 160, 320, WINDOW, center=True, pad_mode="constant", return_complex=True)
    x = mel_filterbank().double() @ spectrum.abs().pow(power)
    x = torch.log(x + guard if guard_type == "add" else x.clamp(min=guard))
    for i, n in enumerate(frames.tolist()):
        valid = x[i, :, :n]
        if normalize == "per_feature":
            x[i] = (x[i] - valid.mean(1, keepdim=True)) / (valid.std(1, keepdim=True) + 1e-5)
        elif normalize == "all_features":
            x[i] = (x[i] - valid.mean()) / (valid.std() + 1e-5)
        elif normalize:
            mean, std = (torch.tensor(normalize[k]).double()[:, None] for k in ("fixed_mean", "fixed_std"))
            x[i] = (x[i] - mean) / std
        x[i, :, n:] = 0
    return F.pad(x, (0, -x.shape[-1] % 16)), frames


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"guard": 1e-6, "guard_type": "clamp"}, {"log_guard": 1e-6, "log_guard_type": "clamp"}),
        ({"power": 1.0}, {"mag_power": 1.0}),
        ({"normalize": "all_features"}, {"normalize": "all_features"}),
        ({"normalize": FIXED}, {"normalize": FIXED}),
        ({"normalize": None}, {"normalize": None}),
        ({"preemphasis": None}, {"preemphasis": None}),
    ],
    ids=["default", "clamp", "magnitude", "all features", "fixed", "none", "no pre-emphasis"],
)
def test_nemo_convention(theirs, ours):
    audio, lengths = noise(3, 16123), torch.tensor([16123, 12345, 8000])
    audio[0, 9000:11000] = 0  # here the features depend on the guard
    audio[1, 12345:] = audio[2, 8000:] = 0
    expected, frames = nemo(audio, lengths, **theirs)
    module = LogMelFeatures(convention="nemo", **ours).eval()
    features, found = module(audio, lengths)
    assert found.tolist() == frames.tolist() == [100, 77, 50] and features.shape == expected.shape
    torch.testing.assert_close(features.double(), expected, atol=2e-3, rtol=1e-3)
    alone, _ = module(audio[1:2, :12345], lengths[1:2])
    torch.testing.assert_close(alone[0, :, :77], features[1, :, :77], atol=1e-4, rtol=1e-4)
    assert (module.frames(319), LogMelFeatures().frames(319)) == (1, 2)
    assert torch.equal(module(audio, lengths)[0], features)
    assert not torch.equal(module.train()(audio, lengths)[0], features)  # dither applies in training
