"""Manifests, filters, perturbation, joining, batches and their order, on small files that the tests write."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from jasper_fast.data.batches import BatchSampler, collate, load_batches
from jasper_fast.data.dataset import SpeechDataset, ctc_frames
from jasper_fast.data.join import Clips
from jasper_fast.data.manifest import ManifestError, Utterance, read_manifest
from jasper_fast.data.perturb import Change
from jasper_fast.data.settings import AudioSettings
from jasper_fast.speech.text import Vocabulary

V = Vocabulary()
LETTERS = "abcdefghijkl"


@pytest.fixture
def corpus(tmp_path):
    """Returns twelve utterances of 0.5 to 1.6 s by two speakers. Each has a constant signal, at a level of its own."""
    utterances = []
    for i, letter in enumerate(LETTERS):
        path = tmp_path / f"u{i}.{'flac' if i % 2 else 'wav'}"
        samples = np.full(8000 + 1600 * i, (i + 1) / 16)
        soundfile.write(path, samples, 16000)
        utterances.append(Utterance(str(path), len(samples) / 16000, f"word {letter}", speaker=f"s{i % 2}"))
    return utterances


def a_set(utterances, training=True, seed=0, **audio_dataset):
    return SpeechDataset(utterances, V, AudioSettings.from_config(audio_dataset), training=training, seed=seed)


def load(dataset, workers=0, epoch=0, start=0, **plan):
    plan = BatchSampler(dataset.durations, **({"batch_size": 4} | plan))
    return list(load_batches(dataset, plan, epoch, start, workers))


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


def test_reads_the_array_of_nvidias_jasper(tmp_path):
    files = [{"fname": f"x-{s}.wav", "duration": 3.0 / s, "speed": s} for s in (0.9, 1.0, 1.1)]
    path = lines(tmp_path, json.dumps([{"transcript": "so", "files": files, "original_duration": 3.0}], indent=1))
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
    assert a_set([here, missing]).skipped.counts == {"bad_duration": 1}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (['{"audio_filepath": "a", "duration": 1, "text": "x"}', '{"audio_filepath": '], "line 2: not valid JSON"),
        ([{"audio_filepath": "a", "duration": 1}], "line 1: 'text' is missing"),
        ([{"duration": 1, "text": "x"}], "line 1: 'audio_filepath' is missing"),
        ([{"audio_filepath": "a", "duration": "long", "text": "x"}], "line 1: .*'long'"),
        ([{"audio_filepath": "a", "duration": 1, "text": 5}], "line 1: the text must be a string, got 5"),
        ([{"audio_filepath": 5, "duration": 1, "text": "x"}], "line 1: a path must be a string, got 5"),
        (["7"], "line 1: expected an object"),
        (["[{}]"], "entry 0: 'text' is missing"),
        (["[", "{]"], "line 2: not valid JSON"),
        ([""], "the manifest has no utterances"),
        ([{"files": ["a.wav"], "text": "x"}], r"line 1: 'files' must be a list of objects .*\['a.wav'\]"),
        ([{"files": {"fname": "a.wav"}, "text": "x"}], "line 1: 'files' must be a list"),
        ([f'{{"audio_filepath": "a", "duration": {"9" * 400}, "text": "x"}}'], "line 1: .*too large"),
        ([f'{{"audio_filepath": "a", "duration": {"9" * 5000}, "text": "x"}}'], "line 1: not valid JSON"),
        ([f'[{{"audio_filepath": "a", "duration": {"9" * 5000}, "text": "x"}}]'], "not valid JSON"),
    ],
)
def test_broken_manifests_say_where(tmp_path, entries, message):
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(lines(tmp_path, *entries))
    assert "manifest.jsonl" in str(caught.value)


def test_line_ends_of_unicode_are_part_of_a_text(tmp_path):
    path = tmp_path / "m.jsonl"
    text = '{"audio_filepath": "a.wav", "duration": 1, "text": "one\u2028two\u2029three\u0085four"}\r\n'
    path.write_bytes(("\ufeff" + text * 2).encode())
    assert [u.text for u in read_manifest(path)] == ["one\u2028two\u2029three\u0085four"] * 2
    assert a_set(read_manifest(path)).texts == ["one two three four"] * 2


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
    dataset = a_set(corpus + more, max_duration=16.7)
    assert len(dataset) == 12
    assert dataset.skipped.counts == Counter(too_long=1, too_short=1, empty_text=1, too_short_for_ctc=1, bad_duration=1)
    assert "20.00 s, more than 16.7" in dataset.skipped.items[0].detail
    assert "CTC needs 22 for its 19 symbols" in dataset.skipped.items[3].detail
    assert "5 skipped" in str(dataset.skipped)
    kept = a_set(corpus + more, training=False, max_duration=16.7)
    assert len(kept) == 17 and not len(kept.skipped)  # for evaluation all utterances are kept
    raw = a_set([*corpus, Utterance(path, 1.0, "Ä!")], normalize_transcripts=False)
    assert raw.skipped.counts == {"unknown_symbols": 1} and "'!', 'Ä'" in raw.skipped.items[0].detail
    with pytest.raises(ValueError, match=r"none of the 1 utterances can be used: 1 skipped \(1 too_long\)"):
        a_set(more[:1], max_duration=1)


def test_ctc_frames():
    assert [ctc_frames(target) for target in ([], [1, 2, 3], [1, 1, 1, 2])] == [0, 3, 6]


def test_items_and_collate(corpus):
    dataset = a_set(corpus)
    batch = collate([dataset[i] for i in (3, 0)])
    assert batch.audio.shape == (2, 12800) and batch.audio.dtype == torch.float32
    assert batch.audio_lengths.tolist() == [12800, 8000]
    assert (batch.audio[1, 8000:] == 0).all() and (batch.audio[1, :8000] - 1 / 16).abs().max() < 1e-4
    assert batch.texts == ["word d", "word a"] and batch.names[1] == corpus[0].path and batch.indices == [3, 0]
    assert batch.target_lengths.tolist() == [6, 6] and V.decode(batch.targets[0].tolist()) == "word d"
    assert len(batch) == 2
    with pytest.raises(IndexError):
        dataset[12]


def test_offsets(corpus):
    item = a_set([Utterance(corpus[0].path, 0.2, "a", offset=0.1)])[0]
    assert len(item.audio) == 3200 and item.name.endswith("@0.1")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_skipped_reported_and_replaced(corpus, tmp_path, workers):
    (tmp_path / "bad.wav").write_text("nonsense")
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    all_of_them = [*corpus, *(Utterance(str(tmp_path / name), 0.5, "a") for name in ("bad.wav", "nan.wav"))]
    dataset = a_set(all_of_them)
    assert sum(map(len, load(dataset, workers))) == 14  # other utterances replace the unreadable ones
    assert dataset.skipped.counts == {"unreadable": 2}
    details = "".join(s.detail for s in dataset.skipped.items)
    assert "bad.wav: cannot be read" in details and "NaN" in details
    load(dataset, workers, epoch=1)
    assert len(dataset.skipped) == 2  # each file is listed once
    evaluation = a_set(all_of_them, training=False)
    assert sum(map(len, load(evaluation, workers, shuffle=False))) == 12
    assert evaluation.skipped.counts == {"unreadable": 2}


def test_nothing_readable(tmp_path):
    dataset = a_set([Utterance(str(tmp_path / f"{i}.wav"), 1.0, "a") for i in range(3)])
    (batch,) = load(dataset)
    assert len(batch) == 0 and batch.audio.shape == (0, 0) and dataset.skipped.counts == {"unreadable": 3}


def test_audio_shorter_than_the_manifest_says(corpus):
    item = a_set([*corpus, Utterance(corpus[0].path, 3.0, "thirty symbols need thirty frames" * 2)])[12]
    assert item.audio is not None and item.index == 11
    assert [s.reason for s in item.skipped] == ["wrong_duration"]
    assert "the manifest says 3.000 s, but the file has 0.500 s" in item.skipped[0].detail


def test_truncated_files_are_left_out_of_training_and_evaluated_with_a_warning(corpus, tmp_path):
    data = Path(corpus[10].path).read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    cut = Utterance(str(tmp_path / "cut.wav"), corpus[10].duration, "word")
    every, reasons = [*corpus, cut, Utterance(corpus[0].path, 9.9, "word")], {"truncated": 1, "wrong_duration": 1}
    dataset = a_set(every)
    load(dataset)
    assert dataset.skipped.counts == reasons and not dataset.skipped.warned
    for trim in (False, True):
        evaluation = a_set(every, training=False, trim_silence=trim)
        assert sum(map(len, load(evaluation, shuffle=False))) == 14
        assert not len(evaluation.skipped) and Counter(w.reason for w in evaluation.skipped.warned) == reasons
        assert "1 used although truncated" in str(evaluation.skipped)
        details = "".join(w.detail for w in evaluation.skipped.warned)
        assert "the header promises 1.500 s, but the file has 0.749 s" in details
        assert "the manifest says 9.900 s, but the file has 0.500 s" in details
    assert len(evaluation[12].audio) == len(data) // 4 - 22


def test_texts_that_lose_symbols_are_counted_by_manifest(tmp_path):
    texts = ["5 яблок", "hello мир", "ёлка", "мир, да!"]
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    path = lines(tmp_path, *({"audio_filepath": "a.wav", "duration": 1, "text": t} for t in texts))
    dataset = SpeechDataset.from_manifests(path, Vocabulary(" абвгдежзийклмнопрстуфхцчшщъыьэюя"))
    assert dataset.texts == ["яблок", "мир", "лка", "мир да"]
    assert str(dataset.skipped) == f"none skipped; 3 texts of {path} lost symbols: 5 h e l o ё"
    assert dataset.skipped.lost == {str(path): (3, ["5", "h", "e", "l", "o", "ё"])}


def test_speed_perturbation_is_of_seed_epoch_and_index(corpus):
    def lengths(seed=0, epoch=0, **speed):
        dataset = a_set(corpus, seed=seed, speed_perturbation=speed)
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


def test_what_a_seed_draws_never_changes(corpus):
    """A change of these numbers would change the data of resumed runs."""
    settings = {f"{name}_perturbation": {"p": 1.0} for name in ("speed", "gain", "shift", "noise", "tempo")}
    joined = {"min_clips": 2, "max_clips": 3, "noise_db": (-50, -30)}
    clips, change = a_set(corpus, seed=1, join=joined, **settings)._draw(2, 6)
    assert clips == Clips(
        indices=(10, 6),
        gaps=(0.0947941192167296, 0.23201362664443134, 0.0008266311584001262),
        noise_db=-36.76891316751847,
    )
    assert change == Change(
        speed=0.9839179341094895,
        gain=-1.8507683250155722,
        shift=4.1034927422505625,
        variant=0.3803490166640793,
        snr_db=59.192417989065504,
        slope=-0.8201809818998476,
        noise_seed=1501244032,
        tempo=1.2207688181921472,
    )


def test_speed_never_makes_it_too_short_for_ctc(corpus):
    u = Utterance(corpus[0].path, 0.5, "x" * 13)  # has 25 frames, and CTC needs 25
    assert len(a_set([u], speed_perturbation={"min_rate": 1.5, "max_rate": 2.0})[0].audio) == 8000


def test_gain_and_shift(corpus):
    gain = a_set(corpus, gain_perturbation={"p": 1.0, "min_gain_dbfs": 6, "max_gain_dbfs": 6})
    assert np.abs(gain[0].audio / a_set(corpus)[0].audio - 10**0.3).max() < 1e-5
    for ms, zeros, rest in ((5.0, slice(-80, None), slice(-80)), (-5.0, slice(80), slice(80, None))):
        moved = a_set(corpus, shift_perturbation={"p": 1.0, "min_shift_ms": ms, "max_shift_ms": ms})[0].audio
        assert (moved[zeros] == 0).all() and (moved[rest] != 0).all() and len(moved) == 8000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed_perturbation": {"rate": 1}}, r"speed_perturbation\.rate is unknown"),
        ({"speed_perturbation": {"min_rate": 1.2, "max_rate": 1.0}}, "speed_perturbation: need 0 < min <= max"),
        ({"tempo_perturbation": {"min_rate": 0.0}}, "tempo_perturbation: need 0 < min <= max"),
        (
            {"noise_perturbation": {"min_snr_db": 30, "max_snr_db": 5}},
            "noise_perturbation: need min <= max, got min 30",
        ),
        ({"join": {"min_clips": 3, "max_clips": 2}}, "join: need 1 <= min_clips <= max_clips"),
        ({"join": {"max_gap": -1}}, "min_gap <= max_gap"),
        ({"join": {"noise_db": -60}}, "join: noise_db must be two levels"),
        ({"join": {"noise_db": [-40, -60]}}, r"the lower one first, got \[-40, -60\]"),
        ({"join": {"items": 0}}, "join: items must be positive"),
        ({"speed_perturbation": {"p": 1.5}}, r"speed_perturbation: the probability p must lie in \[0, 1\], got 1.5"),
        ({"speed_perturbation": {"min_rate": "1e-1"}}, r"speed_perturbation\.min_rate must be a number.*'1e-1'"),
        ({"max_duration": None}, r"audio_dataset\.max_duration must be a number.*None"),
        ({"gain_perturbation": True}, "gain_perturbation must have settings by name, got True"),
        ({"trim_silense": True}, r"audio_dataset\.trim_silense is unknown; known keys: max_duration"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AudioSettings.from_config(settings)


def test_join(corpus):
    dataset = a_set(corpus, join={"min_clips": 2, "max_clips": 4, "min_gap": 0.1, "max_gap": 0.2})
    assert len(dataset) == 12
    for epoch, index in itertools.product(range(2), range(12)):
        item = dataset[epoch, index]
        clips = [LETTERS.index(word.strip()) for word in item.text.split("word ")[1:]]
        assert 2 <= len(clips) <= 4 and index in clips
        assert {c % 2 for c in clips} == {index % 2}  # all clips are of one speaker
        assert [level for level, _ in itertools.groupby(np.round(item.audio * 16)) if level] == [c + 1 for c in clips]
        assert item.audio[:1600].max() == 0 and item.audio[-1600:].max() == 0
        assert len(item.audio) == pytest.approx(16000 * dataset.durations(epoch)[index], abs=5)
        assert V.decode(item.target) == item.text and len(item.name.split(" + ")) == len(clips)
        assert np.array_equal(item.audio, dataset[epoch, index].audio)
    assert [dataset[0, i].text for i in range(2)] != [dataset[1, i].text for i in range(2)]


def test_join_noise_room_and_limits(corpus, tmp_path):
    noisy = [a_set(corpus, join={"min_gap": 0.1, "noise_db": (-40, -40)})[0].audio for _ in range(2)]
    assert noisy[0][:1600].std() == pytest.approx(0.01, rel=0.1) and np.array_equal(*noisy)
    short = a_set(corpus, join={"min_clips": 7}, max_duration=4.0)
    assert len(short[0].text.split("word ")) == 8  # min_clips takes precedence over max_duration
    short = a_set(corpus, join={"same_speaker": False}, max_duration=4.0)
    assert max(short.durations(0)) <= 4.0 and max(len(i.text) for i in map(short.__getitem__, range(12))) > 20
    tight = a_set([Utterance(corpus[0].path, 0.5, "x" * 40)], join={"min_clips": 1, "max_clips": 1})
    assert len(tight[0].audio) == ctc_frames([1] * 40) * 320
    bad = Utterance(str(tmp_path / "none.wav"), 0.5, "lost", speaker="s0")
    item = a_set([*corpus, bad], join={"min_clips": 4, "max_clips": 4})[12]
    assert "lost" not in item.text and item.text and item.skipped[0].reason == "unreadable" and item.index == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_preloaded_is_the_same(corpus, tmp_path, workers):
    everything = [*corpus, Utterance(str(tmp_path / "none.wav"), 0.6, "x")]
    settings = {"speed_perturbation": {}, "join": {"max_clips": 3}}
    plain = load(a_set(everything, **settings))
    preloaded = a_set(everything, preload=True, **settings)
    for u in corpus:
        Path(u.path).unlink()
    for a, b in zip(plain, load(preloaded, workers), strict=True):
        assert torch.equal(a.audio, b.audio) and a.texts == b.texts
    assert preloaded.skipped.counts == {"unreadable": 1}
    # an utterance with alternatives is never kept in memory
    preloaded.reader.preload([Utterance("none.wav", 1e9, "x", alternatives=("none.wav",))])
    with pytest.raises(ValueError, match="GiB of audio exceed"):
        preloaded.reader.preload(everything, max_gib=1e-5)


def durations(n=101):
    return np.random.default_rng(0).uniform(1, 16, n).tolist()


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("sizes", [{"batch_size": 8}, {"max_seconds": 60}, {"batch_size": 5, "max_seconds": 60}])
def test_plan_covers_each_epoch_once(sizes, bucketing):
    d = durations()
    plan = BatchSampler(d, bucketing=bucketing, seed=3, **sizes)
    for epoch in range(3):
        epoch_batches = plan.batches(epoch)
        assert sorted(itertools.chain(*epoch_batches)) == list(range(101))
        for batch in epoch_batches:
            assert len(batch) <= sizes.get("batch_size", 101)
            assert len(batch) * max(d[i] for i in batch) <= sizes.get("max_seconds", 1e9)
    assert plan.batches(0) == BatchSampler(d, bucketing=bucketing, seed=3, **sizes).batches(0)
    assert plan.batches(0) != plan.batches(1)
    assert plan.batches(0) != BatchSampler(d, bucketing=bucketing, seed=4, **sizes).batches(0)


def test_bucketing_saves_padding():
    d = durations(400)

    def padded(bucketing):
        return sum(len(b) * max(d[i] for i in b) for b in BatchSampler(d, 16, bucketing=bucketing).batches(0))

    assert padded(True) < 1.1 * sum(d) < 1.3 * sum(d) < padded(False)


def shares_of(d, world, *sizes, epoch=0, **how):
    """Returns the batches of each rank, and the items of all batches."""
    shares = [BatchSampler(d, *sizes, rank=r, world_size=world, **how).batches(epoch) for r in range(world)]
    return shares, [i for share in shares for batch in share for i in batch]


def test_the_batches_of_a_step_have_similar_lengths():
    d = np.array(durations())
    shares, _ = shares_of(d, 4, 8)
    assert np.mean([np.ptp(d[np.concatenate(step)]) for step in zip(*shares, strict=True)]) < 8


def test_in_evaluation_each_utterance_belongs_to_one_rank():
    _, items = shares_of(durations(), 4, 8, shuffle=False)
    assert sorted(items) == list(range(101))


@pytest.mark.parametrize("shards", [None, 12], ids=["files", "shards"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [{"batch_size": 64}, {"max_seconds": 64 * 16.7}, {"max_seconds": 240.0}])
def test_each_utterance_comes_once_with_little_padding(world: int, sizes: dict, shards: int | None) -> None:
    """The durations are distributed like those of LibriSpeech: mean 12.3 s, most near 15.3 s."""
    rng, count = np.random.default_rng(0), 20_001
    long, short = rng.triangular(10, 15.3, 16.7, count), rng.triangular(1.3, 8, 10.5, count)
    d = np.where(rng.random(count) < 0.78, long, short)
    assert d.mean() == pytest.approx(12.3, abs=0.1)
    shares, items = shares_of(d, world, epoch=1, shards=shards and np.arange(count) * shards // count, **sizes)
    assert len({len(s) for s in shares}) == 1 and sorted(items) == list(range(count))
    padded = sum(len(b) * d[b].max() for s in shares for b in s)
    assert 1 - d.sum() / padded < 0.05


def test_fewer_utterances_than_ranks_are_repeated() -> None:
    shares, items = shares_of([1.0, 2.0], 5, 4)
    assert [len(s) for s in shares] == [1] * 5 and set(items) == {0, 1}


def test_plan_in_order():
    plan = BatchSampler([3.0, 1.0, 2.0], 2, shuffle=False, bucketing=False)
    assert plan.batches() == [[0, 1], [2]] and plan.steps() == 2
    assert BatchSampler([3.0, 1.0, 2.0], 2, shuffle=False).batches() == [[1, 2], [0]]
    assert BatchSampler([3.0, 90.0, 2.0], max_seconds=10, shuffle=False).batches() == [[2, 0], [1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give batch_size"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_seconds": -1.0}, "max_seconds=-1"),
        ({"batch_size": 1, "window": 0, "open_shards": 0}, "window=0, open_shards=0 must be positive"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, r"rank 2 is not in 0\.\.1"),
    ],
)
def test_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler([1.0], **arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly_at_a_step(corpus, workers):
    settings = {"speed_perturbation": {}, "gain_perturbation": {"p": 0.5}, "join": {"max_clips": 3}}

    def run(start):
        return load(a_set(corpus, seed=5, **settings), workers, 3, start, batch_size=None, max_seconds=8, seed=5)

    state = torch.get_rng_state()
    whole, rest = run(0), run(2)
    assert torch.equal(state, torch.get_rng_state())
    assert len(rest) == len(whole) - 2 and rest[0].step == 2 and rest[0].epoch == 3
    for a, b in zip(whole[2:], rest, strict=True):
        assert a.names == b.names and torch.equal(a.audio, b.audio) and torch.equal(a.targets, b.targets)


def test_from_manifests(corpus, tmp_path):
    path = lines(tmp_path, *({"audio_filepath": u.path, "duration": u.duration, "text": u.text} for u in corpus))
    config = {
        "sample_rate": 8000, "trim_silence": True, "normalize_transcripts": True, "max_duration": 1.0,
        "speed_perturbation": {"discrete": False, "min_rate": 0.85, "max_rate": 1.15},
        "ignore_offline_speed_perturbation": True, "pad_to_max_duration": False,
    }  # fmt: skip
    dataset = SpeechDataset.from_manifests(path, V, config, seed=2)
    settings = dataset.settings
    assert (len(dataset), dataset.seed, settings.sample_rate, settings.perturb.speed.high) == (6, 2, 8000, 1.15)
    assert len(SpeechDataset.from_manifests([path, path], V, {"max_utts": 15})) == 15
    joined = SpeechDataset.from_manifests(path, V, {"preload": True, "join": {"min_clips": 2, "max_clips": 2}})
    Path(corpus[0].path).unlink()
    assert joined[0].text.count("word") == 2
