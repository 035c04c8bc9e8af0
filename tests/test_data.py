"""Manifests, filters, perturbation, joining, batch plans, collating: all of it on small files made here."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from jasper_fast.data.batches import BatchPlan, collate, load_batches
from jasper_fast.data.dataset import SpeechDataset, ctc_frames
from jasper_fast.data.manifest import ManifestError, Utterance, read_manifest
from jasper_fast.data.perturb import Join
from jasper_fast.speech.text import Vocabulary

V = Vocabulary()


@pytest.fixture
def corpus(tmp_path):
    """Twelve utterances of 0.5 to 1.6 s by two speakers; each is a constant of its own level."""
    utterances = []
    for i in range(12):
        path = tmp_path / f"u{i}.{'flac' if i % 2 else 'wav'}"
        samples = np.full(8000 + 1600 * i, (i + 1) / 16)
        soundfile.write(path, samples, 16000)
        utterances.append(Utterance(str(path), len(samples) / 16000, f"word {'abcdefghijkl'[i]}", speaker=f"s{i % 2}"))
    return utterances


def lines(tmp_path, *entries):
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries))
    return path


def test_reads_json_lines(tmp_path):
    path = lines(
        tmp_path,
        {"audio_filepath": "a.wav", "duration": 1.5, "text": "Hello", "offset": 2.0, "speaker": 7, "extra": 1},
        "",
        {"audio_filepath": "/abs/b.flac", "duration": 2, "text": ""},
    )
    first, second = read_manifest(path)
    assert first == Utterance(str(tmp_path / "a.wav"), 1.5, "Hello", 2.0, "7")
    assert second.path == "/abs/b.flac" and second.text == "" and second.offset == 0
    assert read_manifest(path, data_dir="/data")[0].path == "/data/a.wav"


def test_reads_the_references_array(tmp_path):
    files = [{"fname": f"x-{s}.wav", "duration": 3.0 / s, "speed": s} for s in (0.9, 1.0, 1.1)]
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"transcript": "so", "files": files, "original_duration": 3.0}], indent=1))
    (u,) = read_manifest(path)
    assert u == Utterance(str(tmp_path / "x-1.0.wav"), 3.0, "so")
    (u,) = read_manifest(path, offline_speeds=True)
    assert [p[-7:] for p in u.alternatives] == ["0.9.wav", "1.0.wav", "1.1.wav"]


def test_reads_the_duration_from_the_file_and_the_text_from_another(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(4000), 8000)
    (tmp_path / "a.txt").write_text("some\ntext")
    path = lines(
        tmp_path,
        {"audio_filepath": "a.wav", "text_filepath": "a.txt", "offset": 0.25},
        {"audio_filepath": "none.wav", "text": "x"},
    )
    here, missing = read_manifest(path)
    assert here.duration == 0.25 and here.text == "some text"
    assert np.isnan(missing.duration)
    dataset = SpeechDataset([here, missing], V)
    assert dataset.skipped.counts == {"bad_duration": 1}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (['{"audio_filepath": "a", "duration": 1, "text": "x"}', '{"audio_filepath": '], "line 2: not valid JSON"),
        ([{"audio_filepath": "a", "duration": 1}], "line 1: 'text' is missing"),
        ([{"duration": 1, "text": "x"}], "line 1: 'audio_filepath' is missing"),
        ([{"audio_filepath": "a", "duration": "long", "text": "x"}], "line 1: .*'long'"),
        ([{"audio_filepath": "a", "duration": 1, "text": 5}], "line 1: the text must be a string, got 5"),
        (["7"], "line 1: expected an object"),
        (["[{}]"], "entry 0: 'text' is missing"),
        (["[", "{]"], "line 2: not valid JSON"),
        ([""], "holds no utterances"),
    ],
)
def test_broken_manifests_say_where(tmp_path, entries, message):
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(lines(tmp_path, *entries))
    assert "manifest.jsonl" in str(caught.value)


def test_missing_manifest():
    with pytest.raises(ManifestError, match=r"nowhere\.json: cannot read"):
        read_manifest("nowhere.json")


def test_filters_count_and_list(corpus):
    path, seconds = corpus[0].path, corpus[0].duration
    more = [
        Utterance(path, 20.0, "long"),
        Utterance(path, 0.05, "a"),
        Utterance(path, seconds, " ?! "),
        Utterance(path, 0.2, "mississippi is long"),
        Utterance(path, float("nan"), "a"),
    ]
    dataset = SpeechDataset(corpus + more, V, max_duration=16.7)
    assert len(dataset) == 12
    assert dataset.skipped.counts == Counter(too_long=1, too_short=1, empty_text=1, too_short_for_ctc=1, bad_duration=1)
    assert "20.00 s, more than 16.7" in dataset.skipped.items[0].detail
    assert "19 symbols need 22" in dataset.skipped.items[3].detail
    assert "5 skipped" in str(dataset.skipped)
    kept = SpeechDataset(corpus + more, V, max_duration=16.7, training=False)
    assert len(kept) == 17 and not len(kept.skipped)  # an evaluation counts them all
    raw = SpeechDataset([*corpus, Utterance(path, 1.0, "Ä!")], V, normalize_text=False)
    assert raw.skipped.counts == {"unknown_symbols": 1} and "'!', 'Ä'" in raw.skipped.items[0].detail
    with pytest.raises(ValueError, match=r"no utterance is left of 1: 1 skipped \(1 too_long\)"):
        SpeechDataset(more[:1], V, max_duration=1)


def test_ctc_frames():
    assert ctc_frames([]) == 0 and ctc_frames([1, 2, 3]) == 3 and ctc_frames([1, 1, 1, 2]) == 6


def test_items_and_collate(corpus):
    dataset = SpeechDataset(corpus, V)
    batch = collate([dataset[i] for i in (3, 0)])
    assert batch.audio.shape == (2, 12800) and batch.audio.dtype == torch.float32
    assert batch.audio_lengths.tolist() == [12800, 8000]
    assert (batch.audio[1, 8000:] == 0).all() and (batch.audio[1, :8000] - 1 / 16).abs().max() < 1e-4
    assert batch.texts == ["word d", "word a"] and batch.names[1] == corpus[0].path and batch.indices == [3, 0]
    assert batch.target_lengths.tolist() == [6, 6] and V.decode(batch.targets[0].tolist()) == "word d"
    assert len(batch) == 2 and batch.to("cpu") is batch
    with pytest.raises(IndexError):
        dataset[12]


def test_offsets(corpus):
    u = Utterance(corpus[0].path, 0.2, "a", offset=0.1)
    assert len(SpeechDataset([u], V)[0].audio) == 3200 and SpeechDataset([u], V)[0].name.endswith("@0.1")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_skipped_reported_and_replaced(corpus, tmp_path, workers):
    bad = tmp_path / "bad.wav"
    bad.write_text("nonsense")
    nan = np.full(8000, np.nan)
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    more = [Utterance(str(bad), 0.7, "a"), Utterance(str(tmp_path / "nan.wav"), 0.5, "b")]
    dataset = SpeechDataset(corpus + more, V)
    plan = BatchPlan(dataset.durations, batch_size=4)
    seen = [len(b) for b in load_batches(dataset, plan, workers=workers)]
    assert sum(seen) == 14  # neighbours stand in for them
    assert dataset.skipped.counts == {"unreadable": 2}
    assert "bad.wav: cannot be read" in "".join(s.detail for s in dataset.skipped.items)
    assert "NaN" in "".join(s.detail for s in dataset.skipped.items)
    list(load_batches(dataset, plan, epoch=1, workers=workers))
    assert len(dataset.skipped) == 2  # each once
    evaluation = SpeechDataset(corpus + more, V, training=False)
    plan = BatchPlan(evaluation.durations, batch_size=4, shuffle=False)
    assert sum(len(b) for b in load_batches(evaluation, plan, workers=workers)) == 12
    assert evaluation.skipped.counts == {"unreadable": 2}


def test_nothing_readable(tmp_path):
    dataset = SpeechDataset([Utterance(str(tmp_path / f"{i}.wav"), 1.0, "a") for i in range(3)], V)
    (batch,) = load_batches(dataset, BatchPlan(dataset.durations, batch_size=4))
    assert len(batch) == 0 and batch.audio.shape == (0, 0) and dataset.skipped.counts == {"unreadable": 3}


def test_audio_shorter_than_the_manifest_says(corpus):
    dataset = SpeechDataset([*corpus, Utterance(corpus[0].path, 3.0, "thirty symbols need thirty frames" * 2)], V)
    item = dataset[12]
    assert item.audio is not None and item.index == 11
    assert [s.reason for s in item.skipped] == ["too_short_for_ctc"]


def test_speed_perturbation_is_of_seed_epoch_and_index(corpus):
    def lengths(seed=0, epoch=0, **speed):
        dataset = SpeechDataset(corpus, V, speed_perturbation=speed or {}, seed=seed)
        out = [len(dataset[epoch, i].audio) for i in range(12)]
        assert out == pytest.approx([d * 16000 for d in dataset.durations(epoch)], abs=2)
        return out

    plain = [round(u.duration * 16000) for u in corpus]
    first = lengths()
    assert first == lengths() and first != lengths(epoch=1) and first != lengths(seed=1)
    ratios = np.array(plain) / first
    assert (ratios > 0.84).all() and (ratios < 1.16).all() and ratios.std() > 0.02
    discrete = [lengths(epoch=e, discrete=True, min_rate=0.9, max_rate=1.1) for e in range(3)]
    assert set((plain / np.array(discrete)).round(1).flat) == {0.9, 1.0, 1.1}
    assert lengths(p=0.0) == plain


def test_speed_never_makes_it_too_short_for_ctc(corpus):
    u = Utterance(corpus[0].path, 0.5, "x" * 13)  # 25 frames, all needed
    dataset = SpeechDataset([u], V, speed_perturbation=(1.5, 2.0))
    assert len(dataset[0].audio) == 8000


def test_gain_and_shift(corpus):
    gain = SpeechDataset(corpus, V, gain_perturbation={"p": 1.0, "min_gain_dbfs": 6, "max_gain_dbfs": 6})
    assert np.abs(gain[0].audio / SpeechDataset(corpus, V)[0].audio - 10**0.3).max() < 1e-5
    left = SpeechDataset(corpus, V, shift_perturbation=(5.0, 5.0, 1.0))[0].audio
    assert (left[-80:] == 0).all() and (left[:-80] != 0).all() and len(left) == 8000
    right = SpeechDataset(corpus, V, shift_perturbation=(-5.0, -5.0, 1.0))[0].audio
    assert (right[:80] == 0).all() and (right[80:] != 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed_perturbation": {"rate": 1}}, r"speed_perturbation\.rate is unknown"),
        ({"speed_perturbation": (1.2, 1.0)}, "0 < min_rate <= max_rate"),
        ({"join": (3, 2)}, "min_clips <= max_clips"),
        ({"join": {"max_gap": -1}}, "min_gap <= max_gap"),
    ],
)
def test_bad_settings(corpus, settings, message):
    with pytest.raises(ValueError, match=message):
        SpeechDataset(corpus, V, **settings)


def test_join(corpus):
    dataset = SpeechDataset(corpus, V, join=Join(2, 4, 0.1, 0.2))
    assert len(dataset) == 12
    for epoch, index in itertools.product(range(2), range(12)):
        item = dataset[epoch, index]
        words = item.text.split("word ")[1:]
        assert 2 <= len(words) <= 4 and "abcdefghijkl"[index] in "".join(words)
        clips = ["abcdefghijkl".index(w.strip()) for w in words]
        assert {c % 2 for c in clips} == {index % 2}  # one speaker
        levels = [int(k) for k, _ in itertools.groupby(np.round(item.audio * 16)) if k]
        merged = [c + 1 for c in clips]
        assert levels == merged
        assert item.audio[:1600].max() == 0 and item.audio[-1600:].max() == 0
        assert len(item.audio) == pytest.approx(16000 * dataset.durations(epoch)[index], abs=5)
        assert V.decode(item.target) == item.text and len(item.name.split(" + ")) == len(clips)
        again = dataset[epoch, index]
        assert np.array_equal(item.audio, again.audio)
    assert dataset[0, 0].text != dataset[1, 0].text or dataset[0, 1].text != dataset[1, 1].text


def test_join_noise_room_and_limits(corpus, tmp_path):
    noisy = SpeechDataset(corpus, V, join={"min_gap": 0.1, "noise_db": (-40, -40)})[0]
    assert noisy.audio[:1600].std() == pytest.approx(0.01, rel=0.1)
    assert np.array_equal(noisy.audio, SpeechDataset(corpus, V, join={"min_gap": 0.1, "noise_db": (-40, -40)})[0].audio)
    short = SpeechDataset(corpus, V, join=Join(7, 7), max_duration=4.0)
    assert len(short[0].text.split("word ")) == 8  # never fewer clips than asked for
    short = SpeechDataset(corpus, V, join=Join(1, 7, same_speaker=False), max_duration=4.0)
    assert max(short.durations(0)) <= 4.0 and max(len(i.text) for i in map(short.__getitem__, range(12))) > 20
    tight = SpeechDataset([Utterance(corpus[0].path, 0.5, "x" * 40)], V, join=Join(1, 1))
    assert len(tight[0].audio) == ctc_frames([1] * 40) * 320
    bad = Utterance(str(tmp_path / "none.wav"), 0.5, "lost", speaker="s0")
    with_bad = SpeechDataset([*corpus, bad], V, join=Join(4, 4))
    item = with_bad[12]
    assert "lost" not in item.text and item.text and item.skipped[0].reason == "unreadable"


@pytest.mark.parametrize("workers", [0, 2])
def test_preloaded_is_the_same(corpus, tmp_path, workers):
    bad = Utterance(str(tmp_path / "none.wav"), 0.6, "x")
    done = []
    plain, preloaded = (SpeechDataset([*corpus, bad], V, speed_perturbation={}, join=(1, 3)) for _ in range(2))
    preloaded.preload(progress=done.append)
    assert sum(done) == 13
    for u in corpus:
        Path(u.path).rename(u.path + ".gone")
    plan = BatchPlan(plain.durations, 4)
    got = list(load_batches(preloaded, plan, workers=workers))
    for u in corpus:
        Path(u.path + ".gone").rename(u.path)
    for a, b in zip(load_batches(plain, plan), got, strict=True):
        assert torch.equal(a.audio, b.audio) and a.texts == b.texts
    assert preloaded.skipped.counts == {"unreadable": 1}
    with pytest.raises(ValueError, match="GiB of audio do not fit"):
        plain.preload(max_gib=1e-5)


def durations(n=101, seed=0):
    return np.random.default_rng(seed).uniform(1, 16, n).tolist()


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("sizes", [{"batch_size": 8}, {"max_seconds": 60}, {"batch_size": 5, "max_seconds": 60}])
def test_plan_covers_each_epoch_once(sizes, bucketing):
    d = durations()
    plan = BatchPlan(d, bucketing=bucketing, seed=3, **sizes)
    for epoch in range(3):
        epoch_batches = plan.batches(epoch)
        assert sorted(itertools.chain(*epoch_batches)) == list(range(101))
        for batch in epoch_batches:
            assert len(batch) <= sizes.get("batch_size", 101)
            assert len(batch) * max(d[i] for i in batch) <= sizes.get("max_seconds", 1e9)
    assert plan.batches(0) == BatchPlan(d, bucketing=bucketing, seed=3, **sizes).batches(0)
    assert plan.batches(0) != plan.batches(1)
    assert plan.batches(0) != BatchPlan(d, bucketing=bucketing, seed=4, **sizes).batches(0)


def test_bucketing_saves_padding():
    d = durations(400)

    def padded(bucketing):
        return sum(len(b) * max(d[i] for i in b) for b in BatchPlan(d, 16, bucketing=bucketing).batches(0))

    assert padded(True) < 1.1 * sum(d) < 1.3 * sum(d) < padded(False)


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_work(drop_last):
    d = durations()
    plans = [BatchPlan(d, 8, seed=1, rank=r, world_size=4, drop_last=drop_last).batches(2) for r in range(4)]
    assert len({len(p) for p in plans}) == 1
    seen = Counter(i for p in plans for b in p for i in b)
    if drop_last:
        assert max(seen.values()) == 1 and len(seen) == 96
    else:
        assert len(seen) == 101
    spread = [max(d[i] for b in step for i in b) - min(d[i] for b in step for i in b) for step in zip(*plans)]
    assert np.mean(spread) < 8
    evaluation = [BatchPlan(d, 8, shuffle=False, rank=r, world_size=4).batches() for r in range(4)]
    assert sorted(i for p in evaluation for b in p for i in b) == list(range(101))


def test_plan_in_order():
    plan = BatchPlan([3.0, 1.0, 2.0], 2, shuffle=False, bucketing=False)
    assert plan.batches() == [[0, 1], [2]] and len(plan) == 2
    assert BatchPlan([3.0, 1.0, 2.0], 2, shuffle=False).batches() == [[1, 2], [0]]
    assert BatchPlan([3.0, 90.0, 2.0], max_seconds=10, shuffle=False).batches() == [[2, 0], [1]]
    assert BatchPlan([1.0] * 5, 2, drop_last=True).steps() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give batch_size"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_seconds": -1.0}, "max_seconds=-1"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, r"rank 2 is not in 0\.\.1"),
    ],
)
def test_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan([1.0], **arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly_at_a_step(corpus, workers):
    def run(start, seed=5):
        dataset = SpeechDataset(
            corpus, V, speed_perturbation={}, gain_perturbation=(-6, 6, 0.5), join=(1, 3), seed=seed
        )
        plan = BatchPlan(dataset.durations, max_seconds=8, seed=seed)
        return list(load_batches(dataset, plan, epoch=3, start_step=start, workers=workers))

    state = torch.get_rng_state()
    whole, rest = run(0), run(2)
    assert torch.equal(state, torch.get_rng_state())
    assert len(rest) == len(whole) - 2 and rest[0].step == 2 and rest[0].epoch == 3
    for a, b in zip(whole[2:], rest, strict=True):
        assert a.names == b.names and torch.equal(a.audio, b.audio) and torch.equal(a.targets, b.targets)


def test_from_manifests(corpus, tmp_path):
    path = lines(tmp_path, *({"audio_filepath": u.path, "duration": u.duration, "text": u.text} for u in corpus))
    config = {"sample_rate": 8000, "trim_silence": True, "normalize_transcripts": True, "max_duration": 1.0}
    config |= {"speed_perturbation": {"discrete": False, "min_rate": 0.85, "max_rate": 1.15}}
    config |= {"ignore_offline_speed_perturbation": True}
    dataset = SpeechDataset.from_manifests(path, V, config, seed=2)
    assert len(dataset) == 6 and dataset.sample_rate == 8000 and dataset.seed == 2 and dataset.speed.max_rate == 1.15
    assert len(SpeechDataset.from_manifests([path, path], V, {"max_utts": 15})) == 15
    joined = SpeechDataset.from_manifests(path, V, {"preload": True, "join": {"min_clips": 2, "max_clips": 2}})
    Path(corpus[0].path).unlink()
    assert joined[0].text.count("word") == 2
    with pytest.raises(ValueError, match=r"audio_dataset\.trim_silense is unknown"):
        SpeechDataset.from_manifests(path, V, {"trim_silense": True})
